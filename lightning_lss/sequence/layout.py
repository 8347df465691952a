"""How many ranks share a sequence and which positions each holds: pure integer arithmetic.

A sequence of ``length`` positions is cut into equal *chunks*. Each of ``size`` ranks holds equally many of them:

- ``contiguous``: of ``size`` chunks, rank ``r`` holds chunk ``r``;
- ``zigzag``: of ``2 * size`` chunks, rank ``r`` holds chunks ``r`` and ``2 * size - 1 - r``, an early and a late one.
  Under a causal mask every rank then computes the same number of query-key pairs (the load balancing of Llama 3's
  context parallelism, arXiv 2407.21783, section 3.3.2);
- ``balanced``: chosen for each batch by the work of its mask, a :class:`ChunkAssignment`
  (:mod:`lightning_lss.sequence.balance`).

One rank holds the whole sequence in order.
"""

from numbers import Integral
from typing import Any, Literal, get_args

from lightning_lss.sequence.assignment import ChunkAssignment, static_chunks

Layout = Literal["contiguous", "zigzag", "balanced"]
LAYOUTS: tuple[str, ...] = get_args(Layout)
STATIC_LAYOUTS: tuple[str, ...] = ("contiguous", "zigzag")
"""Those that are the same for every batch."""


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


def chunks_of_ranks(size: int, layout: str, assignment: ChunkAssignment | None = None) -> tuple[tuple[int, ...], ...]:
    """Indices of the chunks that each of ``size`` ranks holds, in local order.

    Raises:
        RuntimeError: if the layout is ``balanced`` and there is no ``assignment``.
    """
    if assignment is not None:
        return assignment.chunks
    if layout == "balanced" and size > 1:
        raise RuntimeError(
            "Under layout='balanced' each batch has its own positions, and there is no batch now. Ask `sequence_shard(module)` for the"
            " shard within a step instead of keeping one, or use layout='zigzag'."
        )
    return static_chunks(size, layout)


def chunks_of_rank(rank: int, size: int, layout: str, assignment: ChunkAssignment | None = None) -> tuple[int, ...]:
    """Indices of the chunks that ``rank`` holds, in local order; raises as :func:`chunks_of_ranks`."""
    return chunks_of_ranks(size, layout, assignment)[rank]


def chunks_per_rank(size: int, layout: str, assignment: ChunkAssignment | None = None) -> int:
    """Number of chunks that each of ``size`` ranks holds; of a balanced layout without an ``assignment`` at least 1."""
    if assignment is None and layout == "balanced":
        return 1
    return len(chunks_of_rank(0, size, layout, assignment))


def check_length(length: int, size: int, layout: str, assignment: ChunkAssignment | None = None) -> None:
    """Raise ``ValueError`` if ``length`` positions cannot be divided evenly; the message names lengths that can."""
    per_rank = chunks_per_rank(size, layout, assignment)
    divisor = size * per_rank
    if length > 0 and length % divisor == 0:
        return
    below = length // divisor * divisor
    nearest = f"{below} or {below + divisor}" if below > 0 else divisor
    why = "the sequence-parallel size"
    remedy = f"Use a length that is a multiple of {divisor} (such as {nearest}) or another sequence_parallel_size"
    if divisor != size:
        times = f"twice {why}, as" if layout == "zigzag" else f"{per_rank} times {why}, as this batch under"
        why = f"{times} layout={layout!r} needs"
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


def position_ranges(
    length: int, rank: int, size: int, layout: str, assignment: ChunkAssignment | None = None
) -> tuple[range, ...]:
    """The runs of global positions that ``rank`` holds in a sequence of ``length``, in local order.

    Raises:
        ValueError: if ``length`` cannot be divided evenly.
        RuntimeError: if the layout is ``balanced`` and there is no ``assignment``.
    """
    own = chunks_of_rank(rank, size, layout, assignment)
    check_length(length, size, layout, assignment)
    chunk = length // (size * len(own))
    return tuple(range(c * chunk, (c + 1) * chunk) for c in own)
