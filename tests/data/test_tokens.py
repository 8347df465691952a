"""Texts as a tokenizer's tokens: which tokens, made once, and packed documents."""

import gzip
import random
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_lss import LSSTransformer
from lightning_lss.data import TokensDataModule
from lightning_lss.data import tokens as tokens_module
from lightning_lss.data.documents import Documents, Piece
from lightning_lss.data.optional import MissingPackageError
from lightning_lss.data.tokenizer import TokenizerFile, in_pieces, read_text
from lightning_lss.nn.loss import IGNORED
from tests.data.tokenizers_made import END, TEXTS, train

Tokenizer = pytest.importorskip("tokenizers").Tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer that names its end token."""
    return train(tmp_path_factory.mktemp("checkpoint"), eos_token=END)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for index, text in enumerate(TEXTS):
        (folder / f"{index}.txt").write_bytes((text * 5).encode())
    return folder


def make_tokens(path: Path, checkpoint: Path, **options: Any) -> TokensDataModule:
    given = {"tokenizer": checkpoint, "seq_len": 8, "batch_size": 2, "cache_dir": path.parent / "cache", **options}
    return TokensDataModule(path=path, **given)


def all_tokens(data: TokensDataModule) -> list[int]:
    tokens = data.documents["train"].tokens
    return tokens.read(0, len(tokens)).tolist()


class TestTokens:
    def test_are_those_of_the_texts_alone_and_an_end_after_each(self, texts: Path, checkpoint: Path) -> None:
        data = make_tokens(texts, checkpoint)
        whole = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        whole.no_truncation()
        whole.no_padding()
        ends = [[*whole.encode(text * 5, add_special_tokens=False).ids, 0] for text in TEXTS]
        assert all_tokens(data) == [*chain.from_iterable(ends)]
        assert whole.decode(ends[2]) == TEXTS[2] * 5
        stops = [0, *torch.tensor([len(ids) for ids in ends]).cumsum(0).tolist()]
        assert data.documents["train"].of_tokens(0, stops[-1]).bincount().tolist() == [len(ids) for ids in ends]
        num_bytes = sum(len(text.encode()) * 5 for text in TEXTS)
        assert data.bytes_per_token == pytest.approx(num_bytes / stops[-1])
        assert data.vocab_size == whole.get_vocab_size()

    @pytest.mark.parametrize(
        ("settings", "given", "end"),
        [
            ({}, {}, None),
            ({"eos_token": END}, {}, 0),
            ({"eos_token": {"content": END}}, {}, 0),
            ({"eos_token": END}, {"end_token": None}, None),
            ({"eos_token": None}, {"end_token": "<pad>"}, 1),
        ],
    )
    def test_end_token(self, tmp_path: Path, settings: dict[str, Any], given: dict[str, Any], end: int | None) -> None:
        assert TokenizerFile(train(tmp_path, **settings), **given).end == end

    def test_a_vocabulary_with_gaps_ends_with_its_largest_token(self, tmp_path: Path) -> None:
        library = pytest.importorskip("tokenizers")
        library.Tokenizer(library.models.WordLevel({"a": 0, "b": 70000}, "a")).save(str(tmp_path / "tokenizer.json"))
        assert TokenizerFile(tmp_path / "tokenizer.json").vocab_size == 70001

    @pytest.mark.parametrize("size", [1, 5, 17, 64])
    def test_pieces_of_a_text_make_it_up(self, size: int) -> None:
        drawn = random.Random(size)
        for _ in range(20):
            text = "".join(drawn.choices(["a", "of", "it's", "—", "\n", "\n\n", " ", "  ", "\t", " \n"], k=60))
            pieces = list(in_pieces(["", text[:7], text[7:50], text[50:]], size))
            assert "".join(piece for piece, _ in pieces) == text
            assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True]
            assert max(len(piece) for piece, _ in pieces) <= size

    @pytest.mark.parametrize("end", ["\n", " "], ids=["lines", "words"])
    def test_a_long_text_has_the_tokens_it_has_as_a_whole(self, checkpoint: Path, end: str) -> None:
        reader, white = TokenizerFile(checkpoint), [end * 3, f"  {end}", f"{end}   ", f"{end}\t"]
        text = "".join(f"line {i}, it's {i * i}.{white[i // 3 % 4] if i % 3 == 0 else end}" for i in range(300))
        pieces = list(in_pieces([text], 100))
        assert len(pieces) > 40
        cut = [tokens for piece in reader.encode(pieces) for tokens in piece.ids]
        assert cut == [tokens for piece in reader.encode([(text, True)]) for tokens in piece.ids]

    def test_files_are_read_as_utf_8_packed_or_not(self, tmp_path: Path) -> None:
        text = "é\r\n日本" * 9
        for name, content in (("a", text.encode()), ("b", gzip.compress(b"\xef\xbb\xbf" + text.encode()))):
            (tmp_path / name).write_bytes(content)
            assert "".join(piece for piece, _ in read_text(tmp_path / name, 4)) == text
        for content, byte in ((b"ab\xffcd", 2), (text.encode()[:-1], 87)):
            (tmp_path / "c").write_bytes(content)
            with pytest.raises(ValueError, match=rf"c is not a text in UTF-8 \(byte {byte}\).*iconv"):
                list(read_text(tmp_path / "c"))

    def test_are_as_small_as_the_vocabulary_allows(self, tmp_path: Path) -> None:
        for vocab_size, size in ((1 << 16, 2), ((1 << 16) + 1, 4)):
            folder = tmp_path / str(vocab_size)
            folder.mkdir()
            Documents.write(folder, [Piece([0, vocab_size - 1], 3, True)], vocab_size)
            assert (folder / "tokens").stat().st_size == 2 * size
            assert Documents(folder).tokens.read(0, 2).tolist() == [0, vocab_size - 1]
            with pytest.raises(ValueError, match=rf"Document 1 has tokens from 1 to {vocab_size}, outside"):
                Documents.write(folder, [Piece([0], 1, True), Piece([1, vocab_size], 1, True)], vocab_size)

    def test_are_made_once_for_the_same_content(self, texts: Path, checkpoint: Path, monkeypatch: Any) -> None:
        made: list[int] = []
        write = Documents.write
        monkeypatch.setattr(tokens_module.Documents, "write", lambda *given: (made.append(0), write(*given)))
        for _ in range(2):
            data = make_tokens(texts, checkpoint)
            data.prepare_data()
            data.setup()
        assert len(made) == 1
        make_tokens(texts, checkpoint, end_token=None).prepare_data()
        assert len(made) == 2
        (texts / "1.txt").write_text("another text, as long as it needs to be")
        make_tokens(texts, checkpoint).prepare_data()
        make_tokens(texts, train(texts.parent / "other", 300, eos_token=END)).prepare_data()
        assert len(made) == 4


class TestSequences:
    def test_are_cut_from_the_joined_documents(self, texts: Path, checkpoint: Path) -> None:
        data = make_tokens(texts, checkpoint, splits=(0.6, 0.2, 0.2))
        data.setup()
        tokens = all_tokens(data)
        first, batch = data.datasets["train"][1], next(iter(data.val_dataloader()))
        assert first["inputs"].tolist() == tokens[8:16]
        assert first["targets"].tolist() == tokens[9:17]
        start = round(len(tokens) * 0.6)
        assert batch["inputs"].flatten().tolist() == tokens[start : start + 16]
        assert batch.keys() == {"inputs", "targets"}

    def test_packed_ones_see_their_own_document(self, texts: Path, checkpoint: Path) -> None:
        data = make_tokens(texts, checkpoint, packed=True, seq_len=64, splits=(0.9, 0.05, 0.05), batch_size=1)
        assert data.collate_fn is not None
        documents = data.documents["train"]
        samples = tokens_module.PackedDataset(documents, 64, data.vocab_size)
        batch = data.collate_fn([samples[i] for i in range(len(samples))])
        ids = torch.stack([documents.of_tokens(64 * i, 64 * i + 64) for i in range(len(samples))])
        assert len(ids.unique()) == 3
        for row in range(len(ids)):
            for place in range(64):
                earlier = (ids[row, :place] == ids[row, place]).sum()
                assert batch["position_ids"][row, place] == earlier
                last = documents.of_tokens(64 * row + place, 64 * row + place + 2).diff() != 0
                assert (batch["targets"][row, place] == IGNORED) == last
        visible = (ids[:, :, None] == ids[:, None, :]) & torch.ones(64, 64, dtype=torch.bool).tril()
        assert torch.equal(batch["mask"].dense(64)[:, 0], visible)

    @pytest.mark.parametrize("packed", [False, True])
    def test_a_model_trains_on_them(self, texts: Path, checkpoint: Path, packed: bool) -> None:
        options = {"seq_len": 16, "splits": (0.6, 0.2, 0.2), "num_workers": int(packed), "packed": packed}
        data = make_tokens(texts, checkpoint, **options)
        model = LSSTransformer(vocab_size=data.vocab_size, seq_len=16, width=8, num_layers=1, num_heads=1)
        trainer = pl.Trainer(
            accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False
        )
        trainer.fit(model, datamodule=data)
        assert trainer.global_step == 2


class TestRefused:
    def test_without_the_library(self, texts: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tokenizers", None)
        with pytest.raises(MissingPackageError, match=r"needs the package 'tokenizers': pip install tokenizers"):
            make_tokens(texts, checkpoint)

    def test_what_is_not_a_tokenizer(self, texts: Path, tmp_path: Path) -> None:
        with pytest.raises(
            FileNotFoundError, match=r"no tokenizer at .*tokenizer\.json \(data\.tokenizer.*save_pretra"
        ):
            make_tokens(texts, tmp_path)
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer's file"):
            make_tokens(texts, tmp_path)

    def test_an_end_token_that_is_not_in_the_vocabulary(self, texts: Path, checkpoint: Path) -> None:
        with pytest.raises(ValueError, match=r"end_token='</s>' is not in the vocabulary"):
            make_tokens(texts, checkpoint, end_token="</s>")

    def test_nothing_to_learn_from(self, tmp_path: Path, checkpoint: Path) -> None:
        (tmp_path / "empty").touch()
        with pytest.raises(ValueError, match="The documents are empty"):
            make_tokens(tmp_path / "empty", checkpoint, end_token=None).prepare_data()

    def test_archives(self, tmp_path: Path, checkpoint: Path) -> None:
        (tmp_path / "text.zip").write_bytes(b"PK\x03\x04")
        with pytest.raises(ValueError, match=r"text\.zip is a zip file"):
            make_tokens(tmp_path / "text.zip", checkpoint)
