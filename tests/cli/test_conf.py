"""Every choice of every configuration group composes, and what it names can be made."""

import hydra
import pytest
import torch
from omegaconf import OmegaConf

from lightning_lss import LSSTransformer
from lightning_lss.cli.plan import of_data
from lightning_lss.nn.recompute import calls_of
from lightning_lss.parallel.segment_local import count_parameters
from tests.cli.composing import CHOICES, composed

BASES = [
    choice for choice in CHOICES if choice.endswith("=default") and choice.split("=")[0] not in ("callbacks", "trainer")
]


@pytest.mark.parametrize("choice", [choice for choice in CHOICES if choice not in BASES])
def test_choices_compose(choice) -> None:
    cfg = composed(choice, *(f"{key}=unused" for key in sorted(OmegaConf.missing_keys(composed(choice)))))
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


@pytest.mark.parametrize("base", BASES)
def test_bases_leave_open_what_only_a_choice_can_say(base) -> None:
    assert OmegaConf.missing_keys(composed(base))


# parameters without positional tables, by hand from the sizes: 12 E^2 a layer with GELU, and the embeddings
@pytest.mark.parametrize(
    ("model", "millions"),
    [("tiny", 0.46), ("enwik8-small", 19.0), ("gpt2-small", 85.1), ("1b", 0.98e3), ("8b", 6.98e3)],
)
def test_models_have_the_sizes_they_claim(model, millions) -> None:
    cfg = composed(f"model={model}", "model.positions=rotary")
    with torch.device("meta"):
        module = hydra.utils.instantiate(cfg.model, vocab_size=256, bytes_per_token=1.0, _convert_="all")
    assert count_parameters(module) / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize("choice", [choice for choice in CHOICES if choice.startswith(("strategy=", "callbacks="))])
def test_strategies_and_callbacks_can_be_made(choice) -> None:
    cfg = composed(choice)
    assert hydra.utils.instantiate(cfg.strategy) is not None
    assert all(hydra.utils.instantiate(callback) for callback in cfg.callbacks.values())


def test_what_people_change_reaches_what_it_is_for() -> None:
    cfg = composed("seq_len=512", "devices=4", "sequence_parallel_size=2", "seed=5")
    assert cfg.model.seq_len == cfg.data.seq_len == 512
    assert cfg.trainer.devices == 4
    assert cfg.strategy.sequence_parallel_size == 2
    assert composed("strategy=single").trainer.devices == 1


def test_the_strategies_memory_options_are_keys() -> None:
    words = ["activation_checkpointing=full", "checkpointed_modules=[model.blocks]", "mlp_tiles=2"]
    cfg = composed("strategy=lss_fsdp", *(f"strategy.{word}" for word in words))
    module = LSSTransformer(width=16, num_layers=2, num_heads=2)
    hydra.utils.instantiate(cfg.strategy, _convert_="all")._memory.apply(module)
    blocks = list(module.model.blocks)
    assert [calls_of(block).checkpointing for block in blocks] == ["full"] * 2
    assert [calls_of(block.mlp).tiles for block in blocks] == [2, 2]


def test_a_plan_knows_the_vocabulary_of_every_data(tmp_path) -> None:
    (tmp_path / "x.fa").write_text(">a\nACGT")
    assert of_data(composed(), "vocab_size") == 256
    assert of_data(composed("data=recall", "data.vocab_size=9"), "vocab_size") == 9
    fasta = composed("data=fasta", f"data.path={tmp_path}", "data.alphabet=ACGUN", "data.cache_dir=nowhere")
    assert (of_data(fasta, "vocab_size"), of_data(fasta, "bytes_per_token")) == (6, 1.0)


def test_megatron_brings_its_own_model_with_the_sizes_of_the_one_that_is_chosen() -> None:
    cfg = composed("strategy=megatron", "model=8b")
    assert cfg.model._target_ == "lightning_lss.megatron.MegatronTransformer"
    assert cfg.model.width == 4096


def test_hardware_is_composed_only_where_it_is_asked_for() -> None:
    assert "hardware" not in composed()
    assert composed("mode=plan", "hardware=h100").hardware.name == "H100"


def test_a_large_model_takes_nothing_from_the_laptops() -> None:
    tiny, large = (composed(f"model={model}").model for model in ("tiny", "8b"))
    assert (tiny.lr, tiny.warmup_steps) == (3e-3, 20)
    assert (large.lr, large.warmup_steps) == (3e-4, 2000)
