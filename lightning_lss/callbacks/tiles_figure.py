"""Pictures of how a sequence is split."""

from matplotlib.axes import Axes
from matplotlib.patches import Patch, Polygon

from lightning_lss.attention.tiles import Tile, attention_tiles, pairs_of_rank
from lightning_lss.sequence.layout import position_ranges


def draw_attention_tiles(axes: Axes, length: int, size: int, layout: str, causal: bool) -> None:
    """Draw the attention matrix of a sequence of ``length`` L over ``size`` ranks: each rank's tiles have its colour.

    With ``causal`` the upper triangle is hidden. Raises ``ValueError`` if ``layout`` cannot divide the length evenly.
    """
    pairs = [pairs_of_rank(length, rank, size, layout, causal) for rank in range(size)]
    handles = []
    for rank in range(size):
        color = f"C{rank}"  # matplotlib's cycle of colours, which starts again when it ends
        for tile in attention_tiles(length, rank, size, layout, causal):
            for corners in _outlines(tile, position_ranges(length, rank, size, layout)):
                axes.add_patch(Polygon(corners, facecolor=color, edgecolor="white", linewidth=0.8))
        handles.append(Patch(color=color, label=f"rank {rank}: {100 * pairs[rank] / sum(pairs):.1f} %"))
    shown = handles[:16]  # more do not fit the legend
    axes.legend(handles=shown, title="share of the work", loc="upper right" if causal else "center", fontsize=9)
    axes.set(xlim=(0, length), ylim=(length, 0), aspect="equal", xlabel="key position", ylabel="query position")
    axes.set_title(f"{layout}, S = {size}, L = {length:,}, {'causal' if causal else 'bidirectional'}")


def _outlines(tile: Tile, runs: tuple[range, ...]) -> list[list[tuple[int, int]]]:
    """Return the corners (key, query) of a tile, one outline for each run of positions that its rows cover."""
    outlines, row, left, right = [], 0, tile.k_start, tile.k_stop
    for run in runs:
        if tile.q_start <= row < tile.q_stop:
            corners = [(left, run.start), (left, run.stop), (right, run.stop), (right, run.start)]
            outlines.append(corners[:3] if tile.causal else corners)
        row += len(run)
    return outlines
