"""Activation checkpointing and tiles that the strategy applies to a user's own blocks."""

import copy
import pickle
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from lightning_lss import LSSAttention, LSSStrategy, LSSTransformer, RotaryEmbedding, lss_attention, token_mean
from lightning_lss.attention.kernels import KERNELS
from lightning_lss.nn import recompute
from lightning_lss.nn.recompute import Calls, apply_checkpointing, apply_tiles, calls_of, named_blocks, repeated_blocks
from lightning_lss.parallel.fsdp import units_of
from lightning_lss.strategy.memory import MemoryOptions
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
    changed = [x for x in module.modules() if calls_of(x) != Calls()]
    return calls.count(run.steps - 1), len(changed)


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
        assert calls_of(other.blocks[0]) == Calls("full")
        assert calls_of(other.blocks[0].mlp) == Calls(tiles=2)
        with torch.no_grad():
            other.blocks[0].mlp.out.weight.zero_()
        assert torch.equal(model(tokens), model(tokens))
        assert not torch.equal(other(tokens), model(tokens))


def test_naming_some_blocks_leaves_the_others_what_they_were() -> None:
    module, options = UsersModule(11, 16, 4), MemoryOptions("selective", ["layers.0"])
    options.apply(module)
    assert units_of(module) == list(module.layers)  # FSDP still finds them
    options.reset()
    assert repeated_blocks(module) == list(module.layers)


def test_a_pattern_stands_for_the_outermost_modules_that_it_matches() -> None:
    module = UsersModule(11, 16, 4)
    assert named_blocks(module, ["layers.*"]) == list(module.layers)


def test_tiles_refuse_what_would_be_another_training() -> None:
    with pytest.raises(ValueError, match="batch normalization"):
        apply_tiles([nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))], 2)
    linear = nn.Linear(4, 4)
    apply_tiles([linear], 2)
    for call in (lambda: linear(torch.zeros(2, 4)), lambda: linear(input=torch.zeros(1, 2, 4))):
        with pytest.raises(ValueError, match=r"first argument must\b.*\[B, l, E\], given by position"):
            call()


def test_offload_takes_inputs_that_are_given_by_name(monkeypatch) -> None:
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, *, x: Tensor, debug: bool) -> Tensor:  # torch's checkpoint has an argument of that name
            assert debug
            return self.linear(x)

    packed, block = [], ByName()
    monkeypatch.setattr(
        recompute, "save_on_cpu", lambda **_: saved_tensors_hooks(lambda x: packed.append(x.shape) or x, lambda x: x)
    )
    apply_checkpointing([block], "offload")
    block(x=torch.zeros(2, 3, 4, requires_grad=True), debug=True).sum().backward()
    assert torch.Size([2, 3, 4]) in packed


class OwnNames(nn.Module):
    """A block with attributes and methods that anyone could choose, which hands something on through a list."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.checkpointing, self.tiles, self.own_class = True, 7, "mine"

    def _offload(self) -> float:
        return 0.5

    def forward(self, x: Tensor, losses: list[Tensor]) -> Tensor:
        losses.append(x.square().mean())
        return self.linear(x) * self.tiles * self._offload()


@pytest.mark.parametrize("how", ["full", "selective", "offload"])
def test_a_block_keeps_its_own_names_and_the_containers_it_is_given(how) -> None:
    block, x = OwnNames(), torch.ones(2, 3, 4, requires_grad=True)
    expected = block(x, [])
    options = MemoryOptions(how, ["0"])
    options.apply(nn.Sequential(block))
    losses: list[Tensor] = []
    out = block(x, losses)
    assert torch.equal(out, expected)
    assert len(losses) == 1  # autograd reaches the block's input through it
    assert (block.checkpointing, block.tiles, block.own_class) == (True, 7, "mine")
    options.reset()
    assert (block.checkpointing, block.tiles, block.own_class) == (True, 7, "mine")
