"""Fine-tune a Hugging Face model on sequences that are split over two devices, and load what it has become on one.

Run: pip install "lightning-lss[hf]" && python examples/finetune_huggingface.py
"""

import sysconfig
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from tokenizers import ByteLevelBPETokenizer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lightning_lss  # noqa: F401  # registers strategy="lss"

START, END = Path("checkpoint"), Path("finetuned")  # folders of save_pretrained


class FineTune(L.LightningModule):
    def __init__(self, folder):
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(folder).train()

    def training_step(self, batch, batch_idx):
        return self.model(**batch, labels=batch["input_ids"]).loss

    def predict_step(self, batch, batch_idx):
        return self.model(**batch).logits

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


@rank_zero_only
def make_checkpoint(folder, files):
    """Save a small random model and a tokenizer, which stand for a checkpoint of yours."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train([str(file) for file in files], vocab_size=512, show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer).save_pretrained(folder)
    sizes = dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=2048, **sizes)).save_pretrained(folder)


def make_samples(folder, files, length):
    """Cut the tokens of the files into sequences."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = torch.tensor([token for file in files for token in tokenizer(file.read_text("utf-8"))["input_ids"]])
    return [{"input_ids": x} for x in tokens.split(length) if len(x) == length]


if __name__ == "__main__":
    L.seed_everything(1, verbose=False)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("a*.py"))
    make_checkpoint(START, files)
    samples, model = make_samples(START, files, length=2048), FineTune(START)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = L.Trainer(strategy="lss", accelerator="cpu", devices=2, max_steps=30, **quiet)
    trainer.fit(model, DataLoader(samples[1:], batch_size=2, shuffle=True))
    split = trainer.predict(model, DataLoader(samples[:1]))[0]  # by both devices
    if trainer.is_global_zero:
        model.model.save_pretrained(END)
        AutoTokenizer.from_pretrained(START).save_pretrained(END)
        table = Table("checkpoint", "loss", title="Loaded on one device")
        tokens = samples[0]["input_ids"][None]
        for folder in (START, END):
            with torch.no_grad():
                output = AutoModelForCausalLM.from_pretrained(folder)(input_ids=tokens, labels=tokens)
            table.add_row(str(folder), f"{output.loss:.3f}")
        torch.testing.assert_close(output.logits, split, rtol=1e-4, atol=1e-4)
        Console().print(table)
        print(f"The logits of {END} are those of the training on two devices.")
