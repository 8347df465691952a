"""A batch is cut along the sequence whatever it is packed in, and a sequence group must work on one batch."""

from collections import UserDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_lss.sequence.batch import (
    BatchMask,
    batch_digest,
    check_same_batch,
    masks_by_path,
    split_batch,
    tensors_by_path,
)
from lightning_lss.sequence.layout import STATIC_LAYOUTS
from lightning_lss.sequence.segment import SequenceShard
from lightning_lss.tensor.batch import show_whole

L = 8
SHARD = SequenceShard(1, 2, "contiguous")


def numbered(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


TOKENS, IMAGE, LABELS, WEIGHT = numbered(2, L), numbered(2, L, 3), numbered(2), torch.tensor(0.5)


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


Point = namedtuple("Point", ["x", "y"])  # the older kind


@dataclass
class Sample:
    tokens: Tensor
    name: str = "sample"
    more: Any = field(default_factory=dict)


@dataclass(frozen=True)
class Frozen:
    tokens: Tensor
    name: str = "frozen"


@dataclass(frozen=True, slots=True)
class Slotted:
    tokens: Tensor
    name: str = "slotted"


class Encoding(UserDict):
    """In the manner of transformers' ``BatchEncoding``: entries are attributes too, and something lies beside them."""

    def __init__(self, data: dict[str, Any], encodings: Any = None) -> None:
        super().__init__(data)
        self.encodings = encodings

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None


class Getter:
    """Dict-like by its methods only."""

    def __init__(self, **entries: Any) -> None:
        self.__dict__.update(entries)

    def keys(self) -> list[str]:
        return list(self.__dict__)

    def __getitem__(self, key: str) -> Any:
        return self.__dict__[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.__dict__[key] = value


# -- containers --------------------------------------------------------------------------------------------------------

CONTAINERS = {
    "dict": (lambda: {"a": TOKENS}, lambda batch: batch["a"]),
    "defaultdict": (lambda: defaultdict(list, a=TOKENS), lambda batch: batch["a"]),
    "list": (lambda: [TOKENS], lambda batch: batch[0]),
    "tuple": (lambda: (TOKENS,), lambda batch: batch[0]),
    "NamedTuple": (lambda: Pair(TOKENS, LABELS), lambda batch: batch.x),
    "dataclass": (lambda: Sample(TOKENS), lambda batch: batch.tokens),
    "frozen dataclass": (lambda: Frozen(TOKENS), lambda batch: batch.tokens),
    "slotted dataclass": (lambda: Slotted(TOKENS), lambda batch: batch.tokens),
    "BatchEncoding": (lambda: Encoding({"a": TOKENS}, "beside"), lambda batch: batch.a),
    "dict-like": (lambda: Getter(a=TOKENS), lambda batch: batch["a"]),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_container_keeps_its_type_and_the_original_its_tensors(kind) -> None:
    make, tensor_of = CONTAINERS[kind]
    batch = make()
    part = split_batch(batch, SHARD)
    assert type(part) is type(batch)
    assert part is not batch
    assert torch.equal(tensor_of(part), TOKENS[:, L // 2 :])
    assert tensor_of(batch) is TOKENS


@pytest.mark.parametrize("kind", ["dict", "tuple", "frozen dataclass"])
def test_containers_nest_in_each_other(kind) -> None:
    make, tensor_of = CONTAINERS[kind]
    batch = {"outer": [make(), (make(),)], "sample": Sample(TOKENS, more={"deep": make()})}
    part = split_batch(batch, SHARD)
    for inner in (part["outer"][0], part["outer"][1][0], part["sample"].more["deep"]):
        assert type(inner) is type(make())
        assert torch.equal(tensor_of(inner), TOKENS[:, L // 2 :])
    assert tensor_of(batch["sample"].more["deep"]) is TOKENS


def test_what_lies_beside_the_tensors_is_kept() -> None:
    assert split_batch(Encoding({"a": TOKENS}, "beside"), SHARD).encodings == "beside"
    assert split_batch(Sample(TOKENS), SHARD).name == "sample"
    assert split_batch(defaultdict(list, a=TOKENS), SHARD).default_factory is list
    assert list(split_batch({"b": TOKENS, "a": TOKENS}, SHARD)) == ["b", "a"]


def test_a_tensor_by_itself_is_a_batch() -> None:
    assert torch.equal(split_batch(TOKENS, SHARD), TOKENS[:, L // 2 :])


def test_tensors_of_fewer_than_two_dimensions_and_other_things_are_left_alone() -> None:
    array = object()
    batch = {"labels": LABELS, "weight": WEIGHT, "none": None, "text": "text", "number": 3, "array": array, "empty": []}
    part = split_batch(batch, SHARD)
    assert part.keys() == batch.keys()
    assert all(part[key] is value for key, value in batch.items() if key != "empty")


def test_one_rank_gets_the_very_batch() -> None:
    batch = {"a": TOKENS, "b": numbered(2, 5)}
    assert split_batch(batch, SequenceShard(0, 1)) is batch


@pytest.mark.parametrize("layout", STATIC_LAYOUTS)
@pytest.mark.parametrize("size", [2, 4])
def test_all_tensors_are_cut_at_the_same_positions(size, layout) -> None:
    for rank in range(size):
        shard = SequenceShard(rank, size, layout)
        part = split_batch({"tokens": TOKENS, "image": IMAGE, "labels": LABELS}, shard)
        positions = shard.positions(L // size)
        assert torch.equal(part["tokens"], TOKENS[:, positions])
        assert torch.equal(part["image"], IMAGE[:, positions])


# -- sequence_dims -----------------------------------------------------------------------------------------------------

PIXELS = numbered(2, 3, L)


@pytest.mark.parametrize("dim", [2, -1])
def test_a_dimension_is_named_by_key(dim) -> None:
    part = split_batch({"pixels": PIXELS, "tokens": TOKENS}, SHARD, {"pixels": dim})
    assert torch.equal(part["pixels"], PIXELS[:, :, L // 2 :])
    assert torch.equal(part["tokens"], TOKENS[:, L // 2 :])


def test_none_leaves_a_tensor_whole() -> None:
    one_hot = numbered(2, 5)
    part = split_batch({"class_label": one_hot, "tokens": TOKENS}, SHARD, {"class_label": None})
    assert part["class_label"] is one_hot
    assert torch.equal(part["tokens"], TOKENS[:, L // 2 :])


@pytest.mark.parametrize("batch", [(PIXELS, TOKENS), [PIXELS, TOKENS], Point(PIXELS, TOKENS)])
def test_sequences_are_named_by_index(batch) -> None:
    part = split_batch(batch, SHARD, {0: 2})
    assert torch.equal(part[0], PIXELS[:, :, L // 2 :])
    assert torch.equal(part[1], TOKENS[:, L // 2 :])


def test_a_one_dimensional_tensor_can_be_named() -> None:
    assert torch.equal(split_batch({"track": numbered(L)}, SHARD, {"track": 0})["track"], numbered(L)[L // 2 :])


def test_a_name_holds_for_everything_below_and_the_innermost_counts() -> None:
    batch = {"images": [{"left": PIXELS, "right": PIXELS, "mask": numbered(2, 5)}], "sample": Sample(PIXELS)}
    part = split_batch(batch, SHARD, {"images": 2, "mask": None, "tokens": -1})
    inner = part["images"][0]
    assert torch.equal(inner["left"], PIXELS[:, :, L // 2 :])
    assert torch.equal(inner["right"], PIXELS[:, :, L // 2 :])
    assert inner["mask"].shape == (2, 5)
    assert torch.equal(part["sample"].tokens, PIXELS[:, :, L // 2 :])


@pytest.mark.parametrize("layout", STATIC_LAYOUTS)
@pytest.mark.parametrize("memory", ["rows", "columns", "channels last"])
def test_what_was_cut_can_be_viewed_flat(layout, memory) -> None:
    images = numbered(2, L, 4, 4)
    if memory == "columns":
        images = images.transpose(0, 1).contiguous().transpose(0, 1)
    elif memory == "channels last":
        images = images.contiguous(memory_format=torch.channels_last)
    shard = SequenceShard(1, 2, layout)
    part = split_batch({"images": images}, shard)["images"]
    assert torch.equal(part.view(-1), images[:, shard.positions(L // 2)].flatten())


# -- errors ------------------------------------------------------------------------------------------------------------


def test_disagreement_names_keys_shapes_and_remedies() -> None:
    batch = {"tokens": TOKENS, "meta": {"class": [numbered(2, 5)]}}
    words = (
        r"disagree on the sequence length \(dimension 1\): tokens \(2, 8\); meta\.class\.0 \(2, 5\)\."
        r".*sequence_dims=.*shard_batch"
    )
    with pytest.raises(ValueError, match=words):
        split_batch(batch, SHARD)


def test_named_tensors_may_be_of_another_length() -> None:
    part = split_batch({"tokens": TOKENS, "audio": numbered(2, 4 * L)}, SHARD, {"audio": 1})
    assert part["audio"].shape == (2, 2 * L)


@pytest.mark.parametrize(
    ("length", "layout", "words"),
    [
        (7, "contiguous", r"Batch entry tokens \(2, 7\), dimension 1: .*length 7 .*divisible by 2"),
        (6, "zigzag", r"Batch entry tokens \(2, 6\), dimension 1: .*length 6 .*divisible by 4 \(twice"),
        (0, "contiguous", r"Batch entry tokens \(2, 0\), dimension 1: .*length 0"),
    ],
)
def test_a_length_that_cannot_be_shared_names_the_entry(length, layout, words) -> None:
    with pytest.raises(ValueError, match=words):
        split_batch({"tokens": numbered(2, length)}, SequenceShard(0, 2, layout))


def test_the_length_along_a_named_dimension_is_checked_too() -> None:
    with pytest.raises(ValueError, match=r"Batch entry pixels \(2, 3, 7\), dimension 2: .*length 7"):
        split_batch({"pixels": numbered(2, 3, 7), "tokens": TOKENS}, SHARD, {"pixels": 2})


def test_a_length_that_cannot_be_shared_says_how_to_name_another_dimension() -> None:
    image = numbered(2, 3, L)
    with pytest.raises(ValueError, match=r"write LSSStrategy\(sequence_dims=\{'pixels': dimension or None\}\)\.$"):
        split_batch({"more": {"pixels": image}}, SHARD)
    with pytest.raises(ValueError, match=r"define shard_batch\(self, batch, shard\)") as error:
        split_batch(image, SHARD)
    assert "sequence_dims" not in str(error.value)  # a tensor by itself has no key


@pytest.mark.parametrize("dim", [3, -4])
def test_a_dimension_that_does_not_exist_is_refused(dim) -> None:
    with pytest.raises(ValueError, match=rf"names dimension {dim} of pixels \(2, 3, 8\), which has 3 dimensions"):
        split_batch({"pixels": PIXELS}, SHARD, {"pixels": dim})


# -- one batch for a sequence group ------------------------------------------------------------------------------------

VARIANTS = {
    "another value": lambda: {"tokens": TOKENS + 1, "labels": LABELS},
    "another order": lambda: {"tokens": TOKENS.flip(0), "labels": LABELS},
    "another shape": lambda: {"tokens": TOKENS.reshape(4, 4), "labels": LABELS},
    "another dtype": lambda: {"tokens": TOKENS.view(torch.float64), "labels": LABELS},
    "another key": lambda: {"inputs": TOKENS, "labels": LABELS},
    "one tensor less": lambda: {"tokens": TOKENS},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_digest_sees_every_difference(variant) -> None:
    assert batch_digest(VARIANTS[variant]()) != batch_digest({"tokens": TOKENS, "labels": LABELS})


def test_the_digest_sees_values_and_not_memory() -> None:
    strided = {"tokens": TOKENS.T.contiguous().T, "labels": LABELS.clone()}
    assert batch_digest(strided) == batch_digest({"tokens": TOKENS, "labels": LABELS})


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize("shape", [(), (0,), (3, 2)])
def test_the_digest_takes_any_tensor_and_fits_int64(shape, dtype) -> None:
    digest = batch_digest([torch.ones(shape, dtype=dtype)])
    assert 0 <= digest < 2**63
    assert torch.tensor([digest]).dtype == torch.int64


@pytest.mark.parametrize(
    "make",
    [
        lambda x: torch.nested.nested_tensor([x, x[:5]], layout=torch.jagged),
        lambda x: torch.nested.nested_tensor([x, x[:5]]),
        lambda x: torch.stack([x, x]).to_sparse(),
        lambda x: torch.stack([x, x]).to_sparse_csr(),
    ],
)
def test_nested_and_sparse_tensors_are_compared_and_left_whole(make) -> None:
    batch = {"tokens": TOKENS, "own": make(torch.arange(float(L)))}
    assert batch_digest(batch) == batch_digest({"tokens": TOKENS, "own": make(torch.arange(float(L)))})
    assert batch_digest(batch) != batch_digest({"tokens": TOKENS, "own": make(torch.arange(float(L)) * 2)})
    assert split_batch(batch, SHARD)["own"] is batch["own"]
    assert show_whole(batch, SHARD)["own"] is batch["own"]


def check_on_rank(rank: int, batches: list[Any]) -> str:
    pair, _ = dist.new_subgroups_by_enumeration([[0, 1], [2, 3]][: dist.get_world_size() // 2])
    try:
        check_same_batch(batches[rank], pair, torch.device("cpu"))
    except ValueError as error:
        return str(error)
    return ""


def test_a_sequence_group_with_one_batch_passes(world) -> None:
    assert world.run(2, check_on_rank, [{"a": TOKENS}, {"a": TOKENS.clone()}]) == ["", ""]


def test_a_sequence_group_with_two_batches_raises_on_every_rank_and_names_causes(world) -> None:
    for message in world.run(2, check_on_rank, [{"a": TOKENS}, {"a": TOKENS + 1}]):
        assert "given different batches" in message
        for cause in ("DistributedSampler", "seed_everything", "IterableDataset", "data_rank"):
            assert cause in message


def test_groups_are_compared_each_by_itself(world) -> None:
    batches = [{"a": TOKENS}, {"a": TOKENS}, {"a": TOKENS + 1}, {"a": TOKENS + 2}]
    assert [bool(message) for message in world.run(4, check_on_rank, batches)] == [False, False, True, True]


@dataclass(frozen=True)
class MaskLike(BatchMask):
    """An attention mask, of which only the interface matters here; its tensor is not one of the batch."""

    ids: Tensor
    content_digest: int = 1
    digest: bytes = b""

    def select(self, positions: Tensor) -> "MaskLike":
        raise NotImplementedError

    def chunk_work(self, length: int, num_chunks: int, *, batch: int | None = None) -> None: ...


def test_a_mask_stays_whole_and_is_compared() -> None:
    mask = MaskLike(numbered(2, 8))
    batch = {"tokens": numbered(2, 8), "more": [mask]}
    assert split_batch(batch, SHARD)["more"][0] is mask
    assert list(masks_by_path(batch)) == [(("more", 0), mask)]
    assert [path for path, _ in tensors_by_path(batch)] == [("tokens",)]
    other = {**batch, "more": [MaskLike(mask.ids, 2)]}
    assert batch_digest(batch) != batch_digest(other) == batch_digest(other)
