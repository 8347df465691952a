import pickle
import sysconfig
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import RandomSampler, SequentialSampler

from lightning_lss import LSSTransformer
from lightning_lss.data import RecallDataModule, StdlibDataModule, TextDataModule
from lightning_lss.data.sequences import TokenFiles, WindowDataset, spans_by_position
from lightning_lss.nn.loss import IGNORED


def write(path: Path, values: Any, dtype: str = "uint8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.asarray(values, dtype=dtype).tofile(path)
    return path


def make_text(tmp_path: Path, length: int = 200, **options: Any) -> TextDataModule:
    """Bytes 0, 1, 2, ...; splits of 80, 10 and 10 %."""
    path = write(tmp_path / "text", np.arange(length) % 256)
    data = TextDataModule(**{"path": path, "seq_len": 4, "batch_size": 3, "splits": (0.8, 0.1, 0.1), **options})
    data.setup()
    return data


class TestTokenFiles:
    @pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int32", "int64"])
    def test_reads_every_piece_of_several_files(self, tmp_path: Path, dtype: str) -> None:
        sizes = [3, 0, 1, 5, 0]
        values = torch.arange(9) * 7
        parts = values.split(sizes)
        tokens = TokenFiles([write(tmp_path / str(i), part, dtype) for i, part in enumerate(parts)], dtype)
        assert len(tokens) == 9
        for start in range(9):
            for stop in range(start + 1, 10):
                piece = tokens.read(start, stop)
                assert piece.dtype == torch.int64
                assert torch.equal(piece, values[start:stop])

    def test_keeps_values_beyond_the_signed_range(self, tmp_path: Path) -> None:
        tokens = TokenFiles([write(tmp_path / "text", [2**32 - 1, 7], "uint32")], "uint32")
        assert tokens.read(0, 2).tolist() == [2**32 - 1, 7]

    @pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 4), (2, 2), (3, 2)])
    def test_refuses_what_is_not_there(self, tmp_path: Path, start: int, stop: int) -> None:
        with pytest.raises(AssertionError):
            TokenFiles([write(tmp_path / "text", [1, 2, 3])]).read(start, stop)

    def test_a_file_larger_than_memory_works_and_pickles_without_its_data(self, tmp_path: Path) -> None:
        path, size = tmp_path / "large", 1 << 38
        with path.open("wb") as file:
            file.truncate(size - 2)  # a hole, which takes no space on disk
            file.seek(size - 2)
            file.write(b"\x05\x06")
        pickled = pickle.dumps(WindowDataset(TokenFiles([path]), 7, 256))
        assert len(pickled) < 1000
        samples = pickle.loads(pickled)
        assert len(samples) == (size - 1) // 7
        assert samples.tokens.read(size - 3, size).tolist() == [0, 5, 6]

    def test_refuses_a_size_that_is_no_multiple_of_a_token(self, tmp_path: Path) -> None:
        with pytest.raises(
            ValueError, match=r"text has 3 bytes, which is not a multiple of the 2 bytes .* dtype='uint16'"
        ):
            TokenFiles([write(tmp_path / "text", [1, 2, 3])], "uint16")

    def test_refuses_an_unknown_dtype(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="dtype='float32' is unknown: choose one of 'uint8'"):
            TokenFiles([write(tmp_path / "text", [1])], "float32")


class TestWindowDataset:
    def test_windows_overlap_by_the_one_token_that_is_only_a_target(self, tmp_path: Path) -> None:
        tokens = TokenFiles([write(tmp_path / "a", range(5)), write(tmp_path / "b", range(5, 14))])
        samples = WindowDataset(tokens, 4, 256, range(1, 14))
        assert [sample["inputs"].tolist() for sample in samples] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
        assert [sample["targets"].tolist() for sample in samples] == [[2, 3, 4, 5], [6, 7, 8, 9], [10, 11, 12, 13]]

    @pytest.mark.parametrize(("length", "count"), [(5, 1), (8, 1), (9, 2), (12, 2), (13, 3)])
    def test_length(self, tmp_path: Path, length: int, count: int) -> None:
        samples = WindowDataset(TokenFiles([write(tmp_path / "text", range(length))]), 4, 256)
        assert len(samples) == count
        with pytest.raises(IndexError, match=f"Sample {count} does not exist"):
            samples[count]

    @pytest.mark.parametrize("length", [0, 4])
    def test_refuses_a_short_text(self, tmp_path: Path, length: int) -> None:
        with pytest.raises(
            ValueError, match=rf"holds {length} tokens, fewer than .* 5 .* at most {max(0, length - 1)}"
        ):
            WindowDataset(TokenFiles([write(tmp_path / "text", range(length))]), 4, 256)

    @pytest.mark.parametrize(("values", "limits"), [([3, 10, 4], "3 to 10"), ([3, -1, 4], "-1 to 4")])
    def test_refuses_a_token_that_the_model_does_not_know(self, tmp_path: Path, values: list[int], limits: str) -> None:
        samples = WindowDataset(TokenFiles([write(tmp_path / "text", values, "int32")], "int32"), 2, 10)
        with pytest.raises(ValueError, match=rf"Tokens 0 to 2 range from {limits}, outside \[0, 10\)"):
            samples[0]


class TestSplits:
    def test_they_cover_the_stream_in_order(self) -> None:
        spans = spans_by_position(1003, (0.9, 0.05, 0.05))
        assert spans == {"train": range(903), "val": range(903, 953), "test": range(953, 1003)}

    @pytest.mark.parametrize("shares", [(0.9, 0.1), (0.9, 0.1, 0.0), (0.9, 0.1, 0.1), (1.2, -0.1, -0.1)])
    def test_refuses_other_shares(self, shares: tuple[float, ...]) -> None:
        with pytest.raises(ValueError, match=r"splits=.* must be three positive shares"):
            spans_by_position(100, shares)


class TestLoaders:
    def test_batches_are_whole_sequences_of_int64(self, tmp_path: Path) -> None:
        batch = next(iter(make_text(tmp_path).val_dataloader()))
        assert batch.keys() == {"inputs", "targets"}
        assert batch["inputs"].dtype == batch["targets"].dtype == torch.int64
        assert batch["inputs"].tolist() == [[160, 161, 162, 163], [164, 165, 166, 167], [168, 169, 170, 171]]
        assert torch.equal(batch["targets"], batch["inputs"] + 1)

    def test_training_is_shuffled_and_drops_the_rest(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        loader = make_text(tmp_path).train_dataloader()
        assert isinstance(loader.sampler, RandomSampler)
        assert loader.drop_last
        batches = list(loader)
        assert [len(batch["inputs"]) for batch in batches] == [3] * 13  # of 39 windows in 160 tokens
        firsts = torch.cat([batch["inputs"][:, 0] for batch in batches])
        assert sorted(firsts.tolist()) == list(range(0, 156, 4))
        assert firsts.tolist() != sorted(firsts.tolist())

    def test_evaluation_is_in_order_and_complete(self, tmp_path: Path) -> None:
        data = make_text(tmp_path)
        assert (data.vocab_size, data.bytes_per_token) == (256, 1.0)
        loaders = [data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()]
        for loader, first in zip(loaders, (160, 180, 180)):
            assert isinstance(loader.sampler, SequentialSampler)
            inputs = torch.cat([batch["inputs"] for batch in loader])
            assert inputs[:, 0].tolist() == list(range(first, first + 16, 4))

    def test_workers_give_the_same_batches(self, tmp_path: Path) -> None:
        here = list(make_text(tmp_path).test_dataloader())
        loader = make_text(tmp_path, num_workers=1).test_dataloader()
        assert loader.persistent_workers
        for one, other in zip(here, loader, strict=True):
            assert torch.equal(one["inputs"], other["inputs"])

    @pytest.mark.parametrize(
        ("stage", "splits"),
        [("fit", "train val"), ("validate", "val"), ("test", "test"), ("predict", "test"), (None, "train val test")],
    )
    def test_setup_makes_what_the_stage_needs(self, stage: str | None, splits: str) -> None:
        data = RecallDataModule(seq_len=4, batch_size=1)
        data.setup(stage)
        assert [*data.datasets] == splits.split()

    def test_refuses_a_batch_larger_than_the_training_split(self) -> None:
        with pytest.raises(ValueError, match="has 3 samples of seq_len=4, fewer than batch_size=4"):
            RecallDataModule(seq_len=4, batch_size=4, train_samples=3).setup("fit")

    @pytest.mark.parametrize("wrong", [{"seq_len": 0}, {"batch_size": 0}, {"num_workers": -1}])
    def test_refuses_sizes_out_of_range(self, wrong: dict[str, int]) -> None:
        def make_loader() -> Any:
            data = RecallDataModule(**{"seq_len": 4, "batch_size": 1, **wrong})
            data.setup()
            return data.val_dataloader()

        with pytest.raises(ValueError, match=r"must be a positive integer|should be non-negative"):
            make_loader()

    def test_trainer_runs_all_stages(self) -> None:
        data = RecallDataModule(seq_len=8, batch_size=2, vocab_size=5, train_samples=8, val_samples=3)
        model = LSSTransformer(vocab_size=5, seq_len=8, width=8, num_layers=1, num_heads=1)
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
        )
        trainer.fit(model, datamodule=data)
        assert trainer.global_step == 4
        assert "test/loss" in trainer.test(model, datamodule=data, verbose=False)[0]
        predictions = trainer.predict(model, datamodule=data)
        assert [tuple(x.shape) for x in predictions or []] == [(2, 8), (1, 8)]


class TestText:
    def test_folder_is_read_in_the_order_of_paths_without_hidden_files(self, tmp_path: Path) -> None:
        for name, value in [("b.txt", 3), ("a/z.txt", 2), ("a/b.py", 1), (".git/x", 9), (".hidden", 9)]:
            write(tmp_path / name, [value] * 20)
        data = TextDataModule(path=tmp_path, seq_len=2, batch_size=1)
        assert data.tokens.read(0, 60).tolist() == [1] * 20 + [2] * 20 + [3] * 20

    def test_pattern_selects_files(self, tmp_path: Path) -> None:
        for name, value in [("b.txt", 3), ("a/z.txt", 2), ("a/b.py", 1)]:
            write(tmp_path / name, [value] * 20)
        data = TextDataModule(path=str(tmp_path), seq_len=2, batch_size=1, pattern="**/*.txt")
        assert data.tokens.read(0, 40).tolist() == [2] * 20 + [3] * 20

    def test_token_files_of_other_types(self, tmp_path: Path) -> None:
        path = write(tmp_path / "tokens", np.arange(1000) * 50, "uint16")
        options: dict[str, Any] = dict(path=path, seq_len=4, batch_size=2, dtype="uint16")
        data = TextDataModule(**options, vocab_size=50257, bytes_per_token=4.2)
        assert (data.vocab_size, data.bytes_per_token) == (50257, 4.2)
        data.setup("test")
        batch = next(iter(data.test_dataloader()))
        assert batch["inputs"][0].tolist() == [47500, 47550, 47600, 47650]
        with pytest.raises(ValueError, match="vocab_size is required with dtype='uint16'"):
            TextDataModule(**options)

    def test_refuses_a_missing_path(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"none' does not exist.*data\.path="):
            TextDataModule(path=tmp_path / "none", seq_len=4, batch_size=1)

    def test_refuses_a_folder_without_files(self, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        with pytest.raises(ValueError, match=r"holds no file that matches pattern='\*\*/\*'"):
            TextDataModule(path=tmp_path, seq_len=4, batch_size=1)

    def test_names_the_split_that_is_too_short(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="The val split holds 20 tokens, fewer than the seq_len"):
            make_text(tmp_path, seq_len=100)

    @pytest.mark.parametrize("wrong", [{"vocab_size": 0}, {"bytes_per_token": 0.0}])
    def test_refuses_numbers_that_are_not_positive(self, tmp_path: Path, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="must be positive"):
            make_text(tmp_path, **wrong)


class TestStdlib:
    def test_splits_share_no_file_and_leave_none_out(self) -> None:
        data = StdlibDataModule(seq_len=1024, batch_size=2)
        data.setup()
        parts = {split: [*samples.tokens.paths] for split, samples in data.datasets.items()}
        empty = [file for file in data.files if file.stat().st_size == 0]
        assert sorted(sum(parts.values(), empty)) == sorted(data.files)
        assert len(set(data.files)) == len(data.files) > 500
        sizes = {split: len(samples.tokens) for split, samples in data.datasets.items()}
        total = sum(sizes.values())
        assert total > 8_000_000
        assert 0.03 < sizes["val"] / total < 0.07
        assert 0.03 < sizes["test"] / total < 0.07

    def test_reads_source_and_no_tests(self) -> None:
        data = StdlibDataModule(seq_len=1024, batch_size=2)
        root = Path(sysconfig.get_path("stdlib"))
        names = [file.relative_to(root).as_posix() for file in data.files]
        assert names == sorted(names)
        assert {"ast.py", "asyncio/events.py", "unittest/case.py"} < set(names)
        assert not any({"test", "tests", "idle_test", "site-packages"} & set(Path(name).parts) for name in names)
        data.setup("fit")
        text = bytes(data.datasets["train"][0]["inputs"].tolist())
        assert text == b"".join(file.read_bytes() for file in data.files[:5])[:1024]
        assert (data.vocab_size, data.bytes_per_token) == (256, 1.0)

    @pytest.mark.parametrize("files", [0, 3])
    def test_refuses_a_stripped_library(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int) -> None:
        root = tmp_path / "python311.zip"
        for index in range(files):
            write(root / f"{index}.py", [1])
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root))
        with pytest.raises(FileNotFoundError, match=rf"holds {files} source files.*data=text data\.path="):
            StdlibDataModule(seq_len=1024, batch_size=2)


def recall_samples(split: str, **options: Any) -> list[tuple[Tensor, Tensor]]:
    data = RecallDataModule(**{"seq_len": 10, "batch_size": 1, "train_samples": 50, "val_samples": 20, **options})
    data.setup()
    return [(sample["inputs"], sample["targets"]) for sample in data.datasets[split]]


class TestRecall:
    def test_second_half_repeats_the_first_and_only_it_counts(self) -> None:
        for inputs, targets in recall_samples("train"):
            assert inputs.dtype == targets.dtype == torch.int64
            assert inputs.shape == targets.shape == (10,)
            assert torch.equal(targets[5:], inputs[:5])
            assert torch.equal(targets[5:-1], inputs[6:])
            assert (targets[:5] == IGNORED).all()

    def test_shortest_sequence(self) -> None:
        for inputs, targets in recall_samples("val", seq_len=2):
            assert targets.tolist() == [IGNORED, inputs[0]]

    def test_every_token_value_occurs(self) -> None:
        tokens = torch.cat([inputs for inputs, _ in recall_samples("train", vocab_size=7)])
        assert tokens.unique().tolist() == list(range(7))

    def test_samples_follow_from_seed_split_and_index(self) -> None:
        def heads(split: str, **options: Any) -> list[tuple[int, ...]]:
            return [tuple(inputs.tolist()) for inputs, _ in recall_samples(split, **options)]

        assert heads("train") == heads("train")
        sets = [heads("train"), heads("val"), heads("test"), heads("train", seed=1)]
        assert [len(samples) for samples in sets] == [50, 20, 20, 50]
        assert len(set().union(*sets)) == 140

    @pytest.mark.parametrize(
        "wrong", [{"seq_len": 9}, {"vocab_size": 1}, {"train_samples": 0}, {"val_samples": 0}, {"seed": -1}]
    )
    def test_refuses_numbers_out_of_range(self, wrong: dict[str, int]) -> None:
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            RecallDataModule(**{"seq_len": 10, "batch_size": 1, **wrong})
