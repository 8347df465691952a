"""Many tiles by one call of a kernel: attention of adjacent segments, each over keys of its own."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from lightning_lss.attention.kernels.scores import Scores


class Segments(NamedTuple):
    """Segments of rows and their keys: rows ``[rows[i], rows[i + 1])`` see keys in ``[keys[i], keys[i + 1])`` only.

    Both start at 0 and end at the number of rows or keys. A segment may have no rows, or no keys.
    """

    rows: tuple[int, ...]
    keys: tuple[int, ...]

    @property
    def parts(self) -> Iterator[tuple[slice, slice]]:
        """The rows and the keys of each segment."""
        bounds = zip(self.rows, self.rows[1:], self.keys, self.keys[1:])
        return ((slice(*bound[:2]), slice(*bound[2:])) for bound in bounds)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """The numbers of rows and of keys of each segment."""
        return [(rows.stop - rows.start, keys.stop - keys.start) for rows, keys in self.parts]

    @property
    def blind_rows(self) -> Iterator[slice]:
        """The rows of segments without keys."""
        return (rows for rows, keys in self.parts if keys.start == keys.stop)

    @property
    def unseen_keys(self) -> Iterator[slice]:
        """The keys of segments without rows."""
        return (keys for rows, keys in self.parts if rows.start == rows.stop)


class Packed(NamedTuple):
    """How a kernel computes segments by one call.

    Its functions are those of :class:`lightning_lss.attention.kernels.Kernel` with the segments before the scores, for
    one row of the batch. ``causal`` and ``window`` of the scores hold for each segment by itself, as for a tile. Rows and
    keys of segments without keys or rows get what those of a hidden tile do: 0, and minus infinity for ``lse``.
    """

    forward: Callable[[Tensor, Tensor, Tensor, Segments, Scores], tuple[Tensor, Tensor]]
    backward: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Segments, Scores], tuple[Tensor, Tensor, Tensor]
    ]
