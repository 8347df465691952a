"""``lightning_lss.verify``: a proof on CPU processes, apart from any run."""

import copy

import pytest
import torch
from torch import nn

from lightning_lss import InexactError, verify
from lightning_lss.testing.compare import assert_equal
from tests.proof.faulty import FAULTS, VOCAB, WIDTH, OwnPositions, Right, make_batch
from tests.tensor.models import CausalDecoder, make_batches

pytestmark = pytest.mark.slow  # starts processes


def test_a_right_module_gets_a_report_and_stays_as_it_is(capsys) -> None:
    class Local(Right):  # as in a notebook, where nothing can be imported
        pass

    module = Local()
    before = copy.deepcopy(module.state_dict())
    report = verify(module, make_batch(1024), precision="64-true")
    assert report.exact
    assert (report.length, report.of_length, report.size) == (256, 1024, 2)
    assert {x.name for x in report.gradients} == dict(module.named_parameters()).keys()
    assert max(x.error for x in report.gradients) < 1e-12
    assert report.modules.keys() >= {"embed", "qkv", "attention", "out"}
    assert_equal(module.state_dict(), before, 0)
    inputs = next(x for x in report.leaks if x.entry == "inputs")
    assert inputs.on_one == inputs.on_all == list(range(128, 256))  # causal: a token reaches those after it
    assert "moves on one rank" in capsys.readouterr().out


def test_a_fault_is_raised_with_its_report(capsys) -> None:
    with pytest.raises(InexactError, match=FAULTS[OwnPositions]) as caught:
        verify(OwnPositions(), make_batch(), layout="contiguous")
    assert caught.value.report.modules["positions"] > 0.1
    assert caught.value.report.modules["embed"] == 0.0
    assert "positions.weight" in capsys.readouterr().out


def test_a_module_that_is_shown_whole_sequences_gets_a_report() -> None:
    report = verify(CausalDecoder(), make_batches(24, steps=1)[0])
    assert report.exact
    assert (report.size, report.leaks) == (2, [])
    assert {x.name for x in report.gradients} >= {"embed.weight", "positions.weight"}


def test_what_cannot_be_compared_is_said() -> None:
    class Images(Right):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Linear(WIDTH, VOCAB)

    with pytest.raises(ValueError, match="sequence_dims"):
        verify(Images(), {"pixels": torch.rand(2, 3, 8, 8)})
    with pytest.raises(ValueError, match="sequence_parallel_size=1"):
        verify(Images(), make_batch(), sequence_parallel_size=1)
