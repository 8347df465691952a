"""Small tokenizers, trained here."""

import json
from pathlib import Path
from typing import Any

END = "<|end|>"
TEXTS = [
    "def step(model, batch):\n    loss = model(batch)\n\n    return loss\n\n\n",
    "The sequence is longer than one device holds.\nSo each holds a part of it.\n",
    "  été, naïve façade — 日本語\n\tover and over and over again \n",
]


def train(folder: Path, vocab_size: int = 600, **settings: Any) -> Path:
    """Train a byte-level BPE, as GPT-2's, and save it to ``folder`` with ``settings`` as its tokenizer_config.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS * 20,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END, "<pad>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    # what a checkpoint's tokenizer may also do, and must not do here
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    tokenizer.enable_truncation(max_length=8)
    tokenizer.enable_padding(pad_id=1, pad_token="<pad>")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
