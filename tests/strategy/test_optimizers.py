"""Optimizers that copy or mix rows of parameters: refused where that is known, and what happens where it is not."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import post_localSGD_hook as post_local_sgd
from torch.distributed.optim import ZeroRedundancyOptimizer

from lightning_lss.testing.compare import assert_equal, assert_equal_on_ranks, worst_difference
from lightning_lss.testing.world import WorkerError, World
from tests.training import TABLE, Run, SGDTransformer, fit


class ZeroTransformer(SGDTransformer):
    def configure_optimizers(self) -> Any:
        return ZeroRedundancyOptimizer(self.parameters(), torch.optim.SGD, lr=0.1)


def post_local(rank: int, run: Run) -> dict[str, Tensor]:
    state = post_local_sgd.PostLocalSGDState(process_group=None, subgroup=None, start_localSGD_iter=1)
    hook = {"ddp_comm_state": state, "ddp_comm_hook": post_local_sgd.post_localSGD_hook, "model_averaging_period": 2}
    run.strategy = {**run.strategy, **hook}
    return fit(rank, run)


@pytest.mark.parametrize(
    ("function", "module", "what"),
    [
        (fit, ZeroTransformer, "ZeroRedundancyOptimizer"),
        (post_local, SGDTransformer, r"post-local SGD \(model_averaging_period\)"),
    ],
)
def test_optimizers_that_copy_parameters_between_ranks_are_refused(world: World, function, module, what) -> None:
    words = f"{what} copies parameters between ranks, but 1 parameters .*Use an ordinary optimizer, or RotaryEmbedding"
    with pytest.raises(WorkerError, match=words):
        world.run(2, function, Run(size=2, module=module))


class Trusting(torch.optim.SGD):
    """The core of LAMB: the step of a parameter is scaled by its norm and that of its gradient, both of all rows."""

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        with torch.no_grad():
            for x in self.param_groups[0]["params"]:
                x -= 0.1 * x.grad * x.norm() / x.grad.norm().clamp(min=1e-6)
        return loss


class TrustingTransformer(SGDTransformer):
    def configure_optimizers(self) -> Any:
        return Trusting(self.parameters(), lr=0.1)


def test_an_optimizer_that_mixes_rows_is_not_that_of_one_device_on_learned_positions(world: World) -> None:
    """Nothing tells what an optimizer does with the rows of a parameter, and a rank has only its own."""
    for positions in ("rotary", "learned"):
        run: dict[str, Any] = {"module": TrustingTransformer, "model": {"positions": positions}, "steps": 1}
        run["trainer"] = {"precision": "64-true"}
        expected, states = world.run(1, fit, Run(**run))[0], world.run(2, fit, Run(size=2, **run))
        if positions == "learned":
            assert worst_difference([states[0].pop(TABLE)], [expected[TABLE]]).error > 1e-3
            assert_equal(states[0], {name: x for name, x in expected.items() if name != TABLE}, 1e-10)
        else:
            assert_equal_on_ranks(states, expected, 1e-10)
