"""Draw docs/attention-tiles.png: python docs/make_figures.py (from the repository's root)."""

from pathlib import Path

from matplotlib.figure import Figure

from lightning_lss import AttentionMask, SequenceShard
from lightning_lss.callbacks.tiles_figure import draw_attention_tiles

figure = Figure(figsize=(10, 5), layout="constrained")
for axes, layout in zip(figure.subplots(1, 2), ("contiguous", "zigzag")):
    shard = SequenceShard(0, 4, layout)
    draw_attention_tiles(axes, AttentionMask.causal(), 4096, shard, f"{layout}, S = 4, L = 4,096, causal")
figure.savefig(Path(__file__).parent / "attention-tiles.png", dpi=110)
