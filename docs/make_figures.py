"""Draw docs/attention-tiles.png: python docs/make_figures.py (from the repository's root)."""

from pathlib import Path

from matplotlib.figure import Figure

from lightning_lss.callbacks.tiles_figure import draw_attention_tiles

figure = Figure(figsize=(10, 5), layout="constrained")
for axes, layout in zip(figure.subplots(1, 2), ("contiguous", "zigzag")):
    draw_attention_tiles(axes, 4096, 4, layout, causal=True)
figure.savefig(Path(__file__).parent / "attention-tiles.png", dpi=110)
