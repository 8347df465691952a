"""DNA, RNA or proteins in FASTA files: a token for each letter, and no sequence across two records."""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_lss.data.cache import cache_folder, made_once
from lightning_lss.data.files import find_files, is_compressed, read_blocks
from lightning_lss.data.sequences import (
    Sample,
    SampleDataset,
    SequenceDataModule,
    Split,
    TokenFiles,
    spans_by_position,
)
from lightning_lss.nn.loss import IGNORED

ENDINGS = (".fa", ".fasta", ".fna", ".ffn", ".faa", ".frn", ".fas")
_SPACE, _UNKNOWN = 254, 255  # beside the tokens, in a table of all bytes
_VERSION = 1  # of what is written to the cache


@dataclass(frozen=True)
class Alphabet:
    """Letters and their tokens: the letter at i of ``letters`` is token i; those in ``others`` are read as the last one.

    Raises ``ValueError`` if a letter occurs twice, or is not a printable character of ASCII other than ``>``.
    """

    letters: str
    others: str = ""

    def __post_init__(self) -> None:
        every = (self.letters + self.others).upper()
        if (
            len(self.letters) < 2
            or len(set(every)) < len(every)
            or not all("!" <= x <= "~" and x != ">" for x in every)
        ):
            raise ValueError(
                f"alphabet={self.letters!r} needs two or more letters of ASCII, and none of them again in others={self.others!r}."
            )

    @property
    def padding(self) -> int:
        """The token after all letters', which fills up sequences."""
        return len(self.letters)

    def table(self) -> np.ndarray:
        """The token of each byte, uint8 [256]; small letters are those of capitals."""
        table = np.full(256, _UNKNOWN, np.uint8)
        table[list(b" \t\r\n")] = _SPACE
        last = self.padding - 1
        for token, letter in [*enumerate(self.letters), *((last, letter) for letter in self.others)]:
            table[[ord(letter.upper()), ord(letter.lower())]] = token
        return table


class _Reader:
    """Writes the tokens of FASTA files to ``output`` and counts: memory holds a block of a file, never a record."""

    def __init__(self, alphabet: Alphabet, output: BinaryIO) -> None:
        self.alphabet, self.table, self.output = alphabet, alphabet.table(), output
        self.ends = array("q")  # of each record, in letters of all files
        self.length = 0

    def read(self, path: Path) -> None:
        """Append the records of a file; raise ``ValueError`` for what is not FASTA or not of the alphabet."""
        lines, in_record = 0, False
        for part in _parts(read_blocks(path)):
            if part.startswith(b">"):
                if in_record:
                    self.ends.append(self.length)
                in_record = True
            else:
                self._write(part, path, lines, in_record)
            lines += part.count(b"\n")
        if in_record:
            self.ends.append(self.length)

    def _write(self, part: bytes, path: Path, lines: int, in_record: bool) -> None:
        every = self.table[np.frombuffer(part, np.uint8)]
        tokens = every[every != _SPACE]

        def line_of(wrong: np.ndarray) -> tuple[int, str]:
            place = int(np.flatnonzero(wrong)[0])
            return lines + part.count(b"\n", 0, place) + 1, chr(part[place])

        if len(tokens) and not in_record:
            line, _ = line_of(every != _SPACE)
            raise ValueError(
                f"{path}, line {line}: there is no header before it, a line that begins with '>'. The file is not FASTA."
            )
        if _UNKNOWN in tokens:
            line, letter = line_of(every == _UNKNOWN)
            known = self.alphabet
            raise ValueError(
                f"{path}, line {line}: {letter!r} is neither in alphabet={known.letters!r} nor in others={known.others!r}, which are"
                f" read as {known.letters[-1]!r}. Add it to one of them (data.alphabet=..., data.others=...)."
            )
        self.output.write(tokens)  # buffered, unlike tofile: records may be short
        self.length += len(tokens)


def _parts(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Cut a file into header lines, each whole, and what lies between them, in pieces of any size."""
    rest, line_start = b"", True  # `rest` is the beginning of a header line
    for block in blocks:
        block, rest, start = rest + block, b"", 0
        while start < len(block):
            if line_start and block.startswith(b">", start):
                stop = block.find(b"\n", start) + 1
                if not stop:
                    rest = block[start:]
                    break
            else:
                stop = block.find(b"\n>", start) + 1 or len(block)
            yield block[start:stop]
            line_start, start = block.endswith(b"\n", start, stop), stop
    if rest:
        yield rest


@dataclass(frozen=True, eq=False)
class RecordDataset(SampleDataset):
    """Sequences of records, or of pieces of records: runs of the letters of ``tokens``.

    Sample i of a record consists of its letters i*L to i*L + L + 1 (exclusive), so no two share a target. The last one is
    filled up: with ``padding`` as inputs, and targets of -100. A run of less than two letters has no sample.
    """

    tokens: TokenFiles
    starts: np.ndarray  # int64 [number of runs]
    stops: np.ndarray  # exclusive
    seq_len: int  # L
    padding: int
    ignored: int | None = None  # the token that is no target
    first_samples: np.ndarray = field(init=False)  # of each run, and at the end the number of samples, int64
    num_samples: int = field(init=False)

    def __post_init__(self) -> None:
        counts = -(-np.maximum(self.stops - self.starts - 1, 0) // self.seq_len)
        object.__setattr__(self, "first_samples", np.concatenate(([0], counts.cumsum())))
        object.__setattr__(self, "num_samples", int(self.first_samples[-1]))

    @property
    def share_of_padding(self) -> float:
        """The share of inputs that are padding."""
        targets = np.maximum(self.stops - self.starts - 1, 0).sum()
        return 1 - float(targets) / (self.num_samples * self.seq_len)

    def sample(self, index: int) -> Sample:
        """Return a sequence of one run."""
        run = int(np.searchsorted(self.first_samples, index, side="right")) - 1
        start = int(self.starts[run] + (index - self.first_samples[run]) * self.seq_len)
        letters = self.tokens.read(start, min(start + self.seq_len + 1, int(self.stops[run])))
        inputs, targets = torch.full((self.seq_len,), self.padding), torch.full((self.seq_len,), IGNORED)
        inputs[: len(letters)] = letters[: self.seq_len]
        targets[: len(letters) - 1] = letters[1:]
        if self.ignored is not None:
            targets[targets == self.ignored] = IGNORED
        return {"inputs": inputs, "targets": targets}


class FastaDataModule(SequenceDataModule):
    """FASTA files: a letter is a token and small letters are capitals; headers, line breaks and spaces are left out.

    No sequence spans two records. The last of a record is filled up with a token of its own, the one after the letters',
    and with targets of -100. Letters in ``others`` (in DNA: IUPAC's codes for several bases) become the last letter of the
    alphabet, by default N. It stands for what is not known, so it is no target unless ``predict_unknown``: long runs of N
    would make a loss look better than it is. ``bits per byte`` are then bits per known base.

    The tokens are kept in a file, a byte for each, which is made once and memory-mapped.

    Args:
        path: a file, or a folder with files that end in .fa, .fasta, .fna, .ffn, .faa, .frn or .fas, also compressed with
            gzip (.gz), bzip2 or xz. Hidden files and folders in it are ignored.
        alphabet: the letters, in the order of their tokens; the last one stands for what is not known.
        others: letters that are read as the last one.
        predict_unknown: whether the last letter is a target.
        splits: shares of training, validation and test.
        split_by: ``"position"``: the first letters of all files are for training, the last for test, and a record is cut
            where a share ends. ``"record"``: each record, in their order, goes whole to the split that lacks most letters.
        cache_dir: where the tokens are kept; None for ``lightning_lss/fasta`` in the user's cache folder.
        seq_len, batch_size, num_workers: as in :class:`~lightning_lss.data.sequences.SequenceDataModule`.

    Raises:
        FileNotFoundError: if there is nothing at ``path``.
        ValueError: if no file in the folder is FASTA, a number or a choice is out of range; when the files are first read, if
            one has a letter that is not known (the message names file and line), no header before it, or is damaged.
    """

    vocab_size: int = 0  # that of an object follows from its alphabet

    def __init__(
        self,
        path: str | Path,
        seq_len: int,
        batch_size: int,
        alphabet: str = "ACGTN",
        others: str = "RYSWKMBDHV",
        predict_unknown: bool = False,
        splits: Sequence[float] = (0.9, 0.05, 0.05),
        split_by: Literal["position", "record"] = "position",
        cache_dir: str | Path | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(seq_len, batch_size, num_workers)
        if split_by not in ("position", "record"):
            raise ValueError(f"split_by={split_by!r} is unknown: choose 'position' or 'record'.")
        spans_by_position(0, splits)  # refuses wrong shares
        self.alphabet, self.predict_unknown = Alphabet(alphabet, others), predict_unknown
        self.vocab_size = self.alphabet.padding + 1
        self.splits, self.split_by = splits, split_by
        self.cache_dir = cache_folder(cache_dir, "fasta")
        self.files = find_files(path, endings=ENDINGS)
        for file in self.files:
            is_compressed(file)  # refuses what cannot be unpacked

    @cached_property
    def folder(self) -> Path:
        """Where the tokens and the ends of records are; they are made if they are not there."""
        letters = {"alphabet": self.alphabet.letters.upper(), "others": "".join(sorted(self.alphabet.others.upper()))}
        return made_once(self.cache_dir, self.files, {**letters, "fasta": _VERSION}, self._write)

    def prepare_data(self) -> None:
        """Read the files unless that was done. Lightning calls this on one rank per node."""
        _ = self.folder

    def dataset(self, split: Split) -> RecordDataset:
        """Return sequences of the records, or pieces of records, that belong to ``split``."""
        tokens = TokenFiles([self.folder / "tokens"])
        ends = np.load(self.folder / "ends.npy")
        starts = np.concatenate(([0], ends[:-1]))
        if self.split_by == "record":
            mine = _splits_of_records(ends - starts, self.splits) == ("train", "val", "test").index(split)
            starts, ends = starts[mine], ends[mine]
        else:
            span = spans_by_position(len(tokens), self.splits)[split]
            starts, ends = np.maximum(starts, span.start), np.minimum(ends, span.stop)
            starts, ends = starts[starts < ends], ends[starts < ends]
        unknown = None if self.predict_unknown else self.alphabet.padding - 1
        samples = RecordDataset(tokens, starts, ends, self.seq_len, self.alphabet.padding, unknown)
        if not len(samples):
            remedy = "Give more files" if self.split_by == "position" else "Use split_by=position, or give more records"
            raise ValueError(f"The {split} split has no record of two letters or more. {remedy}, or other splits.")
        if (share := samples.share_of_padding) > 0.5:
            rank_zero_warn(
                f"{share:.0%} of the {split} split is padding, since its {len(starts)} records are short. A smaller seq_len than"
                f" {self.seq_len} would waste less."
            )
        return samples

    def _write(self, folder: Path) -> None:
        with (folder / "tokens").open("wb") as output:
            reader = _Reader(self.alphabet, output)
            for file in self.files:
                reader.read(file)
        if not reader.length:
            raise ValueError(f"The FASTA files at {self.files[0]} hold no letters.")
        np.save(folder / "ends.npy", np.frombuffer(reader.ends, np.int64))


def _splits_of_records(lengths: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """Give each record in turn to the split that lacks most letters of its share; int [number of records]."""
    have, total, chosen = [0, 0, 0], 0, np.empty(len(lengths), np.int8)
    for index, length in enumerate(lengths.tolist()):
        total += length
        lacking = [share * total - letters for share, letters in zip(shares, have)]
        chosen[index] = split = lacking.index(max(lacking))
        have[split] += length
    return chosen
