"""How many ranks share a sequence and which positions each holds: pure integer arithmetic.

A sequence of ``length`` positions is cut into equal *chunks*. Each of ``size`` ranks holds one or two of them:

- ``contiguous``: of ``size`` chunks, rank ``r`` holds chunk ``r``;
- ``zigzag``: of ``2 * size`` chunks, rank ``r`` holds chunks ``r`` and ``2 * size - 1 - r``, an early and a late one.
  Under a causal mask every rank then computes the same number of query-key pairs (the load balancing of Llama 3's
  context parallelism, arXiv 2407.21783, section 3.3.2). One rank holds the whole sequence in order.
"""

from numbers import Integral
from typing import Any, Literal, get_args

Layout = Literal["contiguous", "zigzag"]
LAYOUTS: tuple[str, ...] = get_args(Layout)


def check_positive(**values: Any) -> None:
    """Raise ``ValueError`` for the first of the named values that is not a positive integer."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name}={value!r} must be a positive integer.")


def resolve_sequence_parallel_size(world_size: int, requested: int | Literal["auto"]) -> int:
    """Return the sequence-parallel size S: the request, or the whole world for ``"auto"``.

    Raises:
        ValueError: if S is not a positive divisor of ``world_size``.
    """
    if requested == "auto":
        return world_size
    if isinstance(requested, bool) or not isinstance(requested, int) or requested < 1:
        raise ValueError(f"sequence_parallel_size={requested!r} must be 'auto' or a positive integer.")
    if world_size % requested:
        divisors = [size for size in range(1, world_size + 1) if world_size % size == 0]
        raise ValueError(
            f"sequence_parallel_size={requested} does not divide the world size {world_size} (devices x nodes). Use one of"
            f" {', '.join(map(str, divisors))}, or change the number of devices."
        )
    return requested


def check_layout(layout: str) -> None:
    """Raise ``ValueError`` if ``layout`` is unknown."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown: choose one of {', '.join(map(repr, LAYOUTS))}.")


def chunks_per_rank(size: int, layout: str) -> int:
    """Number of chunks that each of ``size`` ranks holds: 1 or 2."""
    return 2 if layout == "zigzag" and size > 1 else 1


def check_length(length: int, size: int, layout: str) -> None:
    """Raise ``ValueError`` if ``length`` positions cannot be divided evenly; the message names lengths that can."""
    divisor = size * chunks_per_rank(size, layout)
    if length > 0 and length % divisor == 0:
        return
    below = length // divisor * divisor
    nearest = f"{below} or {below + divisor}" if below > 0 else divisor
    why = "the sequence-parallel size"
    remedy = f"Use a length that is a multiple of {divisor} (such as {nearest}) or another sequence_parallel_size"
    if divisor != size:
        why = f"twice {why}, as layout='zigzag' needs"
        remedy += ", or layout='contiguous'" if length > 0 and length % size == 0 else ""
    raise ValueError(
        f"A sequence of length {length} cannot be split over {size} ranks: it is not divisible by {divisor} ({why}). {remedy}."
    )


def check_heads(num_heads: int, size: int) -> None:
    """Raise ``ValueError`` if ``num_heads`` query heads cannot be divided among ``size`` tensor-parallel ranks."""
    if num_heads % size:
        divisors = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
        raise ValueError(
            f"num_heads={num_heads} cannot be divided evenly among {size} tensor-parallel ranks. Use a sequence_parallel_size of"
            f" {', '.join(map(str, divisors))}, another number of heads, or strategy=lss, which does not split heads."
        )


def chunks_of_rank(rank: int, size: int, layout: str) -> tuple[int, ...]:
    """Indices of the chunks that ``rank`` holds, in local order."""
    return (rank,) if chunks_per_rank(size, layout) == 1 else (rank, 2 * size - 1 - rank)


def position_ranges(length: int, rank: int, size: int, layout: str) -> tuple[range, ...]:
    """The runs of global positions that ``rank`` holds in a sequence of ``length``, in local order.

    Raises:
        ValueError: if ``length`` cannot be divided evenly.
    """
    check_length(length, size, layout)
    chunk = length // (size * chunks_per_rank(size, layout))
    return tuple(range(c * chunk, (c + 1) * chunk) for c in chunks_of_rank(rank, size, layout))
