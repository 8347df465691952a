"""The planner's arithmetic: what must grow or shrink with what, what is refused, and the command line."""

from __future__ import annotations

import csv
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import lightning_lss
from lightning_lss.attention.tiles import attention_tiles
from lightning_lss.models.transformer import TransformerConfig
from lightning_lss.planner import (
    Hardware,
    Link,
    Options,
    Setup,
    longest_sequence,
    rank_memory,
    step_time,
    step_traffic,
    usual_options,
)
from lightning_lss.planner.hardware import bytes_of, load_hardware
from lightning_lss.planner.ledger import Ledger
from lightning_lss.planner.report import print_plan
from lightning_lss.planner.scaling import draw_weak_scaling, weak_scaling
from lightning_lss.planner.timing import visible_pairs

ROOT = Path(__file__).parents[2]
MODEL = TransformerConfig(width=256, num_layers=4, num_heads=8, positions="rotary")
DEVICE = Hardware(
    "device",
    8e9,
    1e12,
    {"float32": 1e13, "bfloat16": 1e14},
    Link(1e11, 1e-6),
    Link(1e10, 1e-5),
    4,
    matmul=0.5,
    attention=0.25,
)
KINDS = sorted((ROOT / "conf" / "hardware").glob("*.yaml"))


def setup_of(
    size: int = 4, length: int = 4096, scheme: str = "lss", config: TransformerConfig = MODEL, **options
) -> Setup:
    return Setup(config, scheme, 1, size, length, options=Options(**options))  # type: ignore[arg-type]


# -- memory ------------------------------------------------------------------------------------------------------------


def test_the_ledger_remembers_the_highest_moment() -> None:
    ledger = Ledger()
    ledger.hold("a", 5)
    ledger.brief("b", 7, "logits")
    ledger.free("a", "never held")
    ledger.hold("c", 11)
    assert (ledger.peak["activations"], ledger.peak["logits"], ledger.moment) == (5, 7, "b")
    assert ledger.now["activations"] == 11
    assert ledger.written == 23


def test_the_most_work_need_not_be_at_the_peak() -> None:
    ledger = Ledger()
    ledger.hold("a", 5)
    ledger.brief("b", 2, "kv_buffers")
    ledger.free("a")
    ledger.hold("p", 100, "optimizer")
    assert (ledger.peak["activations"], ledger.peak["optimizer"]) == (0, 100)
    assert ledger.most_work == 7


@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 64), st.sampled_from(["lss", "megatron"]))
@settings(max_examples=40, deadline=None)
def test_a_longer_sequence_needs_more(size, steps, scheme) -> None:
    # with the chunks fixed: where a length is first gathered in more of them it can need less than a shorter one
    shorter, longer = (rank_memory(setup_of(size, 64 * n, scheme, head_chunks=2)).total for n in (steps, steps + 1))
    assert shorter <= longer


@given(st.integers(1, 5), st.sampled_from([4096, 32768]))
@settings(max_examples=20, deadline=None)
def test_more_ranks_need_less_each(power, length) -> None:
    fewer, more = (rank_memory(setup_of(2**n, length, head_chunks=8)) for n in (power, power + 1))
    assert more.activations + more.kv_buffers + more.logits < fewer.activations + fewer.kv_buffers + fewer.logits


def test_nothing_is_left_when_the_step_is_over() -> None:
    from lightning_lss.planner.walk import Walk

    for scheme in ("lss", "megatron"):
        for how in ("none", "full", "selective", "offload"):
            for config in (MODEL, replace(MODEL, mlp="swiglu", dropout=0.1, num_kv_heads=2, positions="learned")):
                walk = Walk(
                    setup_of(scheme=scheme, config=config, activation_checkpointing=how, precision="bf16-mixed")
                )
                walk.step()
                left = {name for name in walk.ledger.held if not name.endswith("weight_grad")}
                assert left == {"parameters", "moments", "buckets", "batch", "turns"} & left, left


@pytest.mark.parametrize("scheme", ["lss", "megatron"])
def test_options_that_save_memory_do(scheme) -> None:
    plain = rank_memory(setup_of(length=65536, scheme=scheme)).total
    full = rank_memory(setup_of(length=65536, scheme=scheme, activation_checkpointing="full")).total
    selective = rank_memory(setup_of(length=65536, scheme=scheme, activation_checkpointing="selective")).total
    offload = rank_memory(setup_of(length=65536, scheme=scheme, activation_checkpointing="offload")).total
    assert offload < full < selective < plain
    assert rank_memory(setup_of(length=65536, scheme=scheme, mlp_tiles=8)).total < plain


def test_logits_a_few_rows_at_a_time() -> None:
    config = replace(MODEL, vocab_size=131072)
    every, some, chosen = (rank_memory(setup_of(1, 65536, config=config, loss_rows=n)) for n in (65536, 8192, None))
    assert every.logits > 65536 * 131072 * 4
    assert some.logits < 0.15 * every.logits
    assert chosen.total < some.total


@pytest.mark.parametrize(("sharding", "ranks"), [("fsdp", 8), ("hybrid", 4)])
def test_sharding_spreads_the_state(sharding, ranks) -> None:
    config = replace(MODEL, num_layers=16, vocab_size=16)
    whole, sharded = (
        rank_memory(Setup(config, "lss", 2, 4, 1024, options=Options(sharding=name))) for name in (None, sharding)
    )
    assert sharded.optimizer == pytest.approx(whole.optimizer / ranks)
    assert sharded.total < whole.total


def test_the_longest_sequence_is_the_longest() -> None:
    setup = setup_of(4)
    longest = longest_sequence(setup, 2e9)
    assert rank_memory(replace(setup, seq_len=longest)).total <= 2e9
    assert rank_memory(replace(setup, seq_len=round(longest * 1.01) // 8 * 8)).total > 2e9
    assert longest_sequence(setup, 1e6) == 0


# -- traffic -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kv_heads", "kept", "fraction"), [(8, True, 0.5), (2, True, 0.125), (8, False, 0.75)])
def test_bytes_of_a_layer_against_megatron(kv_heads, kept, fraction) -> None:
    config = replace(MODEL, num_kv_heads=kv_heads, keep_gathered=kept)
    lss, megatron = (
        sum(t.received for t in step_traffic(setup_of(scheme=scheme, config=config)) if t.group == "sequence")
        for scheme in ("lss", "megatron")
    )
    assert lss / megatron == fraction


def test_calls_of_a_layer() -> None:
    calls = {
        scheme: sum(t.calls for t in step_traffic(setup_of(scheme=scheme, head_chunks=1)) if t.group == "sequence")
        for scheme in ("lss", "megatron")
    }
    assert calls == {"lss": 3 * MODEL.num_layers, "megatron": 8 * MODEL.num_layers}


def test_gradients_of_positions_stay_in_the_data_group() -> None:
    config = replace(MODEL, positions="learned")
    traffic = step_traffic(Setup(config, "lss", 2, 4, 4096))
    (own,) = (t for t in traffic if t.group == "data")
    assert (own.ranks, own.received) == (2, 2 * 4096 // 4 * 256 * 4 / 2)
    assert not [t for t in step_traffic(Setup(config, "lss", 1, 4, 4096)) if t.group == "data"]


def test_one_device_sends_nothing() -> None:
    assert step_traffic(setup_of(1)) == []


# -- time --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_busiest_rank_sets_the_time(size, layout, causal) -> None:
    setup = setup_of(size, 64, config=replace(MODEL, causal=causal), layout=layout)
    tiles = (attention_tiles(64, rank, size, layout, causal) for rank in range(size))
    assert visible_pairs(setup) == max(sum(tile.pairs for tile in own) for own in tiles)


@given(st.sampled_from(["lss", "megatron"]), st.sampled_from([2, 4, 8]), st.integers(1, 20))
@settings(max_examples=20, deadline=None)
def test_better_hardware_is_never_slower(scheme, size, factor) -> None:
    setup = setup_of(size, 4096, scheme)
    seconds = step_time(setup, DEVICE).total
    faster = replace(DEVICE, between=Link(1e10 * factor, 1e-5 / factor), peak={"float32": 1e13 * factor})
    assert step_time(setup, faster).total <= seconds
    assert step_time(setup, replace(DEVICE, overlap=0.0)).total >= seconds


def test_a_slow_link_decides_for_fewer_bytes() -> None:
    slow, config = replace(DEVICE, inside=Link(1e7, 1e-5)), replace(MODEL, num_kv_heads=2)
    lss, megatron = (step_time(setup_of(4, 8192, scheme, config), slow).total for scheme in ("lss", "megatron"))
    assert megatron > 2 * lss


def test_recomputation_costs_time() -> None:
    seconds = [step_time(setup_of(activation_checkpointing=how), DEVICE) for how in ("none", "selective", "full")]
    assert seconds[0].matmul < seconds[1].matmul == seconds[2].matmul
    assert seconds[0].attention == seconds[1].attention < seconds[2].attention


def test_numbers_that_travel_in_two_bytes() -> None:
    for sharding in (None, "fsdp", "hybrid"):
        whole, half = (
            {x.name: x.received for x in step_traffic(grid_of(sharding=sharding, communication_dtype=dtype))}
            for dtype in (None, "bfloat16")
        )
        for name, received in whole.items():  # parameters stay what they are
            assert half[name] == (received if name == "gather parameters" else received / 2), name


def grid_of(**options) -> Setup:
    return Setup(MODEL, "lss", 2, 4, 4096, options=Options(**options))


@pytest.mark.parametrize("sharding", [None, "fsdp", "hybrid"])
def test_batches_of_a_step_are_computed_one_after_the_other_and_gradients_averaged_once(sharding) -> None:
    one, three = (grid_of(sharding=sharding, accumulate_grad_batches=n) for n in (1, 3))
    assert three.sequences == 3 * one.sequences
    times = [step_time(setup, DEVICE) for setup in (one, three)]
    assert times[1].matmul == pytest.approx(3 * times[0].matmul)
    assert times[1].optimizer == times[0].optimizer
    calls = [{x.name: x.calls for x in step_traffic(setup)} for setup in (one, three)]
    for name in calls[0]:
        once = name.startswith("average")
        assert calls[1][name] == calls[0][name] * (1 if once else 3), name


# -- plan --------------------------------------------------------------------------------------------------------------


def test_a_plan_has_every_way_and_takes_the_fastest_that_fits() -> None:
    plan = lightning_lss.plan(MODEL, 65536, 8, DEVICE)
    assert [(c.scheme, c.data_size, c.size) for c in plan.choices] == [
        *(("lss", 8 // n, n) for n in (1, 2, 4, 8)),
        *(("megatron", 8 // n, n) for n in (2, 4, 8)),
    ]
    best = plan.recommended
    assert best is not None
    assert best.fits
    assert best.tokens_per_second == max(c.tokens_per_second for c in plan.choices if c.fits)
    assert all(c.fits == (c.longest >= 65536) for c in plan.choices if c.setup)


def test_where_nothing_fits_nothing_is_recommended() -> None:
    plan = lightning_lss.plan(MODEL, 65536, 2, replace(DEVICE, memory=1e8))
    assert plan.recommended is None
    assert not any(choice.fits for choice in plan.choices)


def test_a_global_batch_is_shared_out() -> None:
    plan = lightning_lss.plan(MODEL, 4096, 4, DEVICE, global_batch=2)
    assert {c.data_size: c.batch_size for c in plan.choices if c.obstacle is None} == {2: 1, 1: 2}
    assert {c.data_size for c in plan.choices if c.obstacle} == {4}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"devices": 0}, "devices=0 must be a positive integer"),
        ({"devices": "auto"}, "devices='auto' must be a positive integer"),
        ({"seq_len": -1}, "seq_len=-1 must be a positive integer"),
        ({"seq_len": 4096.5}, "seq_len=4096.5 must be a positive integer"),
        ({"global_batch": 0}, "global_batch=0 must be a positive integer"),
        ({"config": "tiny"}, "config is a str, not a TransformerConfig"),
        ({"hardware": "h100"}, "hardware is a str, not a Hardware"),
        ({"schemes": []}, "leave nothing to plan"),
        ({"schemes": ["megatron"], "devices": 1}, "leave nothing to plan"),
        ({"devices": 8, "global_batch": 3, "seq_len": 1001}, "No way to share 8 devices out"),
        ({"options": Options("16-mixed")}, "device has no peak for float16"),
    ],
)
def test_what_is_impossible_is_refused(kwargs, message) -> None:
    with pytest.raises(ValueError, match=message):
        lightning_lss.plan(**{"config": MODEL, "seq_len": 4096, "devices": 4, "hardware": DEVICE, **kwargs})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Options("fp8"), "precision='fp8' is unknown"),
        (lambda: Options(sharding="zero"), "sharding='zero' is unknown"),
        (lambda: Options(layout="spiral"), "layout='spiral' is unknown"),
        (lambda: Options(communication_dtype="int8"), "communication_dtype='int8' is unknown"),
        (lambda: Options(mlp_tiles=0), "mlp_tiles=0 must be a positive integer"),
        (lambda: Options(mlp_tiles=1.5), "mlp_tiles=1.5 must be a positive integer"),
        (lambda: load_hardware("h100"), "'h100' is no file"),
        (lambda: Setup(MODEL, "lss", 2, 1, 4096, options=Options(sharding="hybrid")), "which has one rank here"),
        (lambda: setup_of(3), "cannot be split over 3 ranks"),
        (lambda: setup_of(head_chunks=3), "a divisor of the 8 key/value heads"),
        (lambda: setup_of(16, scheme="megatron"), "Megatron cannot share num_heads=8 out over 16 ranks"),
        (lambda: replace(DEVICE, matmul=0), "matmul=0 must be positive"),
        (lambda: bytes_of("ten"), "is no size"),
    ],
)
def test_what_makes_no_sense_is_refused(build, message) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_usual_options_are_those_of_the_hardware_except_where_chosen() -> None:
    hardware = replace(DEVICE, precision="bf16-true", kernel="cudnn", optimizer_temporaries="all")
    assert usual_options(hardware) == Options("bf16-true", kernel="cudnn", optimizer_temporaries="all")
    assert usual_options(hardware, kernel="efficient", mlp_tiles=4).kernel == "efficient"


def test_sizes_as_people_write_them() -> None:
    assert [bytes_of(x) for x in (80e9, "80GB", "24 GiB", "1.5e9")] == [80e9, 80e9, 24 * 2**30, 1.5e9]


@pytest.mark.parametrize("path", KINDS, ids=lambda path: path.stem)
def test_every_kind_of_hardware_says_where_its_figures_come_from(path) -> None:
    hardware = load_hardware(path)
    told = {name.strip().partition(".")[0] for names in hardware.source for name in names.split(",")}
    needed = {"memory", "bandwidth", "peak", "matmul", "attention", "overlap", "launch", "usable"}
    assert needed <= told
    assert lightning_lss.plan(MODEL, 4096, 8, hardware).recommended is not None


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])  # whose peak is in the optimizer's step
def test_weak_scaling_as_in_the_paper(precision) -> None:
    config = TransformerConfig(width=512, num_layers=6, num_heads=8, dropout=0.1)
    scaling = weak_scaling(config, load_hardware(ROOT / "conf" / "hardware" / "v100.yaml"), Options(precision))
    assert [(p.devices, p.setup.seq_len) for p in scaling.lss][-1] == (3456, 50112)
    assert {p.setup.size for p in scaling.possible} <= {1, 2, 4, 8}
    slower, _, work = scaling.ratios(scaling.baseline)
    assert slower > 1
    assert 1 < work < 10
    assert len(draw_weak_scaling(scaling).axes) == 4


def test_weak_scaling_of_sharded_parameters_is_against_the_same_baseline() -> None:
    hardware = load_hardware(ROOT / "conf" / "hardware" / "v100.yaml")
    plain, sharded = (weak_scaling(MODEL, hardware, Options("32-true", sharding=x)) for x in (None, "fsdp"))
    assert sharded.baseline == plain.baseline
    assert sharded.lss[-1].memory.total < plain.lss[-1].memory.total


def test_the_command_line(tmp_path) -> None:
    words = [
        "mode=plan",
        "model=1b",
        "seq_len=131072",
        "devices=8",
        "hardware=h100",
        "plan.csv=plan.csv",
        "plan.png=plan.png",
    ]
    command = [sys.executable, str(ROOT / "train.py"), *words, "plan.memory=60GB"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Recommended: strategy=" in done.stdout
    with open(tmp_path / "plan.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["scheme"] for row in rows} == {"lss", "megatron"}
    assert {row["fits"] for row in rows} == {"True", "False"}
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_the_comparison_takes_the_longest_of_any_way_and_tells_it_where_one_does_not_fit() -> None:
    def told(memory: float) -> str:
        text = StringIO()
        plan = lightning_lss.plan(MODEL, 65536, 8, replace(DEVICE, memory=memory))
        print_plan(plan, Console(file=text, soft_wrap=True))
        return text.getvalue()

    plan = lightning_lss.plan(MODEL, 65536, 8, DEVICE)
    longest = {s: max(c.longest for c in plan.choices if c.scheme == s) for s in ("lss", "megatron")}
    assert "x the speed" in told(DEVICE.memory)
    assert f"{longest['lss']:,} tokens (lss), {longest['megatron']:,} tokens (megatron)" in told(DEVICE.memory)
    needed = {s: min(c.memory.total for c in plan.choices if c.scheme == s and c.memory) for s in longest}
    assert needed["lss"] < needed["megatron"]
    assert "tokens (megatron)" in told(sum(needed.values()) / 2)


def test_every_part_has_its_own_peak() -> None:
    memory = rank_memory(setup_of(8, 65536))
    assert all(memory.most[part] >= getattr(memory, part) for part in memory.most)
    assert memory.most["kv_buffers"] > 0
    assert memory.most["logits"] > 0
