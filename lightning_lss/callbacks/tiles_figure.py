"""Pictures of how a sequence is split."""

from dataclasses import replace
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.patches import Patch, Polygon, Rectangle

from lightning_lss.attention.masks import AttentionMask
from lightning_lss.attention.plan import Plan
from lightning_lss.attention.tiles import Tile
from lightning_lss.sequence.segment import SequenceShard

Corners = list[tuple[float, float]]

_IN_LEGEND = 16  # ranks; more do not fit
_FETCHED = 0.35  # how strong the colour of a fetched key is; that of a rank's own is 1


def plan_ranks(mask: AttentionMask, length: int, shard: SequenceShard) -> list[Plan]:
    """Plan self-attention of every rank of the group of ``shard``, for sequences of ``length`` L."""
    return [mask.plan(length, replace(shard, rank=rank, group=None)) for rank in range(shard.size)]


def draw_attention_tiles(axes: Axes, mask: AttentionMask, length: int, shard: SequenceShard, title: str) -> None:
    """Draw the attention matrix of a sequence of ``length`` L, with the tiles of each rank of the group of ``shard`` in its
    colour; what is hidden stays white.

    Of a batch with rows that differ the first is drawn; the shares of the work are those of the whole batch. Raises
    ``ValueError`` if the length cannot be divided evenly.
    """
    plans = plan_ranks(mask, length, shard)
    total = max(1, sum(plan.pairs for plan in plans))
    handles = []
    for rank, plan in enumerate(plans):
        color = f"C{rank}"  # matplotlib's cycle of colours, which starts again when it ends
        for tile in (tile for batch, tile in plan.tiles if batch.start == 0):
            for corners in _outlines(tile, plan):
                hatch = None if tile.table is None else "////"  # some of its pairs are hidden
                axes.add_patch(Polygon(corners, facecolor=color, edgecolor="white", linewidth=0.8, hatch=hatch))
        handles.append(Patch(color=color, label=f"rank {rank}: {100 * plan.pairs / total:.1f} %"))
    axes.legend(handles=handles[:_IN_LEGEND], title="share of the work", loc="best", fontsize=9)
    axes.set(xlim=(0, length), ylim=(length, 0), aspect="equal", xlabel="key position", ylabel="query position")
    axes.set_title(title)


def draw_keys(axes: Axes, plans: list[Plan], length: int, shard: SequenceShard) -> None:
    """Draw a row for each rank of the group of ``shard``: the keys that it holds in its colour, those that it fetches in a
    paler one; what it never has stays white.

    ``plans`` are those of :func:`plan_ranks` for sequences of ``length`` L. The title says how many keys of the others a
    rank fetches on average.
    """
    for rank, plan in enumerate(plans):
        for run in _runs_of_keys(plan, rank, length):
            axes.add_patch(Rectangle((run.start, rank), len(run), 1, facecolor=f"C{rank}", alpha=_FETCHED, linewidth=0))
        for run in shard.ranges(length, rank):
            white = Rectangle((run.start, rank), len(run), 1, facecolor="white", linewidth=0)
            own = Rectangle((run.start, rank), len(run), 1, facecolor=f"C{rank}", linewidth=0)
            axes.add_patch(white)
            axes.add_patch(own)
        axes.axhline(rank, color="white", linewidth=2)
    axes.set(xlim=(0, length), ylim=(shard.size, 0), xticks=[], yticks=[], ylabel="rank")
    if shard.size <= _IN_LEGEND:
        axes.set_yticks([rank + 0.5 for rank in range(shard.size)], list(map(str, range(shard.size))))
    axes.tick_params(length=0)
    axes.set_title(
        f"keys: own, and fetched (pale), {100 * share_fetched(plans, length):.0f} % of the others'", fontsize=9
    )


def share_fetched(plans: list[Plan], length: int) -> float:
    """Return how many of the keys that others hold a rank fetches, mean of the ranks, as a share of all; ``plans`` are those
    of :func:`plan_ranks` for sequences of ``length`` L."""
    return sum(plans[0].received) / max(1, len(plans) - 1) / length


def _runs_of_keys(plan: Plan, rank: int, length: int) -> list[range]:
    """Return the runs of positions whose keys a rank fetches, its own among them."""
    if plan.needs is None:
        return [range(length)]
    return [range(run.position, run.position + run.size) for run in plan.needs[rank]]


def _outlines(tile: Tile, plan: Plan) -> list[Corners]:
    """Return the corners (key, query) of a tile, one outline for each run of positions that its rows cover."""
    positions = plan.q_positions[tile.q_start : tile.q_stop].tolist()
    first_key = int(plan.k_positions[tile.k_start])
    jumps = [row for row in range(1, tile.rows) if positions[row] != positions[row - 1] + 1]
    outlines = []
    for start, stop in pairwise([0, *jumps, tile.rows]):
        part = tile.part(slice(start, stop), slice(0, tile.keys))
        outlines.append([(first_key + key, positions[start] + row) for key, row in _outline(part)])
    return outlines


def _outline(tile: Tile) -> Corners:
    """Return the corners (key, row) of what the diagonals of a tile leave of it, within the tile."""
    turns = {0, tile.rows, tile.high, tile.keys + tile.low}
    rows = sorted(row for row in turns if 0 <= row <= tile.rows)
    right = [(min(tile.keys, max(0, row - tile.low)), row) for row in rows]
    left = [(max(0, min(tile.keys, row - tile.high)), row) for row in reversed(rows)]
    return [*right, *left]
