"""`model=huggingface`: a checkpoint folder with its tokenizer, fine-tuned on text, and what is written of it."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from hydra.errors import InstantiationException

from lightning_lss.cli.run import make_model, tokenized
from lightning_lss.models.huggingface import HuggingFaceLM
from lightning_lss.testing.compare import assert_equal
from tests.cli.composing import composed
from tests.processes import ROOT, python


def test_text_becomes_tokens_where_the_model_has_a_tokenizer(tmp_path) -> None:
    words = ["model=huggingface", f"model.path={tmp_path}", "data=text", "data.path=texts", "seq_len=64"]
    assert tokenized(composed(*words)).dtype == "uint8"
    (tmp_path / "tokenizer.json").touch()
    data = tokenized(composed(*words, "data.batch_size=3"))
    assert data._target_ == "lightning_lss.data.TokensDataModule"
    assert (data.tokenizer, data.path, data.seq_len, data.batch_size) == (str(tmp_path), "texts", 64, 3)
    assert data.splits == [0.9, 0.05, 0.05]
    assert not {"dtype", "vocab_size", "bytes_per_token"} & data.keys()
    numbers = composed(*words, "data.dtype=uint16", "data.vocab_size=9")
    assert tokenized(numbers) == numbers.data
    other = composed("data=text", "data.path=texts")
    assert tokenized(other) == other.data


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A small random model with a tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    example = runpy.run_path(str(ROOT / "examples/finetune_huggingface.py"))
    example["make_checkpoint"](folder, [ROOT / "examples/dna.py"])
    return folder


def train(checkpoint: Path, folder: Path, *overrides: str) -> str:
    model = ("model=huggingface", f"model.path={checkpoint}", "seq_len=128", f"hydra.run.dir={folder}")
    steps = ("trainer.max_steps=4", "trainer.val_check_interval=4", "trainer.limit_val_batches=2", "~logger")
    return python(ROOT / "train.py", *model, *steps, *overrides, cwd=folder.parent)


@pytest.mark.slow
def test_a_checkpoint_is_fine_tuned_on_text_and_loads(checkpoint, tmp_path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = ("data=text", f"data.path={ROOT / 'lightning_lss'}", "data.pattern=**/*.py", f"data.cache_dir={tmp_path}")
    output = train(checkpoint, tmp_path / "run", *text, "strategy=lss_fsdp", "model.lr=1e-3")
    assert "for from_pretrained" in output
    assert 0 < json.loads((tmp_path / "run/result.json").read_text())["val/bits_per_byte"] < 8
    tokens = AutoTokenizer.from_pretrained(tmp_path / "run/hf")("def f(x):", return_tensors="pt")["input_ids"]
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=False)
    module = HuggingFaceLM(**saved["hyper_parameters"])
    untrained = module(tokens)
    module.load_state_dict(saved["state_dict"])
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run/hf").eval()(tokens).logits
        assert_equal({"logits": loaded}, {"logits": module.eval()(tokens)}, 1e-6)
    assert (loaded - untrained).abs().max() > 1e-2


def test_bytes_are_refused_with_the_remedy(checkpoint) -> None:
    cfg = composed("model=huggingface", f"model.path={checkpoint}", "seq_len=128")
    with pytest.raises(InstantiationException) as error:
        make_model(cfg, {"vocab_size": 256, "bytes_per_token": 1.0}.__getitem__)
    remedy = f"add data=tokens data.tokenizer={checkpoint} data.path=<your text>."
    assert str(error.value.__cause__).endswith(remedy)  # what the command line prints
