"""The figure of masks: what it counts against sums done by hand, and its command on tiny sizes."""

import csv

import pytest
import torch

from benchmarks import mask_counts, masks
from benchmarks.__main__ import main
from lightning_lss import AttentionMask


@pytest.mark.parametrize("layout", mask_counts.LAYOUTS)
def test_work_and_keys_are_counted_as_in_the_dense_mask(layout) -> None:
    mask = mask_counts.packed_documents(mask_counts.lognormal(0, 20), 256)
    visible = mask.dense(256)[0, 0]
    places = mask_counts.places(mask, 256, 4, layout)
    counted = mask_counts.count(mask, 256, places)
    own = [place.positions(64) for place in places]
    assert counted.pairs == [int(visible[positions].sum()) for positions in own]
    assert counted.imbalance == 4 * max(counted.pairs) / int(visible.sum())
    for positions, received in zip(own, counted.received):
        seen = visible[positions].any(0)
        seen[positions] = False
        assert int(seen.sum()) <= received <= 192  # runs of keys may have gaps


def test_a_window_receives_its_width_from_the_left() -> None:
    mask = AttentionMask.sliding_window(7)
    counted = mask_counts.count(mask, 128, mask_counts.places(mask, 128, 4, "contiguous"))
    assert counted.received == [0, 7, 7, 7]
    assert counted.returned == [7, 7, 7, 0]
    assert counted.fraction_received == pytest.approx([0, 7 / 96, 7 / 96, 7 / 96])


def test_where_everything_is_gathered_it_is_counted() -> None:
    mask = AttentionMask.full()
    counted = mask_counts.count(mask, 128, mask_counts.places(mask, 128, 4, "zigzag"))
    assert counted.received == counted.returned == [96] * 4


def test_heaviest_first_gives_every_rank_as_many_chunks() -> None:
    assignment = mask_counts.heaviest_first(torch.tensor([9, 1, 1, 1, 5, 4, 1, 1]).numpy(), 2)
    assert assignment.chunks == ((0, 1, 3, 7), (2, 4, 5, 6))


def test_documents_fill_the_sequence() -> None:
    mask = mask_counts.even_documents(64, 8192)
    assert mask.num_queries == 8192
    visible = mask.dense(8192)[0, 0]
    starts = (visible.sum(1) == 1).sum()  # the first query of a document sees itself alone
    assert int(starts) == 64
    assert not visible.triu(1).any()


def test_the_figure_from_the_command_line(tmp_path) -> None:
    main(["masks", "--quick", "--output", str(tmp_path)])
    assert (tmp_path / "masks.png").stat().st_size > 0
    with open(tmp_path / "masks.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(row["check"], row["mask"], row["contestant"]): row for row in rows}
    assert {row["check"] for row in rows} == set(masks.BARS)
    work = {name: float(found[masks.WORK, masks.LOGNORMAL, name]["value"]) for name in mask_counts.LAYOUTS}
    assert work["balanced"] < work["zigzag"]
    window = [row for row in rows if row["mask"] == masks.WINDOW]
    assert {row["contestant"] for row in window} == {"zigzag", "contiguous", "balanced"}
    assert all(float(row["value"]) < 0.5 and int(row["received_bytes"]) > 0 for row in window)
    parts = {row["contestant"]: float(row["value"]) for row in rows if row["check"] == masks.PLANNING}
    assert parts["all of the plan"] > max(parts["structure"], parts["assignment"])
    assert float(found[masks.SPEED, masks.SHORT, "balanced"]["gradient_error"]) < 1e-4


def test_other_traffic_than_planned_is_no_result() -> None:
    with pytest.raises(SystemExit, match="rank 1 received 5 bytes, and its plan says 4"):
        mask_counts.check_traffic([4, 5], [4, 4])
