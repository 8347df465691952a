"""Hugging Face models train the same on several devices as on one, with no line changed."""

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lss.integrations.huggingface import NAME
from lightning_lss.sequence.batch import map_tensors
from lightning_lss.testing.compare import assert_equal, assert_equal_on_ranks
from lightning_lss.testing.world import WorkerError, World
from tests.integrations.architectures import DECODERS, FineTuned, dtype_of, make_batches, make_model
from tests.training import as_it_is_trainer, whole_state

Prepare = list[str]
"""What is done to a model before it is trained: names of functions of this module."""


def checkpoint(module: FineTuned, alone: bool) -> None:
    if not alone:
        module.model.gradient_checkpointing_enable({"use_reentrant": False})


def checkpoint_reentrant(module: FineTuned, alone: bool) -> None:
    if not alone:
        module.model.gradient_checkpointing_enable({"use_reentrant": True})
        module.model.enable_input_require_grads()


def compile_model(module: FineTuned, alone: bool) -> None:
    if not alone:
        module.model.compile(backend="aot_eager")


def lora(module: FineTuned, alone: bool) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, init_lora_weights=False)
    torch.manual_seed(3)
    module.model = get_peft_model(module.model, config)


def eager(module: FineTuned, alone: bool) -> None:
    module.model.set_attn_implementation("eager")


def prepared(name: str, prepare: Prepare, alone: bool) -> FineTuned:
    module = make_model(name)
    for function in prepare:
        globals()[function](module, alone)
    return module


def train_alone(name: str, how: str, length: int, prepare: Prepare) -> dict[str, Tensor]:
    module = prepared(name, prepare, alone=True).train()
    optimizer = module.configure_optimizers()
    for index, batch in enumerate(make_batches(name, how, length)):
        optimizer.zero_grad()
        module.training_step(batch, index).backward()
        optimizer.step()
    return {key: x.detach().clone() for key, x in module.state_dict().items()}


def train(
    rank: int, name: str, how: str, length: int, size: int, layout: str, options: dict[str, Any], prepare: Prepare
) -> dict[str, Tensor]:
    warnings.simplefilter("ignore")
    trainer, module = as_it_is_trainer(rank, size, layout, **options), prepared(name, prepare, alone=False)
    before = module.model.config._attn_implementation
    own = slice(rank // size, None, dist.get_world_size() // size)
    batches = [map_tensors(batch, lambda path, x: x[own].contiguous()) for batch in make_batches(name, how, length)]
    trainer.fit(module, DataLoader(batches, batch_size=None))
    report = trainer.strategy.verification  # type: ignore[attr-defined]
    assert report is not None
    assert report.exact, report
    assert module.model.config._attn_implementation == before != NAME
    return {name.replace("_orig_mod.", ""): x for name, x in whole_state(module).items()}


def changes(trained: dict[str, Tensor], start: dict[str, Tensor]) -> dict[str, Tensor]:
    """By how much training has changed each weight; a small error of a weight may be a large one of its update."""
    return {name: x - start[name] for name, x in trained.items() if x.is_floating_point()}


def check(
    world: World,
    name: str,
    how: str,
    length: int,
    grid: tuple[int, int],
    layout: str,
    options: dict[str, Any] | None = None,
    prepare: Prepare | None = None,
) -> None:
    ranks, size = grid
    trained = world.run(ranks, train, name, how, length, size, layout, options or {}, prepare or [], timeout=120)
    start = {key: x.detach() for key, x in prepared(name, prepare or [], alone=True).state_dict().items()}
    expected = changes(train_alone(name, how, length, prepare or []), start)
    single = dtype_of(name) == torch.float32
    for rank, state in enumerate(trained):
        tolerance, floor = (1e-4, 1e-3) if single else (1e-6, 1e-6)
        assert_equal(changes(state, start), expected, tolerance, floor=floor, what=f"rank {rank}")


# pairwise: an architecture, its batches, their length, (W, S), layout
DECODER_CASES = [
    (
        name,
        how,
        16 - index % 2 * (how == "plain"),
        [(2, 2), (4, 2)][(index + place) % 2],
        ["zigzag", "contiguous"][place % 2],
    )
    for index, name in enumerate(DECODERS)
    for place, how in enumerate(("plain", "padded", "packed"))
]


@pytest.mark.parametrize(("name", "how", "length", "grid", "layout"), DECODER_CASES)
def test_a_decoder(world: World, name: str, how: str, length: int, grid: tuple[int, int], layout: str) -> None:
    if name == "gemma2" and how == "padded":  # its attention is eager, see below
        how = "padded on the right"
    check(world, name, how, length, grid, layout)


def test_rows_that_see_nothing_in_eager_attention_are_refused(world: World) -> None:
    """They are averages of all values, and the last of them predicts the first token: its label counts."""
    with pytest.raises(WorkerError, match=r"padding on the left under Hugging Face's attn_implementation='eager'"):
        world.run(2, train, "gemma2", "padded", 16, 2, "zigzag", {}, [])


OTHER_CASES = [
    ("bert", "plain", 16, (4, 2), "zigzag"),
    ("bert", "padded", 15, (2, 2), "contiguous"),
    ("bert_classifier", "padded", 16, (4, 2), "contiguous"),
    ("modernbert", "plain", 15, (2, 2), "zigzag"),
    ("modernbert", "padded", 16, (4, 2), "contiguous"),
    ("t5", "padded", 16, (2, 2), "zigzag"),
    ("t5", "plain", 16, (4, 2), "contiguous"),
    ("vit", "plain", 0, (4, 2), "zigzag"),
    ("vit", "plain", 0, (2, 2), "contiguous"),
    ("whisper", "plain", 0, (2, 2), "zigzag"),
    ("whisper", "plain", 0, (4, 2), "contiguous"),
]


@pytest.mark.parametrize(("name", "how", "length", "grid", "layout"), OTHER_CASES)
def test_other_models(world: World, name: str, how: str, length: int, grid: tuple[int, int], layout: str) -> None:
    check(world, name, how, length, grid, layout)


WAYS: list[tuple[str, str, dict[str, Any], Prepare]] = [
    ("llama", "padded", {"sharding": "fsdp"}, ["checkpoint"]),
    ("llama", "packed", {}, ["checkpoint_reentrant"]),
    ("llama", "plain", {}, ["compile_model"]),
    ("llama", "padded", {}, ["lora"]),
    ("qwen3", "plain", {}, ["eager"]),
    ("gpt2", "plain", {"sharding": "fsdp"}, []),
    ("mistral", "packed", {"activation_checkpointing": "selective"}, []),
    ("mistral", "flattened", {}, []),
]


@pytest.mark.parametrize(("name", "how", "options", "prepare"), WAYS)
def test_ways_to_train(world: World, name: str, how: str, options: dict[str, Any], prepare: Prepare) -> None:
    check(world, name, how, 16, (2, 2), "zigzag", options, prepare)


def predict(rank: int, name: str, length: int) -> list[Tensor]:
    trainer, module = as_it_is_trainer(rank, 2, "zigzag"), make_model(name)
    batches = make_batches(name, "padded", length)
    return [x.double() for x in trainer.predict(module, DataLoader(batches, batch_size=None))]  # type: ignore[union-attr]


def test_predictions_are_whole(world: World) -> None:
    module = make_model("llama").eval()
    with torch.no_grad():
        expected = [module.predict_step(batch, 0) for batch in make_batches("llama", "padded", 13)]
    assert_equal_on_ranks(world.run(2, predict, "llama", 13), expected, 1e-10)


def forward_with(rank: int) -> str:
    trainer, module = as_it_is_trainer(rank, 2, "zigzag"), make_model("llama")
    layer = module.model.model.layers[0].self_attn
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: forward(*args, **kwargs, head_bias=torch.ones(1))
    try:
        trainer.fit(module, DataLoader(make_batches("llama", "plain"), batch_size=None))
    except Exception as error:
        return str(error)
    return ""


def test_an_unknown_argument_is_refused_by_name(world: World) -> None:
    for message in world.run(2, forward_with):
        assert "LlamaAttention passes 'head_bias' to its attention" in message
        assert "Load the model with attn_implementation='eager'" in message
