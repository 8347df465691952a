"""Masks as tensors: under ``torch.compile`` nothing else reaches attention's operator.

The words of a mask, uint8 [n], are a digest of its content, the length of its header, the header, which names the kinds
and their arguments in JSON, and the bytes of its tensors. Equal masks have equal words on every rank. A function stays
in its process: the header has its number.
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

DIGEST = 16  # bytes at the start
_LENGTH = 8  # bytes that say how long the header is


no_modes = _disable_current_modes
"""Masks and plans are made of numbers, also where a step is traced with fake tensors: ``@no_modes()`` around a function."""


@no_modes()
def pack(kind: Kind) -> Tensor:
    """Write a mask as words."""
    tensors: list[bytes] = []

    def describe(x: Any) -> Any:
        if isinstance(x, Function):
            return {"function": x.number}
        if isinstance(x, Kind):
            return [type(x).__name__, *map(describe, x.arguments)]
        if isinstance(x, Tensor):
            tensors.append(x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            return {"dtype": str(x.dtype).removeprefix("torch."), "shape": list(x.shape)}
        return x

    header = json.dumps(describe(kind)).encode()
    content = len(header).to_bytes(_LENGTH, "big") + header + b"".join(tensors)
    digest = hashlib.blake2b(content, digest_size=DIGEST).digest()
    return torch.frombuffer(bytearray(digest + content), dtype=torch.uint8)


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


@lru_cache(maxsize=16)
def unpack(packed: PackedMask) -> Kind:
    """Read the words of a mask.

    Raises ``RuntimeError`` if it is made of a function that has been deleted.
    """
    content = memoryview(packed.words.numpy().tobytes())[DIGEST:]
    start = _LENGTH + int.from_bytes(content[:_LENGTH], "big")
    rest = content[start:]

    def build(x: Any) -> Any:
        nonlocal rest
        if isinstance(x, list):
            name, *arguments = x
            return getattr(kinds, name)(*map(build, arguments))
        if isinstance(x, dict) and "function" in x:
            return _function(x["function"])
        if isinstance(x, dict):
            dtype = getattr(torch, x["dtype"])
            size = math.prod(x["shape"]) * dtype.itemsize
            own, rest = rest[:size], rest[size:]
            return torch.frombuffer(bytearray(own), dtype=dtype).view(x["shape"])
        return x

    return build(json.loads(bytes(content[_LENGTH:start])))


def _function(number: int) -> Function:
    try:
        return kinds.functions[number]
    except KeyError:
        raise RuntimeError(
            "A mask made with AttentionMask.from_function is needed again but has been deleted. Keep it until the backward"
            " pass is over, for example on the module or in the batch."
        ) from None
