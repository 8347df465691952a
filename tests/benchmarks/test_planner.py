"""The planner's predictions against real ranks, and its study of the paper."""

from argparse import Namespace

import numpy as np
import pytest

from benchmarks import paper, planner
from benchmarks.own_modules import GPT
from benchmarks.planner import Case, transformer
from lightning_lss.planner.step import Options, Rank, trace_step

CASES = [
    transformer(
        "selective", 2, 512, {"activation_checkpointing": "selective"}, width=64, num_layers=4, positions="learned"
    ),
    transformer("fsdp", 2, 512, {"sharding": "fsdp"}, width=64, num_layers=4),
    Case("own", 2, 256, {"num_positions": 256, "width": 64}, build=GPT, pair=True),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_memory_is_within_a_tenth_of_what_torch_tracks_on_real_ranks(world, case) -> None:
    assert abs(planner.compare(world, case)["error"]) < 0.1


def test_the_benchmark_covers_what_it_promises() -> None:
    own = [case for case in planner.CASES if case.build.__name__ != "LSSTransformer"]
    assert (len(planner.CASES) - len(own), len(own)) == (12, 2)


def test_the_baseline_without_limit_is_the_traced_one_where_that_exists() -> None:
    case = transformer("any", 2, 232, width=64, num_heads=16, num_layers=1)
    (batch,) = ({key: x[None] for key, x in sample.items()} for sample in case.samples(1))
    scheme = paper.MegatronScheme()
    traces = {
        size: trace_step(case.module(), batch, Rank(size, 58 * size, 1, Options(), "efficient", scheme))
        for size in (2, 4, 8, 16)
    }
    told = paper.without_limit([traces[size] for size in paper.TRACED], 16)
    assert told.moments.sum(1).max() == pytest.approx(traces[16].moments.sum(1).max(), rel=0.05)
    assert told.work[:2, :2] == pytest.approx(traces[16].work[:2, :2], rel=0.01)


def test_weak_scaling_as_in_the_paper(capsys) -> None:
    sizes = [("width", 64), ("num_layers", 2)]
    rows = paper.run(Namespace(devices=[6, 144], batch_size=1, sharding=None, set=sizes))
    found = {(row["scheme"], row["devices"]): row for row in rows}
    assert {row["size"] for row in rows if row["scheme"] == "baseline"} <= {2, 4, 8}
    assert found["lss", 144]["length"] == 8352
    assert found["lss, collectives free", 144]["seconds"] < found["lss", 144]["seconds"]
    assert np.isclose(found["lss", 6]["efficiency"], 1)
    assert "5.6x and 10.2x" in capsys.readouterr().out
    assert len(paper.draw([{"date": "now", **{key: str(x) for key, x in row.items()}} for row in rows]).axes) == 4
    assert paper.draw([]).axes
