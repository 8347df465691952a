"""What the command line does with mistakes, and with ranks that others start; nothing is trained here."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_lss import InexactError
from lightning_lss.cli import main as cli
from lightning_lss.cli.run import program
from lightning_lss.data.download import DownloadError
from lightning_lss.data.optional import MissingPackageError


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Run the command line in this process."""

    def start(*overrides: str, program: str = "/usr/bin/lightning-lss") -> None:
        monkeypatch.setattr("sys.argv", [program, *overrides, f"hydra.run.dir={tmp_path}"])
        monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # set by a run: taken back after the test
        monkeypatch.setenv("PL_SEED_WORKERS", "0")
        cli.main()

    return start


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["seq_lenn=4"], "Could not override 'seq_lenn'"),  # Hydra's own
        (["seq_len=4098"], "lightning-lss: A sequence of length 4098 cannot be split over 2 ranks"),
        (["data=text", "data.path=/nowhere"], "lightning-lss: path='/nowhere' does not exist"),
        (["model.width=32", "model.num_heads=3"], "width=32 must be a multiple of num_heads=3"),
        (["devices=${nothing}"], "lightning-lss: Interpolation key 'nothing' not found"),
        (["-m", "seq_len=4098,4099"], "lightning-lss: A sequence of length 4098"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_mistakes_end_with_a_sentence(start, capsys, tmp_path, overrides, words) -> None:
    with pytest.raises(SystemExit) as end:
        start(*overrides, f"hydra.sweep.dir={tmp_path}")
    told = capsys.readouterr()
    assert end.value.code == 1
    assert words in told.err
    assert "Traceback" not in told.err
    assert "HYDRA_FULL_ERROR=1" in told.err


@pytest.mark.parametrize("program", ["train.py", "lightning_lss/cli/__main__.py"])
def test_the_sentence_names_the_program_as_it_was_called(start, capsys, program) -> None:
    with pytest.raises(SystemExit):
        start("mode=train", program=program)
    assert capsys.readouterr().err.startswith({"train.py": "train.py: "}.get(program, "lightning_lss.cli: "))


def test_hydras_variable_shows_where_a_mistake_was_found(start, monkeypatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="mode=train is unknown"):
        start("mode=train")


@pytest.mark.parametrize(
    "kind", [ValueError, MisconfigurationException, DownloadError, MissingPackageError, FileNotFoundError]
)
def test_mistakes_are_known_by_their_class(start, monkeypatch, capsys, kind) -> None:
    class Narrower(kind):
        pass

    def fail(cfg: object) -> None:
        raise Narrower("the reason")

    monkeypatch.setattr(cli, "run", fail)
    with pytest.raises(SystemExit):
        start()
    assert "lightning-lss: the reason\n" in capsys.readouterr().err


def test_faults_of_the_program_are_not_taken_for_mistakes(start, monkeypatch, capsys) -> None:
    class MisconfigurationException(Exception):  # noqa: N818
        """Another one of the same name."""

    def fail(cfg: object) -> None:
        raise MisconfigurationException("a fault")

    monkeypatch.setattr(cli, "run", fail)
    with pytest.raises(SystemExit):
        start()
    assert "test_main.py" in capsys.readouterr().err  # Hydra's stack of frames


def test_a_multirun_cannot_be_started_by_torchrun(start, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        start("-m", "seq_len=64,128", f"hydra.sweep.dir={tmp_path}")
    assert "does not work under torchrun" in capsys.readouterr().err


def test_the_runs_of_a_sweep_are_started_as_the_sweep_was(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["bin/lightning-lss", "-m", "--config-dir", "own", "seq_len=1,2"])
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=None))
    assert program() == [sys.executable, str(tmp_path / "bin/lightning-lss")]
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__="that of a module"))
    assert program() == [sys.executable, "-m", "lightning_lss.cli"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--config-dir", "own"], ["--config-path={conf}", "--config-dir={here}/own", "--config-name=train"]),
        (
            ["--config-name=mine", "-cd", "own"],
            ["--config-path={conf}", "--config-dir={here}/own", "--config-name=mine"],
        ),
        (["-cp", "{here}/own", "-cn", "mine"], ["--config-path={here}/own", "--config-name=mine"]),
        ([], ["--config-path={conf}", "--config-name=train"]),
    ],
    ids=lambda x: " ".join(x),
)
def test_the_runs_of_a_sweep_take_the_configuration_that_was_chosen(
    start, monkeypatch, tmp_path, given, expected
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own/mine.yaml").write_text((cli.CONF / "train.yaml").read_text())
    for group in ("model", "data", "strategy", "trainer", "logger", "callbacks"):
        (tmp_path / "own" / group).symlink_to(cli.CONF / group)
    started: list[list[str]] = []

    def run(command: list[str], **options: object) -> None:
        started.append(command)
        folder = next(word for word in command if word.startswith("hydra.run.dir=")).split("=")[1].strip('"')
        (Path(folder) / "result.json").write_text("{}")

    monkeypatch.setattr("subprocess.run", run)
    places = {"conf": cli.CONF, "here": tmp_path}
    words = [word.format(**places) for word in given]
    start("-m", *words, "seed=1", f"hydra.sweep.dir={tmp_path}/sweep")
    assert [words[len(program()) : -1] for words in started] == [
        [word.format(**places) for word in expected] + ["seed=1"]
    ]


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_only_the_first_rank_makes_the_runs_folder(monkeypatch, variable) -> None:
    monkeypatch.delenv("RANK", raising=False)
    for rank in ("0", "3"):
        monkeypatch.setenv(variable, rank)
        monkeypatch.setattr("sys.argv", ["train.py", "seed=1"])
        cli.keep_to_own_folder()
        if rank == "0":
            assert sys.argv == ["train.py", "seed=1"]
    assert "hydra.output_subdir=null" in sys.argv
    assert Path(sys.argv[-1].removeprefix("hydra.run.dir=")).is_dir()
    assert "_rank_3_" in sys.argv[-1]


@pytest.mark.slow
def test_a_proof_is_printed_and_trains_nothing(start, capsys, tmp_path) -> None:
    start("mode=verify", "seq_len=256", "data=recall", "data.seq_len=256")
    told = capsys.readouterr().out
    assert "Exact: the gradients of" in told
    assert "moves on one rank" in told
    assert not (tmp_path / "checkpoints").exists()


def test_a_proof_that_fails_ends_with_its_words_and_code_1(start, capsys, monkeypatch) -> None:
    def refuse(*_, **__):
        raise InexactError("Positions are counted from 0")

    monkeypatch.setattr("lightning_lss.cli.verify.verify", refuse)
    with pytest.raises(SystemExit) as end:
        start("mode=verify", "seq_len=256", "data=recall")
    assert end.value.code == 1
    assert "Positions are counted from 0" in capsys.readouterr().err


def test_only_lss_is_proved(start, capsys) -> None:
    with pytest.raises(SystemExit):
        start("mode=verify", "strategy=ddp", "sequence_parallel_size=1")
    assert "add strategy=lss" in capsys.readouterr().err
