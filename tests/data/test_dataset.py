"""A folder of Hugging Face's datasets: texts or token ids, with splits of its own or without."""

import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from lightning_lss.data import DatasetDataModule
from lightning_lss.data.optional import MissingPackageError
from lightning_lss.data.tokenizer import TokenizerFile
from tests.data.tokenizers_made import END, TEXTS, train

datasets = pytest.importorskip("datasets")
pytest.importorskip("tokenizers")

ROWS = [list(range(i, i + 5)) for i in range(40)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("checkpoint"), eos_token=END)


def save(path: Path, **columns: Any) -> Path:
    datasets.Dataset.from_dict(columns).save_to_disk(str(path), num_shards=2)
    return path


def make_data(path: Path, **options: Any) -> DatasetDataModule:
    given = {"seq_len": 8, "batch_size": 1, "cache_dir": path.parent / "cache", **options}
    return DatasetDataModule(path=path, **given)


def tokens_of(data: DatasetDataModule, split: str = "train") -> list[int]:
    tokens = data.documents[split].tokens
    return tokens.read(0, len(tokens)).tolist()


def test_texts_are_tokenized_and_each_row_is_a_document(tmp_path: Path, checkpoint: Path) -> None:
    data = make_data(save(tmp_path / "d", text=TEXTS * 3, other=[0] * 9), tokenizer=checkpoint, packed=True)
    reader = TokenizerFile(checkpoint)
    expected = [piece.ids for piece in reader.encode((text, True) for text in TEXTS * 3)]
    assert tokens_of(data) == [*chain.from_iterable(expected)]
    assert data.documents["train"].of_tokens(0, len(tokens_of(data))).bincount().tolist() == [*map(len, expected)]
    assert data.vocab_size == reader.vocab_size
    num_bytes = sum(len(text.encode()) for text in TEXTS * 3)
    assert data.bytes_per_token == pytest.approx(num_bytes / len(tokens_of(data)))
    data.setup("fit")
    assert next(iter(data.train_dataloader())).keys() == {"inputs", "targets", "position_ids", "mask"}


def test_token_ids_are_taken_as_they_are_and_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "d", input_ids=ROWS)
    assert tokens_of(make_data(path, column="input_ids", vocab_size=50)) == [*chain.from_iterable(ROWS)]
    monkeypatch.setitem(sys.modules, "datasets", None)
    data = make_data(path, column="input_ids", vocab_size=50)
    data.setup()
    assert tokens_of(data) == [*chain.from_iterable(ROWS)]
    assert (data.vocab_size, data.bytes_per_token) == (50, 1.0)
    assert [samples.span for samples in data.datasets.values()] == [range(180), range(180, 190), range(190, 200)]
    with pytest.raises(MissingPackageError, match=r"needs the package 'datasets': pip install datasets"):
        make_data(path, column="input_ids", vocab_size=51).prepare_data()


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["train", "validation", "test"], [0, 1, 2]),
        (["test", "train"], [1, 0, 0]),
        (["train", "dev"], [0, 1, 1]),
        (["train"], [0, 0, 0]),
    ],
)
def test_splits_of_its_own_are_kept(tmp_path: Path, names: list[str], chosen: list[int]) -> None:
    parts = {name: datasets.Dataset.from_dict({"ids": [[i] * 100]}) for i, name in enumerate(names)}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "d"))
    data = make_data(tmp_path / "d", column="ids", vocab_size=3, splits=(0.5, 0.25, 0.25))
    data.setup()
    firsts = [data.datasets[split][0]["inputs"].tolist() for split in ("train", "val", "test")]
    assert firsts == [[index] * 8 for index in chosen]
    sizes = [len(samples.span) for samples in data.datasets.values()]
    assert sizes == ([50, 25, 25] if len(names) == 1 else [100] * 3)


@pytest.mark.parametrize(
    ("columns", "options", "words"),
    [
        ({"ids": ROWS}, {}, r"needs data\.tokenizer=\.\.\. if .* or data\.vocab_size=\.\.\. if"),
        ({"ids": ROWS}, {"vocab_size": 9}, r"has no column 'text' \(data\.column=\.\.\.\)\. It has 'ids'"),
        ({"ids": ROWS}, {"vocab_size": 9, "column": "ids"}, r"Document 5 has tokens from 5 to 9, outside \[0, 9\)"),
        ({"ids": ROWS}, {"vocab_size": 0}, "vocab_size=0 must be a positive integer"),
        ({"text": TEXTS}, {"vocab_size": 9}, r"has texts: add the tokenizer for them \(data\.tokenizer="),
        ({"text": [0.5, 1.5]}, {"vocab_size": 9}, "Row 0 of column 'text' is neither a text nor a list of token ids"),
    ],
)
def test_what_cannot_be_right_is_refused(tmp_path: Path, columns: Any, options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_data(save(tmp_path / "d", **columns), **options).prepare_data()


def test_rows_without_a_text_are_refused(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="Row 1 of column 'text' is None, not a text"):
        make_data(save(tmp_path / "d", text=["a", None]), tokenizer=checkpoint).prepare_data()


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a dataset's folder: save one with dataset\.save_to_disk"):
        make_data(tmp_path, vocab_size=9)
    with pytest.raises(FileNotFoundError, match=r"nowhere' does not exist"):
        make_data(tmp_path / "nowhere", vocab_size=9)
    datasets.DatasetDict({"all": datasets.Dataset.from_dict({"text": TEXTS})}).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(ValueError, match="are all: one must be called train"):
        make_data(tmp_path / "d", vocab_size=9)
