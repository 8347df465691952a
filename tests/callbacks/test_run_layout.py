"""What stands in TensorBoard about the layout of a run, read from its event files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from lightning_lss import AttentionMask, SequenceShard
from lightning_lss.callbacks import RunLayout
from lightning_lss.callbacks.tiles_figure import draw_keys, plan_ranks, share_fetched
from tests.training import LENGTH, VOCAB, Run, SGDTransformer, make_loader, make_module, make_samples, make_trainer


class FloatKeys(SGDTransformer):
    """Gives attention float32 under autocast, as a norm of the keys does."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for block in self.model.blocks:
            block.attention.attention.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))


def fit(rank: int, run: Run, folder: str) -> float:
    """Train with one validation; return its bits per byte."""
    logger = TensorBoardLogger(folder, name="", version="", default_hp_metric=False)
    checkpoint = ModelCheckpoint(Path(folder) / "checkpoints", monitor="val/bits_per_byte")
    options: dict[str, Any] = {"logger": logger, "enable_checkpointing": True, "val_check_interval": run.steps}
    trainer = make_trainer(rank, run, callbacks=[RunLayout(), checkpoint], num_sanity_val_steps=1, **options)
    samples = make_samples(4 * run.global_batch)
    per_rank = run.global_batch * run.size // trainer.world_size
    loader, val_loader = (make_loader(trainer, samples, per_rank) for _ in range(2))
    trainer.fit(make_module(run), loader, val_loader)
    return trainer.callback_metrics["val/bits_per_byte"].item()


def read_events(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def read_table(folder: Path) -> dict[str, str]:
    text = read_events(folder).Tensors("run layout/text_summary")
    assert len(text) == 1
    lines = text[0].tensor_proto.string_val[0].decode().splitlines()[2:]
    return dict(tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in lines)


def test_the_table_says_how_the_run_is_split(world, tmp_path) -> None:
    run = Run(size=2, steps=1, model={"positions": "learned"})
    world.run(4, fit, run, str(tmp_path))
    table = read_table(tmp_path)
    assert table.pop("bytes received per layer and rank, forward") == "1,024"
    assert table == {
        "processes W = D x S": "4 = 2 x 2",
        "sequence length L": f"{LENGTH}",
        "segment length l = L / S": f"{LENGTH // 2}",
        "layout": "zigzag",
        "batch per sequence group": "2",
        "attention": "causal, 2 key/value heads of width 4",
        "visible pairs per row of the batch": f"{LENGTH * (LENGTH + 1) // 2:,} of {LENGTH**2:,}",
        "busiest rank / mean of the ranks": "1.000",
        "parameters": f"{sum(p.numel() for p in make_module(run).parameters()):,}",
        "precision": "32-true",
    }
    assert len(read_events(tmp_path).Images("attention tiles")) == 1


@pytest.mark.parametrize(
    ("ranks", "run", "received"),
    [
        (1, Run(), 0),
        (4, Run(size=4), 2 * (4 * 2 * 4 * 4) * 4 * 3),  # K and V [B, G, l, D], in float32, from three other ranks
        (2, Run(size=2, trainer={"precision": "bf16-mixed"}), 2 * (4 * 2 * 8 * 4) * 2),
        (2, Run(size=2, trainer={"precision": "bf16-mixed"}, module=FloatKeys), 2 * (4 * 2 * 8 * 4) * 2),
        (2, Run(size=2, strategy={"communication_dtype": "bfloat16"}), 2 * (4 * 2 * 8 * 4) * 2),
        (2, Run(size=2, strategy={"megatron": True}), 4 * (4 * 8 * 16) * 4),  # two gathers and two sums of [B, l, E]
    ],
    ids=["one", "float32", "autocast", "float32 under autocast", "communication_dtype", "megatron"],
)
def test_the_table_counts_the_bytes_that_a_rank_receives(world, tmp_path, ranks, run, received) -> None:
    world.run(ranks, fit, replace(run, steps=1), str(tmp_path))
    assert read_table(tmp_path)["bytes received per layer and rank, forward"] == f"{received:,}"


class Packed(SGDTransformer):
    """Gets documents of eight tokens in a batch."""

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        ids = torch.arange(batch["inputs"].size(1)) // 8
        return {**batch, "mask": AttentionMask.documents(ids) & AttentionMask.causal()}


def test_the_table_shows_the_work_of_a_mask(world, tmp_path) -> None:
    run = Run(size=2, steps=1, module=Packed, model={"positions": "rotary"}, strategy={"sequence_dims": None})
    world.run(2, fit, run, str(tmp_path / "zigzag"))
    world.run(2, fit, replace(run, layout="balanced"), str(tmp_path / "balanced"))
    zigzag, balanced = (read_table(tmp_path / layout) for layout in ("zigzag", "balanced"))
    for table in (zigzag, balanced):
        assert table["attention"] == "own mask, 2 key/value heads of width 4"
        assert table["visible pairs per row of the batch"] == f"{2 * 36} of {LENGTH**2}"
    assert balanced["layout"] == "balanced"
    of_a_key = 4 * 2 * 2 * 4 * 4  # batch, heads, K and V, width, bytes
    assert (zigzag["busiest rank / mean of the ranks"], zigzag["bytes received per layer and rank, forward"]) == (
        "1.000",
        f"{8 * of_a_key:,}",  # half of this is needed, but one collective is faster
    )
    # each rank has a document of its own
    assert balanced["bytes received per layer and rank, forward"] == "0"
    assert len(read_events(tmp_path / "balanced").Images("attention tiles")) == 1


def test_hyperparameters_stand_beside_the_monitored_metric(world, tmp_path) -> None:
    value = world.run(2, fit, Run(size=2, steps=2), str(tmp_path))[0]
    events = read_events(tmp_path)
    experiment, start = (
        plugin_data_pb2.HParamsPluginData.FromString(events.SummaryMetadata(f"_hparams_/{tag}").plugin_data.content)
        for tag in ("experiment", "session_start_info")
    )
    assert [info.name.tag for info in experiment.experiment.metric_infos] == ["val/bits_per_byte"]
    hyperparameters = start.session_start_info.hparams
    assert hyperparameters["vocab_size"].number_value == VOCAB
    assert hyperparameters["positions"].string_value == "learned"
    points = {(point.step, round(point.value, 4)) for point in events.Scalars("val/bits_per_byte")}
    assert points == {(1, round(value, 4))}  # the measured value and no placeholder


def test_keys_that_a_rank_holds_and_fetches_are_drawn() -> None:
    shard, colors = SequenceShard(0, 2, "contiguous"), [to_rgb("C0"), to_rgb("C1")]
    plans = plan_ranks(AttentionMask.sliding_window(16), 64, shard)
    axes = Figure().subplots()
    draw_keys(axes, plans, 64, shard)
    drawn = {}
    for patch in axes.patches:  # the last one that lies over a place is seen
        rank, paint = int(patch.get_y()), (patch.get_facecolor()[:3], patch.get_alpha())
        drawn |= {(rank, key): paint for key in range(int(patch.get_x()), int(patch.get_x() + patch.get_width()))}
    fetched = {place for place, (_, alpha) in drawn.items() if alpha is not None}
    assert fetched == {(1, key) for key in range(16, 32)}
    assert drawn.keys() - fetched == {(key // 32, key) for key in range(64)}
    assert all(color == colors[rank] for (rank, _), (color, _) in drawn.items())
    assert share_fetched(plans, 64) == 0.25  # none of 32, and 16 of 32
