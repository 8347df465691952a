"""Pictures of how a sequence is split."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Polygon

from lightning_lss.attention.tiles import Tile, attention_tiles
from lightning_lss.sequence.layout import position_ranges

_MOST_NAMED = 16  # more ranks than this do not fit the legend


def draw_attention_tiles(length: int, size: int, layout: str, causal: bool) -> Figure:
    """Draw the attention matrix of a sequence: the tiles of each rank have its colour.

    Args:
        length: global sequence length L.
        size: number of ranks S.
        layout: ``contiguous`` or ``zigzag``.
        causal: whether the upper triangle is hidden.

    Raises:
        ValueError: if the layout cannot divide the length evenly among the ranks.
    """
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    paint_attention_tiles(figure.subplots(), length, size, layout, causal)
    return figure


def paint_attention_tiles(axes: Axes, length: int, size: int, layout: str, causal: bool) -> None:
    """Draw what :func:`draw_attention_tiles` draws onto existing axes."""
    tiles = [attention_tiles(length, rank, size, layout, causal) for rank in range(size)]
    pairs = [sum(tile.pairs for tile in own) for own in tiles]
    handles = []
    for rank, own in enumerate(tiles):
        color = f"C{rank}"  # matplotlib's cycle of colours, which starts again when it ends
        for tile in own:
            for corners in _outlines(tile, position_ranges(length, rank, size, layout)):
                axes.add_patch(Polygon(corners, facecolor=color, edgecolor="white", linewidth=0.8))
        handles.append(Patch(color=color, label=f"rank {rank}: {100 * pairs[rank] / sum(pairs):.1f} %"))
    named = handles[:_MOST_NAMED]
    axes.legend(handles=named, title="share of the work", loc="upper right" if causal else "center", fontsize=9)
    axes.set(xlim=(0, length), ylim=(length, 0), aspect="equal", xlabel="key position", ylabel="query position")
    axes.set_title(f"{layout}, S = {size}, L = {length:,}, {'causal' if causal else 'bidirectional'}")


def _outlines(tile: Tile, runs: tuple[range, ...]) -> list[list[tuple[int, int]]]:
    """Return the corners (key, query) of a tile, one outline for each run of positions that its rows cover."""
    outlines, row = [], 0
    for run in runs:
        if tile.q_start <= row < tile.q_stop:
            left, right = tile.k_start, tile.k_stop
            top, bottom = run.start, run.stop
            if tile.causal:
                outlines.append([(left, top), (left, bottom), (right, bottom)])
            else:
                outlines.append([(left, top), (left, bottom), (right, bottom), (right, top)])
        row += len(run)
    return outlines
