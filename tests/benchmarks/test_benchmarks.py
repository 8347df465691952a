"""The benchmarks' harness: what it counts and tracks against sums done by hand, and its command line on tiny sizes."""

import csv
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import commands, counting, memory, network, results
from benchmarks.__main__ import main
from benchmarks.attention import Shape, check_attention, verdict
from benchmarks.contestants import CONTESTANTS
from benchmarks.training import Job, model_options
from benchmarks.turns import in_turn, median_ratio, start_ranks
from lightning_lss.testing.collectives import Collective, Tally

JOB = Job(model_options("tiny", seq_len=64, width=32, num_heads=4, dropout=0.1), steps=4, warm_up=3)
ENVIRONMENT = ["date", "commit", "torch", "lightning", "python", "processor", "cores", "load"]


@pytest.fixture(scope="module")
def ranks():
    with start_ranks(2) as world:
        yield partial(world.run, timeout=60)


def run_command(folder: Path, *arguments: str) -> list[dict[str, str]]:
    main([*arguments, "--quick", "--output", str(folder)])
    assert (folder / f"{arguments[0]}.png").stat().st_size > 0
    with open(folder / f"{arguments[0]}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_counting_from_the_command_line(tmp_path) -> None:
    rows = run_command(tmp_path, "communication", "--contestants", "lss-kept", "ulysses")
    assert list(rows[0])[-len(ENVIRONMENT) :] == ENVIRONMENT
    found = {row["contestant"]: row for row in rows}
    keys_and_values = 2 * 128 * 64 * 4 // 2  # K and V of the other rank: 2 x L x E x 4 bytes, of which it holds half
    assert {name: int(row["bytes_forward"]) for name, row in found.items()} == {
        "lss-kept": keys_and_values,
        "ulysses": keys_and_values,  # a quarter of q, k, v and the output
    }
    assert int(found["lss-kept"]["bytes_backward"]) == keys_and_values
    assert found["lss-kept"]["forward"] == "1 all_gather"
    assert found["lss-kept"]["backward"] == "1 reduce_scatter"
    assert found["ulysses"]["forward"] == "4 all_to_all"
    # weights of a layer in float32, all-reduced: 12 E^2 and two norms of 2 E
    assert int(found["lss-kept"]["parameter_bytes_per_layer"]) == 4 * (12 * 64**2 + 4 * 64)


def test_a_timing_from_the_command_line(tmp_path) -> None:
    rows = run_command(tmp_path, "attention", "--contestants", "lss")
    assert [row["contestant"] for row in rows] == ["single", "lss"]
    assert all(float(row["seconds"]) > 0 for row in rows)
    assert all(row["gradients"] == "right" for row in rows)
    assert rows[0]["fraction_of_ideal"] == "" != rows[1]["fraction_of_ideal"]


def test_overhead_tells_its_runs_apart(tmp_path) -> None:
    ddp, lss = run_command(tmp_path, "overhead", "--rounds", "3", "--steps", "1", "--warm-up", "1")
    assert ddp["seconds_against_ddp_by_run"] == ""
    assert len(lss["seconds_against_ddp_by_run"].split()) == 3
    assert sorted(map(float, lss["seconds_against_ddp_by_run"].split()))[1] == float(lss["seconds_against_ddp"])
    assert lss["gradients"] == "right"


@pytest.mark.parametrize("name", ["lss", "lss-contiguous", "ulysses"])
def test_attention_is_checked_in_output_and_gradients(ranks, name) -> None:
    errors = ranks(2, check_attention, name, 2, Shape(length=64, heads=4, kv_heads=2, width=8))
    assert all(value < 1e-6 for rank in errors for value in rank.values())


def test_a_wrong_gradient_is_called_wrong() -> None:
    assert verdict(3e-7) == "right"
    assert verdict(0.5) == "wrong"


@pytest.mark.parametrize("name", ["single", "lss", "lss-kept", "ulysses"])
def test_memory_on_shapes_is_that_of_real_ranks(ranks, name) -> None:
    size = 1 if name == "single" else 2
    real = ranks(size, memory.track_ranks, name, size, JOB, group=size > 1)[0]
    shapes = ranks(1, memory.track_shapes, name, size, JOB, group=False)[0]
    assert shapes.parameters == real.parameters
    assert shapes.activations == pytest.approx(real.activations, rel=0.03)
    assert shapes.gradients == pytest.approx(real.gradients, rel=0.03)


def test_buckets_of_ddp_are_gradients_not_activations(ranks) -> None:
    single = ranks(1, memory.track_ranks, "single", 1, JOB, group=False)[0]
    ddp = ranks(1, memory.track_ranks, "ddp", 1, JOB)[0]
    assert ddp.activations == pytest.approx(single.activations, rel=0.01)
    assert ddp.gradients > single.gradients


def test_longest_length() -> None:
    longest = memory.longest_length(lambda length: 100 * length, cap=123_456, step=4, start=64)
    assert longest % 4 == 0
    assert 0.99 * 1234 < longest <= 1234
    assert memory.longest_length(lambda length: 10**9, cap=1, step=4, start=64) == 0


def test_per_layer_tells_activations_from_parameters() -> None:
    def gather(received: int) -> Collective:
        return Collective("forward", "all_gather", torch.float32, received)

    def tally(job: Job) -> Tally:
        layers, length = job.model["num_layers"], job.length
        all_reduce = Collective("backward", "all_reduce", torch.float32, 300 + 500 * layers)
        return Counter({gather(10 * length): layers, gather(700): layers, all_reduce: 1})

    activations, parameter_bytes = counting.per_layer(tally, JOB)
    assert activations == {gather(10 * 64): 1}
    assert parameter_bytes == 700 + 500


def test_contestants_take_turns() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) or float(len(order)) for name in "ab"}
    seconds = in_turn(runs, rounds=2, warm_up=1)
    assert order == list("ababab")
    assert seconds == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert len(in_turn(runs, rounds=5, most_seconds=0)["a"]) == 1  # at least one
    assert median_ratio([2.0, 4.0, 90.0], [1.0, 2.0, 9.0]) == 2.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "--ranks", "0"], "0 is not a positive integer"),
        (["step", "--length", "1001", "--ranks", "2"], "cannot be split over 2 ranks"),
        (["memory", "--set", "colour=red"], "does not take colour"),
        (["step", "--width", "30", "--heads", "4"], "width=30 must be a multiple of num_heads=4"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(capsys, arguments, message) -> None:
    with pytest.raises(SystemExit) as refusal:
        main(arguments)
    said = capsys.readouterr().err if isinstance(refusal.value.code, int) else str(refusal.value)
    assert refusal.value.code != 0
    assert message in said


@pytest.mark.slow
def test_the_module_is_a_command() -> None:
    command = [sys.executable, "-m", "benchmarks", "step", "--ranks", "0"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "--ranks: 0 is" in done.stderr
    assert "Traceback" not in done.stderr


def test_efficiency_is_against_the_fewest_ranks(tmp_path) -> None:
    rows = run_command(tmp_path, "weak-scaling", "--contestants", "lss", "--ranks", "2", "1")
    assert [(row["ranks"], row["efficiency"] == "1.0") for row in rows] == [("2", False), ("1", True)]


def test_who_is_left_out_is_named(tmp_path, capsys) -> None:
    assert commands._on_shapes(["lss", "lss-fsdp"]) == ["lss"]
    assert "left out: lss-fsdp" in capsys.readouterr().out


def test_one_row_is_shown_in_full(capsys) -> None:
    results.show([{f"column {number}": number for number in range(40)}])
    assert "column 39" in capsys.readouterr().out


def test_rows_with_other_columns_are_refused(tmp_path) -> None:
    results.append("step", [{"a": 1}], tmp_path)
    results.append("step", [{"a": 2}], tmp_path)
    assert [row["a"] for row in results.read("step", tmp_path)] == ["1", "2"]
    with pytest.raises(ValueError, match="other columns"):
        results.append("step", [{"b": 1}], tmp_path)


def test_a_column_of_notes_is_left_to_people(tmp_path) -> None:
    path = results.append("step", [{"a": 1}], tmp_path)
    header, row = path.read_text().splitlines()
    path.write_text(f"{header},note\n{row},by hand\n")
    results.append("step", [{"a": 2}], tmp_path)
    assert [row["note"] for row in results.read("step", tmp_path)] == ["by hand", ""]


def test_who_cannot_take_part_says_why() -> None:
    assert "3 of 6 heads" in str(CONTESTANTS["ulysses"].obstacle(2, 6, 3))
    assert CONTESTANTS["lss"].obstacle(2, 6, 3) is None


def test_namespaces_are_removed_also_after_a_failure() -> None:
    reason = network.obstacle()
    if reason is not None:
        pytest.skip(reason)
    made = network.Network(2, megabits=100, prefix="lsstest")
    with made:
        assert Path("/run/netns/lsstestn1").exists()
    assert not list(Path("/run/netns").glob("lsstest*"))
    with pytest.raises(ZeroDivisionError), made:
        raise ZeroDivisionError
    assert not list(Path("/run/netns").glob("lsstest*"))
    assert not list(Path("/sys/class/net").glob("lsstest*"))
    with pytest.raises(RuntimeError, match="failed"), network.Network(2, 100, "lsstest-too-long"):
        pass
    assert not list(Path("/run/netns").glob("lsstest*"))
