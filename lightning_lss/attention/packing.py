"""Masks as tensors: under ``torch.compile`` nothing else reaches attention's operator.

The words of a mask, uint8 [n], are a digest of its content, the length of its header, the header, which names the kinds
and their arguments in JSON, and the bytes of its tensors. Each part is padded to 8 bytes, so that tensors can be viewed
in place. Equal masks have equal words on every rank. A function stays in its process: the header has its number, and it
lives as long as the words of a mask of it (:func:`keep_functions`).
"""

import hashlib
import json
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lightning_lss.attention import kinds
from lightning_lss.attention.functions import Function, by_number
from lightning_lss.attention.kinds import Kind, Sizes
from lightning_lss.sequence.batch import bytes_of

DIGEST = 16  # bytes at the start
_ALIGNED = 8  # bytes, of the widest dtype


no_modes = _disable_current_modes
"""Masks and plans are made of numbers, also where a step is traced with fake tensors: ``@no_modes()`` around a function."""


@no_modes()
@torch.inference_mode(False)  # training may follow a validation with the same mask
def pack(kind: Kind, by_content: bool = False) -> Tensor:
    """Write a mask as words; with ``by_content`` for comparisons between processes, by the content of functions."""
    tensors: list[bytes] = []

    def describe(x: Any) -> Any:
        if isinstance(x, Function) and by_content:
            return {"function": x.content, "positions": describe(x.positions)}
        if isinstance(x, Function):
            return {"function": x.number}
        if isinstance(x, Kind):
            return [type(x).__name__, *map(describe, x.arguments)]
        if isinstance(x, Tensor):
            tensors.append(_padded(bytes_of(x)))
            return {"dtype": str(x.dtype).removeprefix("torch."), "shape": list(x.shape)}
        return x

    header = _padded(json.dumps(describe(kind)).encode(), b" ")
    parts = [len(header).to_bytes(_ALIGNED, "big"), header, *tensors]
    digest = hashlib.blake2b(digest_size=DIGEST)
    for part in parts:
        digest.update(part)
    return torch.frombuffer(bytearray(b"".join((digest.digest(), *parts))), dtype=torch.uint8)


def _padded(part: bytes, filling: bytes = b"\0") -> bytes:
    return part + filling * (-len(part) % _ALIGNED)


class PackedMask:
    """The words of a mask; equal by their digest, so that what is planned for a mask can be cached."""

    def __init__(self, words: Tensor) -> None:
        with no_modes():
            self.words = words.data  # caches keep this one, which keeps no functions
            self.digest = words[:DIGEST].numpy().tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PackedMask) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


@no_modes()
def unpack(packed: PackedMask) -> Kind:
    """Read the words of a mask; its tensors are views of them.

    Raises ``RuntimeError`` if it is made of a function that has been deleted.
    """
    words = packed.words
    size = int.from_bytes(words[DIGEST : DIGEST + _ALIGNED].numpy().tobytes(), "big")
    start = DIGEST + _ALIGNED
    header, place = words[start : start + size].numpy().tobytes(), start + size

    def build(x: Any) -> Any:
        nonlocal place
        if isinstance(x, list):
            name, *arguments = x
            return getattr(kinds, name)(*map(build, arguments))
        if isinstance(x, dict) and "function" in x:
            return _function(x["function"])
        if isinstance(x, dict):
            dtype = getattr(torch, x["dtype"])
            own = words[place : place + math.prod(x["shape"]) * dtype.itemsize]
            place += -(-len(own) // _ALIGNED) * _ALIGNED
            return own.view(dtype).view(x["shape"])
        return x

    return build(json.loads(header))


def _function(number: int) -> Function:
    try:
        return by_number[number]
    except KeyError:
        raise RuntimeError(
            "A mask made with AttentionMask.from_function is needed again but has been deleted: keep it until the backward pass is"
            " over, for example in the batch."
        ) from None


def keep_functions(words: Tensor, functions: list[Function]) -> None:
    """Keep functions as long as their words: these are saved for backward, also in a compiled graph."""
    words._functions = functions  # type: ignore[attr-defined]  # tensors take attributes


def kept_functions(words: Tensor | None) -> list[Function]:
    """The functions that words keep; none where a graph is traced with stand-ins for them."""
    return getattr(words, "_functions", [])


_numbers: dict[tuple[bytes, Sizes], list[int]] = {}
"""The numbers of a mask's functions, if it is for such sequences: without the mask itself, which may be large."""
_MOST_NUMBERS = 1024


def check_call(mask: PackedMask, sizes: Sizes) -> None:
    """Raise ``ValueError`` if a mask is not for such sequences, or something that its functions read has changed."""
    key = mask.digest, sizes
    if key not in _numbers:
        kind = unpack(mask)
        kind.check_sizes(sizes)
        if len(_numbers) == _MOST_NUMBERS:
            _numbers.clear()
        _numbers[key] = [function.number for function in kind.functions]
    for number in _numbers[key]:
        _function(number).check_unchanged()
