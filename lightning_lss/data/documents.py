"""Tokens of documents on disk: written once, then read as sequences, packed or not."""

import json
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from lightning_lss.attention.masks import AttentionMask
from lightning_lss.data.sequences import Sample, TokenFiles, WindowDataset
from lightning_lss.nn.loss import IGNORED


class Piece(NamedTuple):
    """Tokens of a document, those after its last piece's."""

    ids: Sequence[int]
    num_bytes: int  # of its text
    is_last: bool  # of its document


class Documents:
    """Documents in a folder that :meth:`write` filled: ``tokens``, one document after the other, and where each ends.

    The tokens are memory-mapped when read. The object is small, so it can be sent to the workers of a DataLoader.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        about = json.loads((folder / "about.json").read_text())
        self.tokens = TokenFiles([folder / "tokens"], about["dtype"])
        self.bytes_per_token: float = about["num_bytes"] / len(self.tokens)

    @staticmethod
    def write(folder: Path, pieces: Iterable[Piece], vocab_size: int) -> None:
        """Write documents to ``folder``.

        Raises ``ValueError`` if a token is not in [0, vocab_size), or there are no tokens.
        """
        dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
        stops, length, num_bytes = array("q"), 0, 0
        with (folder / "tokens").open("wb") as file:
            for piece in pieces:
                tokens = np.asarray(piece.ids, np.int64)
                if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
                    raise ValueError(
                        f"Document {len(stops)} has tokens from {tokens.min()} to {tokens.max()}, outside [0, {vocab_size})."
                        " Give the vocab_size or the tokenizer that it was made with."
                    )
                tokens.astype(dtype).tofile(file)
                length += len(tokens)
                num_bytes += piece.num_bytes
                if piece.is_last:
                    stops.append(length)
        if not length:
            raise ValueError("The documents are empty: there is no token to learn from.")
        np.save(folder / "stops.npy", np.frombuffer(stops, np.int64))
        (folder / "about.json").write_text(json.dumps({"dtype": dtype, "num_bytes": num_bytes}))

    def of_tokens(self, start: int, stop: int) -> Tensor:
        """Return the number of the document of each token from ``start`` to ``stop`` (exclusive), int64 [stop - start]."""
        stops = np.load(self.folder / "stops.npy", mmap_mode="r")
        return torch.from_numpy(np.searchsorted(stops, np.arange(start, stop), side="right"))


class PackedDataset(WindowDataset):
    """Windows that also say which token is of which ``document``, int64 [L]; a document's last token has no target."""

    def __init__(self, documents: Documents, *args: Any, **options: Any) -> None:
        super().__init__(documents.tokens, *args, **options)
        self.documents = documents

    def sample(self, index: int) -> Sample:
        """Return a window."""
        sample = super().sample(index)
        start = self.span.start + index * self.seq_len
        ids = self.documents.of_tokens(start, start + self.seq_len + 1)
        targets = torch.where(ids[1:] == ids[:-1], sample["targets"], IGNORED)
        return {"inputs": sample["inputs"], "targets": targets, "documents": ids[:-1]}


def collate_packed(samples: list[Sample]) -> dict[str, Any]:
    """Make a batch of packed documents: ``mask``, causal and within documents, and ``position_ids``, int64 [B, L].

    Positions count from the start of a document, or of the part of it that is in the sequence.
    """
    batch: dict[str, Any] = default_collate(samples)
    ids = batch.pop("documents")  # [B, L]
    places = torch.arange(ids.size(1)).expand_as(ids)
    starts = ids.diff(dim=1, prepend=ids[:, :1] - 1) != 0
    batch["position_ids"] = places - torch.where(starts, places, 0).cummax(1).values
    batch["mask"] = AttentionMask.documents(ids) & AttentionMask.causal()
    return batch
