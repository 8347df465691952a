"""Random numbers by position: what a place of the whole sequence draws does not depend on the rank that holds it.

A number is a hash of a seed and of indices, such as batch row, global position and feature. Each index in turn picks a
number from the SplitMix64 stream whose state is the hash so far (Steele, Lea and Flood, "Fast splittable pseudorandom
number generators", OOPSLA 2014, figure 15). The arithmetic is that of 64-bit integers on any device, so CPU and CUDA draw
the same numbers, and there is no generator whose state a rank would have to move past the segments of others.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15 - 2**64  # torch's integers are signed; the bits of sums and products are the same
_FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_AT_A_TIME = {"cpu": 2**15, "cuda": 2**22}
"""Numbers of a piece, for each thread on a CPU: with its shifted copy it then stays in the cache."""


@torch.compiler.disable  # a compiled graph would draw other numbers than an eager one, and in another order
def draw_seed() -> Tensor:
    """Draw a seed, int64 [] on the CPU, from torch's default CPU generator.

    The ranks of a sequence group draw the same ones, since their generators start from the same state. Activation
    checkpointing restores the generator and so draws the same seed again. ``torch.compile`` breaks its graph here.
    """
    return torch.randint(2**62, (), dtype=torch.int64, device="cpu")


def keep_mask(seed: Tensor, *indices: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """Return a mask to multiply with: 0 with probability ``p``, else 1 / (1 - p); for the arguments see :func:`kept`."""
    return kept(seed, *indices, p=p).to(dtype).mul_(1 / (1 - p))


def kept(seed: Tensor, *indices: Tensor, p: float) -> Tensor:
    """Decide for each place whether dropout keeps it, bool of the indices' common shape.

    Args:
        seed: int64 [], from :func:`draw_seed`; it may be on the CPU while the indices are on another device.
        *indices: int64 tensors on one device that name a place, such as batch row [B, 1, 1], global position [1, l, 1]
            and feature [E]. They broadcast against each other. A place has the same decision whatever else is in the
            tensors. It is fastest if only the last index varies along the last dimension.
        p: probability of dropping a place, in [0, 1), in steps of 2**-64.

    Returns:
        true with probability 1 - p; decisions of different places or seeds are independent of each other.
    """
    # the compiler fuses the arithmetic into what uses it; for all else, as for fake tensors, it is a single operator
    return _kept(seed, indices, p) if torch.compiler.is_compiling() else _kept_in_pieces(seed, indices, p)


def _mix(x: Tensor, *, last: bool = False) -> Tensor:
    """Scramble the bits of ``x``, int64 of any shape, in place: the finalizer of SplitMix64.

    The last step changes only the lower 33 bits. Numbers that are compared with a threshold go without it.
    """
    for shift, factor in zip((30, 27), _FACTORS):
        x.bitwise_xor_((x >> shift).bitwise_and_(2 ** (64 - shift) - 1)).mul_(factor)  # >> copies the sign
    return x if last else x.bitwise_xor_((x >> 31).bitwise_and_(2**33 - 1))


def _streams(seed: Tensor, indices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Hash all indices but the last; return the state of each stream, and how far the last index moves it on."""
    state = _mix(seed + _GAMMA)
    for index in indices[:-1]:
        state = _mix(state + (index + 1) * _GAMMA)
    return state.to(indices[-1].device), (indices[-1] + 1) * _GAMMA


def _threshold(p: float) -> int:
    return round(p * 2**64) - 2**63  # of a signed number


def _kept(seed: Tensor, indices: Sequence[Tensor], p: float) -> Tensor:
    state, offset = _streams(seed, indices)
    return _mix(state + offset, last=True) >= _threshold(p)


@torch.library.custom_op(
    "lightning_lss::kept",
    mutates_args=(),
    schema="(Tensor seed, Tensor[] indices, float p) -> Tensor",
    tags=(torch.Tag.pointwise,),
)
def _kept_in_pieces(seed: Tensor, indices: Sequence[Tensor], p: float) -> Tensor:
    """Compute :func:`_kept` in pieces, so that no 64-bit numbers of the whole shape exist."""
    out = _empty(seed, indices, p)
    at_a_time = _AT_A_TIME.get(out.device.type, 2**22) * (torch.get_num_threads() if out.is_cpu else 1)
    if out.numel() <= at_a_time:
        return _kept(seed, indices, p)
    dim = max(range(out.dim()), key=out.size)
    state, offset = _streams(seed, indices)
    rows = max(1, at_a_time * out.size(dim) // out.numel())
    for states, offsets, piece in zip(*(x.expand(out.shape).split(rows, dim) for x in (state, offset, out))):
        torch.ge(_mix(states + offsets, last=True), _threshold(p), out=piece)
    return out


@_kept_in_pieces.register_fake
def _empty(seed: Tensor, indices: Sequence[Tensor], p: float) -> Tensor:
    shape = torch.broadcast_shapes(*(x.shape for x in indices))
    return torch.empty(shape, dtype=torch.bool, device=indices[0].device)
