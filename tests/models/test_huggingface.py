"""A checkpoint folder of Hugging Face trains the same on several devices, and what is written loads on one."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_lss.callbacks import PretrainedWriter
from lightning_lss.models.huggingface import HuggingFaceLM
from lightning_lss.testing.compare import assert_equal
from tests.training import LENGTH, VOCAB, Run, make_loader, make_samples, make_trainer, whole_state

SIZES = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A small random model with tied weights, and a file of a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(2)
    config = LlamaConfig(vocab_size=VOCAB, max_position_embeddings=32, tie_word_embeddings=True, **SIZES)
    model = LlamaForCausalLM(config).double()
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "start")
    (tmp_path / "start/tokenizer_config.json").write_text('{"eos_token": "end"}')
    return tmp_path / "start"


class TrainedWithSGD(HuggingFaceLM):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


def fit(rank: int, run: Run, start: Path, end: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train and validate; return the weights and the metrics."""
    warnings.simplefilter("ignore")
    module = TrainedWithSGD(start, dtype="float64", vocab_size=VOCAB, bytes_per_token=2.0, seq_len=LENGTH)
    trainer = make_trainer(rank, run, callbacks=[PretrainedWriter(end)])
    batch = run.global_batch * run.size // trainer.world_size
    trainer.fit(module, *(make_loader(trainer, make_samples(12), batch) for _ in range(2)))
    return whole_state(module), dict(trainer.callback_metrics)


@pytest.mark.parametrize(
    ("ranks", "run"),
    [(2, Run(2)), (4, Run(2, "contiguous")), (2, Run(2, strategy={"sharding": "fsdp"}))],
    ids=["S=2", "D=2,S=2", "fsdp"],
)
def test_it_trains_as_on_one_device_and_loads_there(world, folder, tmp_path, ranks, run) -> None:
    from transformers import AutoModelForCausalLM

    ((weights, metrics),) = world.run(1, fit, Run(), folder, tmp_path / "one")
    assert {"val/loss", "val/bits_per_byte", "train/loss"} <= metrics.keys()
    for other, other_metrics in world.run(ranks, fit, run, folder, tmp_path / "many"):
        assert_equal(other, weights, 1e-10)
        assert_equal(other_metrics, metrics, 1e-6)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "many")
    assert loaded.config._attn_implementation == "sdpa"
    assert loaded.generation_config.max_new_tokens == 7
    assert_equal({f"model.{key}": x for key, x in loaded.state_dict().items()}, weights, 1e-10)
    assert (tmp_path / "many/tokenizer_config.json").read_text() == '{"eos_token": "end"}'


def test_adapters_are_written_as_adapters(world, folder, tmp_path) -> None:
    from peft import PeftConfig

    world.run(2, fit_adapters, folder, tmp_path / "end")
    assert PeftConfig.from_pretrained(tmp_path / "end").r == 2
    assert not (tmp_path / "end/model.safetensors").exists()


def fit_adapters(rank: int, start: Path, end: Path) -> None:
    from peft import LoraConfig, get_peft_model

    warnings.simplefilter("ignore")
    module = TrainedWithSGD(start)
    module.model = get_peft_model(module.model, LoraConfig(r=2, target_modules=["q_proj"]))
    trainer = make_trainer(rank, Run(2, steps=1), callbacks=[PretrainedWriter(end)])
    trainer.fit(module, make_loader(trainer, make_samples(4), 2))


def test_packed_documents_do_not_see_each_other(folder) -> None:
    module = HuggingFaceLM(folder, dtype="float64").eval()
    tokens = torch.randint(VOCAB, (1, 8))
    places = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        together, alone = (
            module._logits({"inputs": tokens, "position_ids": places}),
            module._logits({"inputs": tokens[:, 3:]}),
        )
    torch.testing.assert_close(together[:, 3:], alone)
    with pytest.raises(ValueError, match=r"data\.packed=true"):
        module._logits({"inputs": tokens, "mask": None})


def test_matrices_decay_but_embeddings_do_not(folder) -> None:
    module = HuggingFaceLM(folder)
    decayed, others = (group["params"] for group in module.parameter_groups(0.1))
    names = {id(x): name for name, x in module.named_parameters()}
    assert {names[id(x)].split(".")[-2] for x in others} == {"embed_tokens", "norm"} | {
        f"{place}_layernorm" for place in ("input", "post_attention")
    }
    assert len(decayed) == 2 * 7
    assert module.training
    assert module.model.training


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"path": "nowhere"}, "give a folder that save_pretrained has written"),
        (
            {"vocab_size": 256},
            "The data are bytes, but {path} has a vocabulary of 11: add data=tokens data.tokenizer={path}",
        ),
        ({"vocab_size": 12}, "tokens of a vocabulary of 12"),
        (
            {"seq_len": 64},
            "use seq_len=32, or, if the model's positions are rotary, +model.config.max_position_embeddings=64",
        ),
        ({"config": {"atention_dropout": 0.1}}, "has no atention_dropout"),
    ],
)
def test_what_would_go_wrong_is_refused(folder, options, words) -> None:
    with pytest.raises(ValueError, match=r"\.$") as error:
        HuggingFaceLM(**{"path": folder, **options})
    assert words.format(path=folder) in str(error.value)


def test_a_loss_that_is_left_out_is_refused(folder) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"output_router_logits": True}))
    with pytest.raises(ValueError, match="balances its experts"):
        HuggingFaceLM(folder)
    HuggingFaceLM(folder, config={"output_router_logits": False})


def test_options_reach_the_model_and_the_checkpoint(folder) -> None:
    module = HuggingFaceLM(
        folder, seq_len=64, lr=1e-3, config={"max_position_embeddings": 64, "attention_dropout": 0.5}
    )
    assert module.model.config.attention_dropout == 0.5
    assert module.lr == 1e-3
    assert HuggingFaceLM(**module.hparams).model.config.max_position_embeddings == 64
    with pytest.raises(TypeError, match="does not take width"):
        HuggingFaceLM(folder, width=3)


def test_a_tokenizer_may_know_fewer_tokens_than_the_model(folder) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(folder / "tokenizer.json"))
    assert HuggingFaceLM(folder, vocab_size=2).hparams["vocab_size"] == 2
    HuggingFaceLM(folder, vocab_size=VOCAB)
    with pytest.raises(ValueError, match="data=tokens"):
        HuggingFaceLM(folder, vocab_size=256)


def test_the_missing_package_is_named(folder, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MisconfigurationException, match=r'pip install "lightning-lss\[hf\]"'):
        HuggingFaceLM(folder)
