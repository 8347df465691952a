"""Traces of other lengths and numbers of ranks, and those on disk."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_lss.planner.step import Options, Rank, trace_step
from lightning_lss.planner.trace import KINDS, STAGES, Trace
from lightning_lss.planner.traces import Traces, cache_folder, fingerprint
from tests.planner.modules import OwnModule, batch_of, pair_of, transformer


def traces_of(module: Any, batch: Any, folder: Path | None = None, **options: Any) -> tuple[Traces, list[str]]:
    taken: list[str] = []
    return Traces(module, batch, Options(**options), "cuda_flash", None, folder, taken.append), taken


def totals(trace: Trace) -> np.ndarray:
    return trace.moments.sum(1)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("keep_gathered", [False, True])
def test_more_ranks_than_are_traced(keep_gathered, layout) -> None:
    module = transformer(width=128, keep_gathered=keep_gathered)
    traces, taken = traces_of(module, batch_of(), layout=layout)
    told = traces.at(16, 4096, 1)
    assert len(taken) == 2
    traced = trace_step(module, batch_of(), Rank(16, 4096, 1, Options(layout=layout), "cuda_flash"))
    assert told.matches(traced)
    assert totals(told) == pytest.approx(totals(traced), rel=1e-6)
    assert told.work[:, :2] == pytest.approx(traced.work[:, :2], rel=1e-12)
    assert told.collectives[:, :5] == pytest.approx(traced.collectives[:, :5], rel=0.02)


def test_other_lengths() -> None:
    module = transformer(activation_checkpointing="full", head_chunks=2)
    near, far, other = (
        trace_step(module, batch_of(), Rank(2, length, 1, Options(), "cuda_flash")) for length in (512, 1024, 4096)
    )
    assert totals(near.toward(far, 7)) == pytest.approx(totals(other), rel=1e-6)


def test_the_check_is_silent_where_memory_is_affine_and_warns_where_it_is_not() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traces_of(transformer(), batch_of())[0].check(8, 512, 1)

    with pytest.warns(UserWarning, match=r"not affine in the number of ranks.*for S=8, L=512"):
        traces_of(GrowsFast(), pair_of())[0].check(8, 512, 1)


class GrowsFast(OwnModule):
    """Holds a matrix of the whole sequence."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        length = batch[0].size(1) * self.trainer.world_size
        scores = torch.ones(length, length) * self.head.bias.sum()
        return {"loss": super().training_step(batch, batch_idx)["loss"] + scores.exp().mean()}


def test_steps_that_take_other_operators_are_compared_stage_by_stage() -> None:
    one, two = (
        trace_step(transformer(num_layers=n), batch_of(), Rank(2, 64, 1, Options(), "cpu_flash")) for n in (1, 2)
    )
    middle = one.toward(two, 0.5)
    assert middle.moments.shape[0] == len(STAGES)
    assert len(middle.kinds) == len(STAGES) * len(KINDS)
    highest = [(totals(x)[x.stages == 0].max()) for x in (one, two)]
    assert totals(middle)[0] == sum(highest) / 2
    assert middle.collectives[:, 1].sum() == (one.collectives[:, 1].sum() + two.collectives[:, 1].sum()) / 2


def test_traces_are_kept_on_disk_until_something_changes(tmp_path) -> None:
    first, taken = traces_of(transformer(), batch_of(), tmp_path)
    trace = first.at(8, 512, 1)
    assert len(taken) == 2
    again, taken = traces_of(transformer(), batch_of(), tmp_path)
    other = again.at(8, 512, 1)
    assert taken == []
    assert np.array_equal(other.moments, trace.moments)
    assert np.array_equal(other.kinds, trace.kinds)
    for module, options in ((transformer(dropout=0.1), {}), (transformer(), {"precision": "bf16-mixed"})):
        changed, taken = traces_of(module, batch_of(), tmp_path, **options)
        changed.at(2, 64, 1)
        assert len(taken) == 1
    assert not [path for path in tmp_path.iterdir() if path.name.count(".") > 1]


def test_the_folder_of_the_cache(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "lightning_lss" / "traces"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "lightning_lss" / "traces"


def test_the_fingerprint_of_a_module() -> None:
    assert fingerprint(OwnModule()) == fingerprint(OwnModule())
    with torch.device("meta"):
        assert fingerprint(transformer()) == fingerprint(transformer())
    different = [OwnModule(), OwnModule(layers=4), OwnModule(num_positions=65), OwnModule(width=64), GrowsFast()]
    frozen = OwnModule()
    frozen.head.bias.requires_grad_(False)
    causal = OwnModule()
    causal.layers[2].attention.causal = False
    assert len({fingerprint(module) for module in [*different, frozen, causal]}) == 7
