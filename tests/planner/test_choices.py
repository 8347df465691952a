"""Plans: every way to share devices out, what fits, what is recommended, what is refused."""

import csv
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from rich.console import Console

import lightning_lss
from lightning_lss.megatron import MegatronScheme
from lightning_lss.planner import Plan, load_hardware
from lightning_lss.planner.memory import memory_of, moments_of
from lightning_lss.planner.report import draw_plan, print_plan, write_csv
from lightning_lss.planner.step import Rank, trace_step
from tests.planner.modules import DEVICE, OwnModule, batch_of, pair_of, transformer

ROOT = Path(__file__).parents[2]


def planned(module: Any = None, batch: Any = None, devices: int = 2, **options: Any) -> Plan:
    module = transformer() if module is None else module
    batch = batch_of(4096) if batch is None else batch
    return lightning_lss.plan(module, batch, devices, **{"hardware": DEVICE, "cache": False, **options})


@pytest.fixture(scope="module")
def plan() -> Plan:
    return planned(transformer(num_heads=2), baselines=[MegatronScheme()], seq_len=65536, devices=4)


def text_of(plan: Plan) -> str:
    text = StringIO()
    print_plan(plan, Console(file=text, soft_wrap=True, width=200))
    return text.getvalue()


def test_a_plan_has_every_way_and_takes_the_fastest_that_fits(plan) -> None:
    assert [(c.scheme, c.data_size, c.size) for c in plan.choices] == [
        *(("lss", 4 // n, n) for n in (1, 2, 4)),
        ("megatron", 2, 2),
    ]
    assert [(x.scheme, x.size) for x in plan.impossible] == [("megatron", 4)]
    assert "num_heads=2 cannot be divided" in plan.impossible[0].reason
    best = plan.recommended
    assert best is not None
    assert best.fits
    assert best.tokens_per_second == max(c.tokens_per_second for c in plan.choices if c.fits)
    assert all(choice.fits == (choice.longest >= 65536) for choice in plan.choices)


def test_more_ranks_need_less_each_and_reach_further(plan) -> None:
    own = [choice for choice in plan.choices if choice.scheme == "lss"]
    for fewer, more in pairwise(own):
        assert more.memory.beside_state < fewer.memory.beside_state
        assert more.longest > fewer.longest


def test_the_longest_sequence_is_the_longest(plan) -> None:
    choice = plan.choices[1]
    for length, fits in ((choice.longest, True), (round(choice.longest * 1.02) // 4 * 4, False)):
        trace = trace_step(
            transformer(num_heads=2), batch_of(), Rank(choice.size, length, 1, plan.options, DEVICE.kernel)
        )
        memory = memory_of(moments_of(trace, 1, ddp=True))
        assert (memory.total <= DEVICE.usable_memory) == fits


def test_where_nothing_fits_nothing_is_recommended(plan) -> None:
    small = planned(hardware=replace(DEVICE, memory=1e5))
    assert small.recommended is None
    assert "Nothing fits" in text_of(small)
    assert [choice.longest for choice in small.choices] == [0, 0]


def test_one_device_needs_no_buckets_and_sends_nothing() -> None:
    (alone,) = planned(devices=1).choices
    first, _ = planned(devices=2).choices
    parameters = sum(x.nbytes for x in transformer().parameters())
    assert first.memory.total - alone.memory.total == parameters
    assert alone.time.received == 0
    assert first.time.received == parameters  # of 2 devices, twice half of the gradients


def test_a_global_batch_is_shared_out() -> None:
    plan = planned(global_batch=2, devices=4)
    assert {c.data_size: c.batch_size for c in plan.choices} == {2: 1, 1: 2}
    assert [x.data_size for x in plan.impossible] == [4]
    assert "global_batch=2 cannot be divided evenly among D=4 sequence groups" in plan.impossible[0].reason


def test_parts_of_parameters_on_all_ranks_or_on_those_of_a_group() -> None:
    small = {"seq_len": 256, "devices": 4}
    whole, fsdp, hybrid = (planned(**small, sharding=name) for name in (None, "fsdp", "hybrid"))
    by_size = [{c.size: c for c in plan.choices} for plan in (whole, fsdp, hybrid)]
    assert by_size[1][2].memory.optimizer < by_size[2][2].memory.optimizer < by_size[0][2].memory.optimizer
    assert by_size[1][4].memory.total == by_size[2][4].memory.total
    assert "use 'fsdp'" in hybrid.impossible[0].reason


def test_batches_of_a_step_are_computed_one_after_the_other_and_gradients_averaged_once() -> None:
    one, three = (planned(accumulate_grad_batches=n).choices[1] for n in (1, 3))
    assert three.time.matmul == pytest.approx(3 * one.time.matmul)
    assert three.time.attention == pytest.approx(3 * one.time.attention)
    assert three.time.optimizer == pytest.approx(one.time.optimizer)
    gradients = sum(x.nbytes for x in transformer().parameters())
    assert three.time.received - gradients == pytest.approx(3 * (one.time.received - gradients))


def test_a_users_own_module() -> None:
    plan = planned(OwnModule(), pair_of(64), seq_len=1024, devices=4)
    assert [choice.size for choice in plan.choices] == [1, 2, 4]
    assert "strategy=lss sequence_parallel_size=" in text_of(plan)
    with_baseline = planned(OwnModule(), pair_of(64), baselines=[MegatronScheme()])
    assert "has no Transformer for Megatron to split" in with_baseline.impossible[0].reason


class ForOneDevice(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = torch.nn.Embedding(64, 8), torch.nn.Linear(8, 64)

    def training_step(self, batch: Any, index: int) -> Any:
        return self.out(self.embed(batch["inputs"])).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters())


def test_a_module_that_is_shown_whole_sequences_is_planned_on_one_device_only() -> None:
    plan = planned(ForOneDevice(), batch_of(64))
    assert [choice.size for choice in plan.choices] == [1]
    assert "ForOneDevice is not written for segments" in plan.impossible[0].reason


def test_a_module_that_would_not_fit_this_machine() -> None:
    def build() -> Any:
        sizes = dict(width=16384, num_layers=48, num_heads=128, num_kv_heads=8, mlp="swiglu")
        return transformer(**sizes)

    plan = planned(build, devices=1)
    assert plan.choices[0].memory.parameters > 4e11
    assert plan.recommended is None


def test_a_second_plan_takes_no_traces(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    taken: list[str] = []
    first, second = (planned(cache=True, on_trace=taken.append) for _ in range(2))
    assert len(taken) == len(set(taken)) > 0
    assert second.choices == first.choices


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"devices": 0}, "devices=0 must be a positive integer"),
        ({"devices": "auto"}, "devices='auto' must be a positive integer"),
        ({"seq_len": -1}, "seq_len=-1 must be a positive integer"),
        ({"global_batch": 0}, "global_batch=0 must be a positive integer"),
        ({"module": "tiny"}, "module is a str, not a LightningModule"),
        ({"module": lambda: torch.nn.Linear(2, 2)}, "module is a Linear, not a LightningModule"),
        ({"hardware": "h100"}, "hardware='h100' is not a Hardware"),
        ({"batch": {"n": 3}}, "batch has no tensor"),
        ({"batch": {"a": torch.zeros(1, 4), "b": torch.zeros(1, 5)}}, r"lengths \[4, 5\].*sequence_dims"),
        ({"seq_len": 1001, "global_batch": 3, "devices": 8}, r"No \(D, S\) is possible for 8 devices"),
        ({"precision": "16-mixed"}, "device has no peak for float16"),
        ({"precision": "fp8"}, "precision='fp8' is unknown"),
        ({"checkpointed_modules": ["layers"]}, "no effect without activation_checkpointing"),
    ],
)
def test_what_is_impossible_is_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        planned(**{"devices": 4, **arguments})


def test_tables_csv_and_picture(plan, tmp_path) -> None:
    text = text_of(plan)
    best = plan.recommended
    assert f"strategy={best.scheme} sequence_parallel_size={best.size}" in text
    assert "an estimated" in text
    assert "Best lss against best megatron" in text
    longest = {s: max(c.longest for c in plan.choices if c.scheme == s) for s in ("lss", "megatron")}
    assert f"{longest['lss']:,} tokens (lss), {longest['megatron']:,} tokens (megatron)" in text
    assert "impossible: megatron with D=1, S=4" in text
    write_csv(plan, tmp_path / "plan.csv")
    with open(tmp_path / "plan.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["S"]) for row in rows] == [1, 2, 4, 2, 4]
    assert float(rows[0]["total_bytes"]) == round(plan.choices[0].memory.total)
    assert rows[-1]["impossible"] == plan.impossible[0].reason
    draw_plan(plan).savefig(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 0


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "hardware").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_kind_of_hardware_says_where_its_figures_come_from(path) -> None:
    hardware = load_hardware(path)
    told = {name.strip().partition(".")[0] for names in hardware.source for name in names.split(",")}
    assert {"memory", "bandwidth", "peak", "matmul", "attention", "overlap", "launch", "usable"} <= told
    assert planned(hardware=hardware, devices=1).recommended is not None


def test_the_command_line(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = [
        "mode=plan",
        "model=tiny",
        "seq_len=8192",
        "devices=2",
        "hardware=h100",
        "plan.csv=a.csv",
        "plan.png=a.png",
    ]
    command = [sys.executable, str(ROOT / "train.py"), *words, "plan.memory=60GB", "strategy.layout=contiguous"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Recommended: strategy=" in done.stdout
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["scheme"] for row in rows} == {"lss", "megatron"}
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
