"""FASTA files: what is read, what is refused, and sequences that stay within a record."""

import bz2
import gzip
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_lss.data import FastaDataModule
from lightning_lss.data import fasta as fasta_module
from lightning_lss.data.fasta import Alphabet, _parts
from lightning_lss.nn.loss import IGNORED

LETTERS = "ACGTN"


def tokens_of(letters: str) -> list[int]:
    return [LETTERS.index(letter) for letter in letters]


def make_fasta(tmp_path: Path, content: str | bytes, name: str = "genome.fa", **options: Any) -> FastaDataModule:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    given = {"path": path, "seq_len": 4, "batch_size": 1, "cache_dir": tmp_path / "cache", **options}
    return FastaDataModule(**given)


def read(data: FastaDataModule) -> list[list[int]]:
    """The tokens of each record."""
    data.prepare_data()
    ends = np.load(data.folder / "ends.npy")
    return [part.tolist() for part in np.split(np.fromfile(data.folder / "tokens", np.uint8), ends[:-1])]


MESSY = b"\n>one  a description > with ACGT\r\nacgtn\r\n\r\nRYK AC\n>empty\n>two\nT\nGG\n>three"


class TestReading:
    def test_leaves_out_headers_and_breaks_and_knows_small_and_ambiguous_letters(self, tmp_path: Path) -> None:
        assert read(make_fasta(tmp_path, MESSY)) == [tokens_of("ACGTNNNNAC"), [], tokens_of("TGG"), []]

    @pytest.mark.parametrize("size", range(1, 12))
    def test_is_the_same_however_a_file_is_cut_into_blocks(self, size: int) -> None:
        blocks = [MESSY[i : i + size] for i in range(0, len(MESSY), size)]
        parts = list(_parts(iter(blocks)))
        assert b"".join(parts) == MESSY
        headers = [part for part in parts if part.startswith(b">")]
        assert headers == [b">one  a description > with ACGT\r\n", b">empty\n", b">two\n", b">three"]
        assert not any(b"\n>" in part for part in parts)

    def test_reads_a_folders_files_packed_or_not(self, tmp_path: Path) -> None:
        for name, content in {
            "b.fa": b">b\nCC\n",
            "a/x.FNA.gz": gzip.compress(b">a\nAA") + gzip.compress(b"A\n"),  # as bgzip: several members
            "c.fasta": bz2.compress(b">c\nGG"),  # told by its bytes, not by its name
            "notes.txt": b"x",
            ".d.fa": b">d\nTT",
        }.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
        data = FastaDataModule(path=tmp_path, seq_len=2, batch_size=1, cache_dir=tmp_path / "cache")
        assert read(data) == [tokens_of("AAA"), tokens_of("CC"), tokens_of("GG")]

    def test_takes_another_alphabet(self, tmp_path: Path) -> None:
        data = make_fasta(tmp_path, ">p\nMKXbz*", alphabet="MK*X", others="BZ", predict_unknown=True)
        assert data.vocab_size == 5
        assert read(data) == [[0, 1, 3, 3, 3, 2]]

    def test_reads_files_once_and_again_when_they_change(self, tmp_path: Path, monkeypatch: Any) -> None:
        made: list[Path] = []
        write = FastaDataModule._write
        monkeypatch.setattr(FastaDataModule, "_write", lambda self, folder: (made.append(folder), write(self, folder)))
        for content, times in ((">a\nACGT", 1), (">a\nACGT", 1), (">a\nACGA", 2), (">a\nACGT", 2)):
            assert read(make_fasta(tmp_path, content)) == [tokens_of(content[3:])]
            assert len(made) == times
        read(make_fasta(tmp_path, ">a\nACGT", alphabet="TGCAN"))
        assert len(made) == 3

    def test_holds_blocks_of_a_genome_and_not_all_of_it(self, tmp_path: Path, monkeypatch: Any) -> None:
        sizes: list[int] = []
        blocks = fasta_module.read_blocks

        def small(path: Path) -> Any:
            for block in blocks(path, 1000):
                sizes.append(len(block))
                yield block

        monkeypatch.setattr(fasta_module, "read_blocks", small)
        letters = "".join(random.Random(0).choices("ACGT", k=20_000))
        lines = "\n".join(letters[i : i + 60] for i in range(0, len(letters), 60))
        assert read(make_fasta(tmp_path, f">chr\n{lines}\n")) == [tokens_of(letters)]
        assert max(sizes) == 1000
        assert len(sizes) > 20

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (">a\nACGT\n\nACgE\n>b\nZ", r"genome\.fa, line 4: 'E' is neither in alphabet='ACGTN' nor in others="),
            (">a\nAC\n>b\nAC-GT", r"line 4: '-' is neither"),
            ("\n\nACGT\n>a", r"genome\.fa, line 3: there is no header before it"),
            ("@read\nACGT\n+\nIIII", "line 1: there is no header before it.*not FASTA"),
            (">a\n>b\n", "hold no letters"),
            ("", "hold no letters"),
        ],
    )
    def test_refuses_what_is_not_fasta_and_leaves_nothing(self, tmp_path: Path, content: str, words: str) -> None:
        data = make_fasta(tmp_path, content)
        for _ in range(2):
            with pytest.raises(ValueError, match=words):
                data.prepare_data()

    @pytest.mark.parametrize("size", [7, 1 << 24])
    def test_names_the_line_of_a_letter_in_a_large_file(self, tmp_path: Path, monkeypatch: Any, size: int) -> None:
        blocks = fasta_module.read_blocks
        monkeypatch.setattr(fasta_module, "read_blocks", lambda path: blocks(path, size))
        with pytest.raises(ValueError, match="line 1004: 'J'"):
            read(make_fasta(tmp_path, ">a\n" + "ACGTACG\n" * 1000 + ">b\n\nACJ\n"))

    def test_refuses_packed_files_that_it_cannot_unpack(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"genome\.fa\.zst is a zstd file.*unzstd"):
            make_fasta(tmp_path, b"\x28\xb5\x2f\xfd....", name="genome.fa.zst")
        with pytest.raises(ValueError, match=r"genome\.fa\.zst is a zstd file"):  # nor is it left out of a folder
            make_fasta(tmp_path, ">a\nACGT", path=tmp_path)
        (tmp_path / "genome.fa.zst").unlink()
        data = make_fasta(tmp_path, gzip.compress(b">a\n" + b"ACGT" * 999)[:-12], name="cut.fa.gz")
        with pytest.raises(ValueError, match=r"cut\.fa\.gz is damaged or incomplete .*copy it again"):
            data.prepare_data()

    @pytest.mark.parametrize(
        "wrong", [{"letters": "A"}, {"letters": "ACA"}, {"letters": "AC>"}, {"others": "RN"}, {"others": "é"}]
    )
    def test_refuses_alphabets_that_say_two_things(self, wrong: dict[str, str]) -> None:
        with pytest.raises(ValueError, match="needs two or more letters of ASCII"):
            Alphabet(**{"letters": "ACGTN", "others": "R", **wrong})

    def test_refuses_a_folder_without_fasta(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"holds no file that ends in \.fa, .*\.fas, compressed or not"):
            make_fasta(tmp_path, "x", name="notes.txt", path=tmp_path)

    def test_refuses_another_split(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="split_by='letter' is unknown: choose 'position' or 'record'"):
            make_fasta(tmp_path, ">a\nACGT", split_by="letter")


class TestSequences:
    def test_stay_within_a_record_and_are_filled_up(self, tmp_path: Path) -> None:
        content = ">a\nACGTACGTA\n>b\nC\n>c\nGG\n>d\nTTTTTA\n" + ">rest\n" + "A" * 100
        data = make_fasta(tmp_path, content, splits=(0.15, 0.7, 0.15))  # 18 letters: a, b, c, d
        data.setup("fit")
        pad, none = [data.vocab_size - 1], [IGNORED]
        samples = [(sample["inputs"].tolist(), sample["targets"].tolist()) for sample in data.datasets["train"]]
        assert samples == [
            (tokens_of("ACGT"), tokens_of("CGTA")),
            (tokens_of("ACGT"), tokens_of("CGTA")),
            (tokens_of("GG") + 2 * pad, tokens_of("G") + 3 * none),
            (tokens_of("TTTT"), tokens_of("TTTT")),
            (tokens_of("TA") + 2 * pad, tokens_of("A") + 3 * none),
        ]
        with pytest.raises(IndexError):
            data.datasets["train"][5]

    @pytest.mark.parametrize("seq_len", [1, 3, 7, 64])
    def test_every_letter_but_a_records_first_is_a_target_once(self, tmp_path: Path, seq_len: int) -> None:
        drawn = random.Random(seq_len)
        records = ["".join(drawn.choices("ACGT", k=drawn.randrange(30))) for _ in range(40)]
        content = "".join(f">{i}\n{letters}\n" for i, letters in enumerate(records))
        data = make_fasta(tmp_path, content, seq_len=seq_len, split_by="record", splits=(0.4, 0.3, 0.3))
        data.setup()
        targets = [sample["targets"] for samples in data.datasets.values() for sample in samples]
        counted = torch.cat(targets)
        counted = counted[counted != IGNORED]
        assert sorted(counted.tolist()) == sorted(tokens_of("".join(letters[1:] for letters in records)))

    def test_much_padding_is_told(self, tmp_path: Path) -> None:
        data = make_fasta(tmp_path, ">a\nACGT\n" * 100, seq_len=10)
        with pytest.warns(UserWarning, match=r"70% of the train split is padding, since its 90 records are short"):
            data.setup("fit")

    def test_what_is_not_known_is_a_target_only_if_asked(self, tmp_path: Path) -> None:
        for predict, targets in ((False, [1, IGNORED, IGNORED, 2]), (True, [1, 4, 4, 2])):
            data = make_fasta(tmp_path, ">a\nACNNG" + "A" * 20, splits=(0.2, 0.4, 0.4), predict_unknown=predict)
            data.setup("fit")
            assert data.datasets["train"][0]["targets"].tolist() == targets
            assert data.datasets["train"][0]["inputs"].tolist() == tokens_of("ACNN")

    def test_batches_are_those_of_other_data(self, tmp_path: Path) -> None:
        data = make_fasta(tmp_path, ">a\n" + "ACGT" * 100, batch_size=3, num_workers=1)
        data.setup("fit")
        batch = next(iter(data.train_dataloader()))
        assert {name: (x.dtype, x.shape) for name, x in batch.items()} == {
            name: (x.dtype, x.shape) for name, x in data.example_batch(4, 3).items()
        }
        assert (data.vocab_size, data.bytes_per_token) == (6, 1.0)


class TestSplits:
    def test_by_position_cut_a_record(self, tmp_path: Path) -> None:
        data = make_fasta(tmp_path, ">a\n" + "A" * 50 + "\n>b\n" + "C" * 50, splits=(0.6, 0.2, 0.2))
        data.setup()
        runs = {split: [*zip(x.starts.tolist(), x.stops.tolist())] for split, x in data.datasets.items()}
        assert runs == {"train": [(0, 50), (50, 60)], "val": [(60, 80)], "test": [(80, 100)]}

    def test_by_record_keep_records_whole_and_shares_alike(self, tmp_path: Path) -> None:
        drawn = random.Random(1)
        content = "".join(f">{i}\n{'A' * drawn.randrange(50, 150)}\n" for i in range(200))
        data = make_fasta(tmp_path, content, split_by="record", splits=(0.8, 0.1, 0.1))
        data.setup()
        ends = np.load(data.folder / "ends.npy")
        runs = {split: {*zip(x.starts.tolist(), x.stops.tolist())} for split, x in data.datasets.items()}
        assert set().union(*runs.values()) == {*zip([0, *ends[:-1].tolist()], ends.tolist())}
        assert sum(map(len, runs.values())) == 200
        for split, share in zip(("train", "val", "test"), (0.8, 0.1, 0.1)):
            assert sum(stop - start for start, stop in runs[split]) / ends[-1] == pytest.approx(share, abs=0.02)

    def test_a_split_without_a_record_names_the_remedy(self, tmp_path: Path) -> None:
        data = make_fasta(tmp_path, ">a\n" + "A" * 50, split_by="record")
        with pytest.raises(ValueError, match=r"The val split has no record .* Use split_by=position"):
            data.setup()
