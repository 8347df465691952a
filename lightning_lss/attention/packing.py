"""Masks as tensors: under ``torch.compile`` nothing else reaches attention's operator.

The words of a mask, uint8 [n], are a digest of its content, the length of its header, the header, which names the kinds
and their arguments in JSON, and the bytes of its tensors. Each part is padded to 8 bytes, so that tensors can be viewed
in place. Equal masks have equal words on every rank. A function stays in its process: the header has its number.
"""

import hashlib
import json
import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lightning_lss.attention import kinds
from lightning_lss.attention.kinds import Function, Kind
from lightning_lss.sequence.batch import bytes_of

DIGEST = 16  # bytes at the start
_ALIGNED = 8  # bytes, of the widest dtype


no_modes = _disable_current_modes
"""Masks and plans are made of numbers, also where a step is traced with fake tensors: ``@no_modes()`` around a function."""


@no_modes()
@torch.inference_mode(False)  # training may follow a validation with the same mask
def pack(kind: Kind, by_name: bool = False) -> Tensor:
    """Write a mask as words; with ``by_name`` for comparisons between processes, by the name of functions and what they read."""
    tensors: list[bytes] = []

    def describe(x: Any) -> Any:
        if isinstance(x, Function) and by_name:
            numbers, read = kinds.values_read(x.function)
            return {"function": getattr(x.function, "__qualname__", ""), "reads": [numbers, *map(describe, read)]}
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
        self.words = words
        with no_modes():
            self.digest = words[:DIGEST].numpy().tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PackedMask) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


@lru_cache(maxsize=4)  # a mask without structure is large
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
        return kinds.by_number[number]
    except KeyError:
        raise RuntimeError(
            "A mask made with AttentionMask.from_function is needed again but has been deleted, and many were made since. Keep it"
            " until the backward pass is over, for example in the batch."
        ) from None
