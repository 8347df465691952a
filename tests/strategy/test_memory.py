"""Activation checkpointing and tiles that the strategy applies to a user's own blocks."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lss import LSSAttention, LSSStrategy, LSSTransformer, RotaryEmbedding, lss_attention, token_mean
from lightning_lss.attention.kernels import KERNELS
from lightning_lss.nn.recompute import Recomputed
from lightning_lss.testing.compare import assert_equal_on_ranks
from lightning_lss.testing.world import WorkerError
from tests.training import Run, fit, make_loader, make_module, make_samples, make_trainer

LAYERS = 3
FLOAT64 = {"precision": "64-true", "gradient_clip_val": 0.3}


class UsersBlock(nn.Module):
    """A layer with names of its own, called with a keyword argument."""

    def __init__(self, width: int, heads: int, functional: bool) -> None:
        super().__init__()
        self.heads, self.functional = heads, functional
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.mixer = LSSAttention(causal=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, *, rotary: RotaryEmbedding) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotary(q), rotary(k)
        y = lss_attention(q, k, v, self.mixer.shard) if self.functional else self.mixer(q, k, v)
        x = x + y.transpose(1, 2).flatten(2)
        return x + self.mlp(x)


class UsersModule(pl.LightningModule):
    def __init__(self, vocab_size: int, width: int, num_heads: int, functional: bool = False, **_: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.rotary = RotaryEmbedding(width // num_heads)
        self.layers = nn.ModuleList(UsersBlock(width, num_heads, functional) for _ in range(LAYERS))
        self.out = nn.Linear(width, vocab_size)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        x = self.embedding(batch["inputs"])
        for layer in self.layers:
            x = layer(x, rotary=self.rotary)
        targets = batch["targets"].flatten()
        loss = F.cross_entropy(self.out(x).flatten(0, 1), targets, reduction="sum")
        return token_mean(loss, (targets >= 0).sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


def users_run(size: int = 1, model: dict[str, Any] | None = None, **strategy: Any) -> Run:
    return Run(size=size, module=UsersModule, model=model or {}, trainer=FLOAT64, strategy=strategy)


@pytest.fixture(scope="module")
def reference(world) -> dict[str, Tensor]:
    return world.run(1, fit, users_run())[0]


@pytest.mark.parametrize(
    ("options", "model"),
    [
        ({"activation_checkpointing": "full"}, {}),
        ({"activation_checkpointing": "selective"}, {}),
        ({"activation_checkpointing": "selective"}, {"functional": True}),
        ({"activation_checkpointing": "selective", "checkpointed_modules": ["layers"], "mlp_tiles": 3}, {}),
        ({"activation_checkpointing": "offload", "checkpointed_modules": ["layers.[02]"]}, {}),
        ({"mlp_tiles": 4, "tiled_modules": ["layers.*.mlp"]}, {}),
        ({"activation_checkpointing": "selective", "mlp_tiles": 2, "sharding": "fsdp"}, {}),
        ({"activation_checkpointing": "full", "sharding": "hybrid"}, {}),
    ],
)
def test_the_training_is_the_same(world, reference, options, model) -> None:
    world_size = 4 if options.get("sharding") == "hybrid" else 2
    states = world.run(world_size, fit, users_run(2, model, **options))
    assert_equal_on_ranks(states, reference, 1e-10)


def count_kernels(rank: int, run: Run) -> tuple[int, int]:
    """Calls of the kernel in the last step, and modules that are called in another way after the run."""
    calls, kernel = [], KERNELS["cpu_flash"]

    def forward(*args: Any) -> Any:
        calls.append(trainer.global_step)
        return kernel.forward(*args)

    KERNELS["cpu_flash"] = kernel._replace(forward=forward)
    try:
        module, trainer = make_module(run), make_trainer(rank, run)
        trainer.fit(module, make_loader(trainer, make_samples(run.samples), run.global_batch))
    finally:
        KERNELS["cpu_flash"] = kernel
    changed = [x for x in module.modules() if isinstance(x, Recomputed) and (x.checkpointing != "none" or x.tiles > 1)]
    return calls.count(run.steps - 1), len(changed) + sum(getattr(x, "as_operator", False) for x in module.modules())


def test_selective_runs_the_kernel_of_a_users_block_once(world) -> None:
    tiles = {0: 1, 1: 2}  # of a contiguous rank's layer
    for how, times in ((None, 1), ("selective", 1), ("full", 2)):
        run = users_run(2, activation_checkpointing=how)
        run.layout = "contiguous"
        counts = world.run(2, count_kernels, run)
        assert counts == [(times * LAYERS * tiles[rank], 0) for rank in range(2)], how


@pytest.mark.parametrize(
    ("module", "options", "words"),
    [
        (
            UsersModule,
            {"activation_checkpointing": "full", "checkpointed_modules": ["blocks"]},
            "no submodule 'blocks'.*'layers'",
        ),
        (UsersModule, {"mlp_tiles": 2, "tiled_modules": ["ffn"]}, "tiled_modules: UsersModule has no submodule 'ffn'"),
    ],
)
def test_names_that_do_not_exist_are_refused(world, module, options, words) -> None:
    run = users_run(2, **options)
    run.module = module
    with pytest.raises(WorkerError, match=f"MisconfigurationException.*{words}"):
        world.run(2, fit, run)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"activation_checkpointing": "some"}, "activation_checkpointing='some' is unknown"),
        ({"checkpointed_modules": ["layers"]}, "has no effect without activation_checkpointing"),
        ({"tiled_modules": ["mlp"]}, "has no effect with mlp_tiles=1"),
        ({"mlp_tiles": 0}, "mlp_tiles=0 must be a positive integer"),
    ],
)
def test_bad_options_are_refused_at_once(options, words) -> None:
    with pytest.raises(ValueError, match=words):
        LSSStrategy(**options)


def test_changed_modules_can_be_copied_and_pickled() -> None:
    model = LSSTransformer(width=16, num_heads=2, num_layers=2, activation_checkpointing="full", mlp_tiles=2).model
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other.blocks[0]) is type(model.blocks[0])
        assert other.blocks[0].checkpointing == "full"
        assert other.blocks[0].mlp.tiles == 2
        with torch.no_grad():
            other.blocks[0].mlp.out.weight.zero_()
        assert torch.equal(model(tokens), model(tokens))
        assert not torch.equal(other(tokens), model(tokens))
