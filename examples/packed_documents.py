"""Train on packed documents: many share a sequence, and none sees another.

Run: python examples/packed_documents.py
"""

import sysconfig
from dataclasses import replace
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader

from lightning_lss import AttentionMask, LSSTransformer, SequenceShard, sequence_shard


def pack(documents, length):
    """Put documents one after the other, and cut that into sequences."""
    tokens = torch.cat(documents)
    ids = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor([len(x) for x in documents]))
    targets = torch.where(ids == ids.roll(-1), tokens.roll(-1), -100)  # after its last token a document has no target
    columns = {"inputs": tokens, "targets": targets, "ids": ids}
    return [{name: x[i : i + length] for name, x in columns.items()} for i in range(0, len(ids) - length + 1, length)]


def collate(samples):
    """Make a batch and its mask, of whole sequences; the strategy hands the mask to every rank as it is."""
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    batch["mask"] = AttentionMask.documents(batch.pop("ids")) & AttentionMask.causal()
    return batch


class PrintEvenness(L.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        shard = sequence_shard(module)  # with the layout of this batch
        zigzag = SequenceShard(0, shard.size, "zigzag")
        if trainer.is_global_zero:
            print(
                f"step {trainer.global_step}: loss {outputs['loss']:.3f}; busiest rank / mean: {busiest(batch, shard):.2f}"
                f" ({shard.layout}), with zigzag {busiest(batch, zigzag):.2f}"
            )


def busiest(batch, shard):
    mask = batch["mask"]
    pairs = [mask.plan(mask.num_queries, replace(shard, rank=rank)).pairs for rank in range(shard.size)]
    return max(pairs) * len(pairs) / sum(pairs)


if __name__ == "__main__":
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("a*.py"))  # each paragraph is a document
    texts = [text for file in files for text in file.read_bytes().split(b"\n\n") if text]
    samples = pack([torch.tensor(list(text)) for text in texts], length=2048)
    model = LSSTransformer(width=64, num_layers=2, positions="rotary", lr=3e-3, warmup_steps=10)
    options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = L.Trainer(
        strategy="lss", accelerator="cpu", devices=2, max_steps=20, callbacks=[PrintEvenness()], **options
    )
    trainer.fit(model, DataLoader(samples, batch_size=2, shuffle=True, collate_fn=collate))
