"""A tokenizer's file of Hugging Face's ``tokenizers``, and texts as its tokens."""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from lightning_lss.data.documents import Piece
from lightning_lss.data.files import read_blocks
from lightning_lss.data.optional import require

PIECE = 1 << 18  # characters of a text that are tokenized at once
_BATCH = 1 << 23  # characters that are given to the tokenizer's threads
AUTO = "auto"

Text = tuple[str, bool]  # a text or a piece of one, and whether it is the last piece


class TokenizerFile:
    """The tokenizer in a file ``tokenizer.json``, or in a checkpoint's folder with one.

    Texts are tokenized without the special tokens that it would put around each, and without its truncation and padding.

    Args:
        path: the file or folder.
        end_token: the token after each document, such as ``"<|endoftext|>"``; ``"auto"`` for the ``eos_token`` that
            ``tokenizer_config.json`` beside the file names, none if it names none; None for none.

    Raises:
        MissingPackageError: if ``tokenizers`` is not installed.
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a tokenizer's, or its vocabulary has no ``end_token``.
    """

    def __init__(self, path: str | Path, end_token: str | None = AUTO) -> None:
        library = require("tokenizers", "A tokenizer's file")
        self.file = _find(Path(path).expanduser())
        try:
            self._tokenizer = library.Tokenizer.from_file(str(self.file))
        except Exception as error:  # the library raises Exception itself
            raise ValueError(
                f"{self.file} is not a tokenizer's file of Hugging Face's tokenizers ({error})."
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps
        if end_token == AUTO:
            end_token = _end_token_beside(self.file)
        if end_token is not None and end_token not in vocabulary:
            raise ValueError(f"end_token={end_token!r} is not in the vocabulary of {self.file}. Give another, or null.")
        self.end = None if end_token is None else vocabulary[end_token]

    def encode(self, texts: Iterable[Text]) -> Iterator[Piece]:
        """Tokenize texts, many at a time; the end token follows each."""
        for batch in _batches(texts):
            encoded = self._tokenizer.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)
            for (text, is_last), tokens in zip(batch, encoded):
                end = [self.end] if is_last and self.end is not None else []
                yield Piece(tokens.ids + end, len(text.encode()), is_last)


def read_text(path: Path, size: int = PIECE) -> Iterator[Text]:
    """Yield a file's text, unpacked where it is compressed, in pieces of ``size`` characters or less.

    Raises ``ValueError`` if it is not UTF-8.
    """
    decoder, done = codecs.getincrementaldecoder("utf-8-sig")(), 0

    def decoded() -> Iterator[str]:
        nonlocal done
        try:
            for block in chain(read_blocks(path), [b""]):
                yield decoder.decode(block, final=not block)
                done += len(block)
        except UnicodeDecodeError as error:
            place = done - len(decoder.getstate()[0]) + error.start
            raise ValueError(
                f"{path} is not a text in UTF-8 (byte {place}): convert it (iconv -t utf-8), or leave it out (data.pattern=...)."
            ) from error

    return in_pieces(decoded(), size)


def in_pieces(texts: Iterable[str], size: int = PIECE) -> Iterator[Text]:
    """Join ``texts`` to one and cut it into pieces of ``size`` characters or less: between lines, else between words.

    There is no other white space around a cut, so that tokenizers which begin by splitting at words have the same tokens as
    for the whole. (A tokenizer that marks the start of a text marks the start of each piece.)
    """
    rest = ""
    for text in texts:
        rest, start = rest + text, 0
        while len(rest) - start > size:
            stop = _cut(rest, start, start + size)
            yield rest[start:stop], False
            start = stop
        rest = rest[start:]
    yield rest, True


_PLACES = (  # to cut a text: the character that is there, how far after it, and what must surround the place
    ("\n", 1, re.compile(r"(?<=\S\n)(?=\S)")),
    (" ", 0, re.compile(r"(?<=\S)(?= \S)")),
)


def _cut(text: str, start: int, stop: int) -> int:
    """Return the last place in ``start`` < place <= ``stop`` between two lines, else between two words, else ``stop``."""
    for character, offset, surroundings in _PLACES:
        found = stop + 1 - offset
        while (found := text.rfind(character, start + 1 - offset, found)) >= 0:
            if surroundings.match(text, found + offset):
                return found + offset
    return stop


def _batches(texts: Iterable[Text]) -> Iterator[list[Text]]:
    batch: list[Text] = []
    length = 0
    for text in texts:
        batch.append(text)
        length += len(text[0])
        if length >= _BATCH or len(batch) >= 1 << 16:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def _find(path: Path) -> Path:
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no tokenizer at {file} (data.tokenizer=...). A checkpoint without a tokenizer.json gets one with"
            " AutoTokenizer.from_pretrained(folder).save_pretrained(folder) of transformers."
        )
    return file


def _end_token_beside(file: Path) -> str | None:
    settings = file.parent / "tokenizer_config.json"
    token: Any = json.loads(settings.read_text()).get("eos_token") if settings.is_file() else None
    return token["content"] if isinstance(token, dict) else token
