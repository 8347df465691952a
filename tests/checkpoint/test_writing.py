"""Writing a checkpoint: left-overs of a crash, background writers, failures, several optimizers."""

from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import Tensor, nn

from lightning_lss.checkpoint.file import AtomicCheckpointIO, FileCheckpoints
from lightning_lss.checkpoint.folder import is_folder, load_folder, save_folder
from lightning_lss.checkpoint.state import Owners
from lightning_lss.testing.compare import assert_equal, assert_equal_on_ranks
from tests.training import Run, SGDTransformer, epochs, fit, make_loader, make_module, make_samples, make_trainer


def save_after_a_crash(rank: int, run: Run, path: str, where: str) -> tuple[list[str], bool]:
    """Names that lie there after a crash at ``where`` while a checkpoint is replaced, and whether the next save works."""
    module, trainer = make_module(run), make_trainer(rank, run)
    trainer.fit(module, make_loader(trainer, make_samples(8), 2))
    trainer.save_checkpoint(path)
    patches = [
        patch(where, side_effect=OSError("the machine goes down")),
        *(patch(name) for name in ("shutil.rmtree", "pathlib.Path.unlink") if name != where),  # no time to clean up
        patch.object(trainer.strategy, "barrier"),
    ]
    with suppress(OSError), ExitStack() as stack:
        for crash in patches:
            stack.enter_context(crash)
        trainer.save_checkpoint(path)
    trainer.strategy.barrier()
    left = [x.name for x in Path(path).parent.iterdir()]
    trainer.strategy.barrier()
    trainer.save_checkpoint(path)
    return left, is_folder(path) if run.strategy["save_distributed_checkpoint"] else Path(path).is_file()


@pytest.mark.parametrize(
    ("distributed", "where"), [(False, "os.replace"), (True, "os.replace"), (True, "shutil.rmtree")]
)
def test_what_a_crash_leaves_does_not_block_the_next_save(world, tmp_path, distributed, where) -> None:
    path = tmp_path / "saved.ckpt"
    run = Run(size=2, steps=1, strategy={"save_distributed_checkpoint": distributed})
    for left, written in world.run(2, save_after_a_crash, run, str(path), where):
        assert len(left) == 2
        assert path.name in left
        assert written


def save_in_the_background(rank: int, run: Run, path: str) -> tuple[bool, dict[str, Tensor]]:
    module, trainer = make_module(run), make_trainer(rank, run, plugins=[AsyncCheckpointIO()])
    trainer.fit(module, make_loader(trainer, make_samples(8), 2))
    atomic = isinstance(trainer.strategy.checkpoint_io.checkpoint_io, AtomicCheckpointIO)
    state = trainer.strategy.lightning_module_state_dict()
    trainer.save_checkpoint(path)
    trainer.strategy.checkpoint_io.teardown()
    return atomic, state


def test_a_background_writer_writes_atomically(world, tmp_path) -> None:
    path = tmp_path / "saved.ckpt"
    for atomic, state in world.run(2, save_in_the_background, Run(size=2, steps=1), str(path)):
        assert atomic
        assert_equal(torch.load(path, weights_only=False)["state_dict"], state, 0)
    assert list(tmp_path.iterdir()) == [path]


class TwoOptimizers(SGDTransformer):
    """Adam in turn for the table, among others, and for the rest, each with moments of its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        second = [self.model.positions.weight, self.model.norm.weight]
        first = [x for x in self.parameters() if all(x is not other for other in second)]
        return [torch.optim.AdamW(part, lr=0.05, eps=1e-2) for part in (first, second)]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("sharding", [None, "fsdp"])
def test_the_moments_of_every_optimizer_are_resumed(world, tmp_path, sharding, distributed) -> None:
    saved = str(tmp_path / "saved.ckpt")
    unbroken = world.run(1, fit, epochs(2, module=TwoOptimizers))[0]
    options = {"sharding": sharding, "save_distributed_checkpoint": distributed}
    world.run(4, fit, epochs(1, size=2, module=TwoOptimizers, save=saved, strategy=options))
    for size, layout in ((2, "zigzag"), (4, "contiguous")):
        run = epochs(2, size=size, layout=layout, module=TwoOptimizers, resume=saved, strategy=options)
        assert_equal_on_ranks(world.run(4, fit, run), unbroken, 1e-5)


def save_and_load(rank: int, folder: Path) -> Any:
    checkpoint = {"state_dict": {"x": torch.ones(2)}, "callbacks": {"mine": {"seen": Counter(a=2)}}}
    owners = Owners(nn.Linear(1, 1))
    save_folder(checkpoint, folder, owners)
    dist.barrier()  # rank 0 renames the folder last
    assert "optimizer_states" not in load_folder(folder, owners, weights_only=False)  # as in a file of weights only
    return load_folder(folder, weights_only=False)["callbacks"]["mine"]["seen"]


def test_containers_of_a_folder_keep_their_types(world, tmp_path) -> None:
    assert world.run(2, save_and_load, tmp_path / "a.ckpt") == [Counter(a=2)] * 2
    assert type(world.run(1, save_and_load, tmp_path / "b.ckpt")[0]) is Counter


def test_an_optimizer_may_have_its_state_on_rank_zero_only() -> None:
    # as ZeroRedundancyOptimizer has
    module = nn.Linear(2, 2)
    owners = Owners(module, [torch.optim.SGD(module.parameters())])
    assert FileCheckpoints(lambda tensor: tensor).collect({}, owners, ("optimizer_states", 0)) == {}
