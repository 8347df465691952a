"""Draw the pictures of the documents, and write the tables of docs/masks.md: python docs/make_figures.py.

The masks are those of the code blocks of docs/masks.md.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from lightning_lss import AttentionMask, SequenceShard
from lightning_lss.attention.kernels import FEATURES, KERNELS, Kernel
from lightning_lss.attention.kinds import Sizes
from lightning_lss.attention.plan import Call, features_of
from lightning_lss.callbacks.tiles_figure import draw_attention_tiles, draw_keys, plan_ranks, share_fetched
from lightning_lss.strategy.balancing import BatchLayouts

DOCS = Path(__file__).parent
LENGTH, RANKS = 4096, 4  # of the pictures
LONG, MANY = 131_072, 8  # of the second table
LAYOUTS = {"causal": ("contiguous", "zigzag"), "full": ("zigzag",)}  # of all others zigzag and balanced

TITLES = {
    "causal": "causal",
    "full": "full",
    "window": "a window of 512",
    "chunked": "blocks of 1,000, causal",
    "prefix": "a prefix of 1,400",
    "documents": "9 documents, causal",
    "padding": "1,396 of padding, causal",
    "dense": "chosen blocks of 200, a table",
    "function": "near in an image, as a function",
    "combined": "a window or the first 256 keys",
}

DEVICES = {
    "cpu_flash": ("CPU", "any"),
    "cuda_flash": ("NVIDIA from Ampere; AMD without windows", "float16, bfloat16; heads up to 256"),
    "cudnn": ("NVIDIA from Ampere", "float16, bfloat16; heads up to 128"),
    "efficient": ("NVIDIA", "float32, float16, and bfloat16 from Ampere"),
    "flex": ("NVIDIA from Ampere and AMD, with Triton", "float32, float16, bfloat16; heads up to 256"),
    "reference": ("any", "any; float64"),
}


def code_blocks(document: Path) -> str:
    """Return the Python of a document, one block after the other."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE))


def masks_of_pictures() -> dict[str, AttentionMask]:
    """Return the masks of docs/masks.md by name."""
    names: dict[str, Any] = {"__name__": "masks"}
    exec(code_blocks(DOCS / "masks.md"), names)
    return {name: names[name] for name in TITLES}


def long_masks() -> dict[str, AttentionMask]:
    """Return masks of LONG sequences by title."""
    causal, random = AttentionMask.causal(), np.random.default_rng(1)
    lengths = np.exp(random.normal(np.log(2048), 1.2, LONG)).astype(int) + 1
    stops = np.cumsum(lengths)
    starts = torch.tensor([0, *stops[stops < LONG].tolist(), LONG])
    valid = torch.arange(LONG)[None] < 100_000
    return {
        "causal": causal,
        "full": AttentionMask.full(),
        "a window of 4,096": AttentionMask.sliding_window(4095),
        "blocks of 8,192, causal": AttentionMask.chunked(8192) & causal,
        "a prefix of 16,384": AttentionMask.prefix(16_384),
        f"{len(starts) - 1} documents, causal": AttentionMask.documents(cu_seqlens=starts) & causal,
        "31,072 of padding, causal": AttentionMask.padding(valid) & causal,
    }


# -- tables ------------------------------------------------------------------------------------------------------------


def shard_for(mask: AttentionMask, length: int, size: int, layout: str) -> SequenceShard:
    """Return the shard of the first of ``size`` ranks for a batch with a mask."""
    batch = {"tokens": torch.zeros(1, length), "mask": mask}
    place = SequenceShard(0, size, "zigzag" if layout == "auto" else layout)
    return BatchLayouts(layout).shard_for(batch, torch.nn.Identity(), place, None)


def cost_row(title: str, mask: AttentionMask, length: int, size: int) -> Iterable[str]:
    """Describe what a mask costs under zigzag and balanced."""
    yield title
    for layout in ("zigzag", "balanced"):
        plans = plan_ranks(mask, length, shard_for(mask, length, size, layout))
        pairs = [plan.pairs for plan in plans]
        if layout == "zigzag":
            yield f"{100 * sum(pairs) / length**2:.1f} %"
        yield f"{max(pairs) * size / sum(pairs):.2f}"
        yield f"{100 * share_fetched(plans, length):.0f} %"
    yield shard_for(mask, length, size, "auto").layout


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Write a table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cost_table(masks: dict[str, AttentionMask], length: int, size: int) -> str:
    """Write the table of what masks cost."""
    head = ["mask", "pairs", "zigzag: busiest", "keys", "balanced: busiest", "keys", "auto"]
    return markdown(head, (cost_row(title, mask, length, size) for title, mask in masks.items()))


def kernel_table() -> str:
    """Write the table of what kernels take."""
    masks = masks_of_pictures()
    call = Call(Sizes(1, 1, LENGTH, LENGTH), 0, SequenceShard(0, RANKS).held_chunks)
    needs = {name: features_of(mask.packed, call) for name, mask in masks.items()}
    groups = {}
    for name, needed in needs.items():
        groups.setdefault(needed, []).append(name)
    others = {"bias, ALiBi": "bias", "soft-capping": "softcap", "dropout": "dropout"}
    assert set(FEATURES) == {"windows", "offset_diagonal", *others.values()}, "a feature that the table does not show"
    rows = [
        [f"`{name}`", *DEVICES[name], *(_answer(kernel, needed) for needed in groups)]
        + ["yes" if feature in kernel.takes else "no" for feature in others.values()]
        for name, kernel in KERNELS.items()
    ]
    return markdown(["kernel", "device", "dtypes", *map(", ".join, groups.values()), *others], rows)


def _answer(kernel: Kernel, needed: frozenset[str]) -> str:
    if needed <= kernel.takes and (kernel.skips_hidden or "windows" not in needed):
        return "yes"
    return "in small tiles" if "bias" in kernel.takes else "no"


def tables() -> dict[str, str]:
    """Return the tables of docs/masks.md by name."""
    pictures = {TITLES[name]: mask for name, mask in masks_of_pictures().items()}
    return {
        "pictures": cost_table(pictures, LENGTH, RANKS),
        "long": cost_table(long_masks(), LONG, MANY),
        "kernels": kernel_table(),
    }


def with_tables(text: str) -> str:
    """Return the text of docs/masks.md with its tables as they should be."""
    for name, table in tables().items():
        before, _, rest = text.partition(f"<!-- table: {name} -->\n")
        end = "<!-- end -->"
        assert end in rest, name
        text = f"{before}<!-- table: {name} -->\n\n{table}\n\n{rest[rest.index(end) :]}"
    return text


# -- pictures ----------------------------------------------------------------------------------------------------------


def draw(path: Path, mask: AttentionMask, layouts: Iterable[str], title: str) -> None:
    """Draw the tiles of a mask under some layouts, and below each the keys that ranks fetch."""
    layouts = list(layouts)
    figure = Figure(figsize=(5 * len(layouts), 6.3), layout="constrained")
    parts = figure.subplots(2, len(layouts), height_ratios=(5, 1), squeeze=False)
    for (tiles, keys), layout in zip(parts.T, layouts):
        shard = shard_for(mask, LENGTH, RANKS, layout)
        draw_attention_tiles(tiles, mask, LENGTH, shard, f"{layout}: {title}")
        draw_keys(keys, plan_ranks(mask, LENGTH, shard), LENGTH, shard)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Draw and write everything."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    for axes, layout in zip(figure.subplots(1, 2), ("contiguous", "zigzag")):
        title = f"{layout}, S = 4, L = 4,096, causal"
        draw_attention_tiles(axes, AttentionMask.causal(), LENGTH, SequenceShard(0, RANKS, layout), title)
    figure.savefig(DOCS / "attention-tiles.png", dpi=110)
    (DOCS / "masks").mkdir(exist_ok=True)
    for name, mask in masks_of_pictures().items():
        draw(DOCS / "masks" / f"{name}.png", mask, LAYOUTS.get(name, ("zigzag", "balanced")), TITLES[name])
    document = DOCS / "masks.md"
    document.write_text(with_tables(document.read_text()))


if __name__ == "__main__":
    main()
