"""``--help`` shows every group, every key and what each is."""

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lightning_lss.cli import help as cli_help
from lightning_lss.cli.main import CONF, main
from tests.cli.composing import CHOICES


def keys_of(*overrides: str) -> list[tuple[str, str | None, str]]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", list(overrides), return_hydra_config=True)
        told = cli_help.comments([CONF], cfg.hydra)
    del cfg.hydra
    return list(cli_help.keys(OmegaConf.to_container(cfg), "", told))


@pytest.mark.parametrize("choice", CHOICES)
def test_every_key_has_a_comment(choice) -> None:
    groups = {choice.split("=")[0] for choice in CHOICES}
    left_out = [key for key, _, comment in keys_of(choice) if not comment and key not in groups]
    assert not left_out, f"{choice}: add a comment beside {left_out}"


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_says_in_its_first_line_what_it_is(choice) -> None:
    group, name = choice.split("=")
    assert cli_help.description(CONF / group / f"{name}.yaml")


def test_comments_are_found_whatever_stands_before_them(tmp_path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(
        "# What it is.\n"
        "plain: 1 # a number\n"
        "quoted: 'a # b' # with a hash\n"
        "flow: {a: 1, b: [2]} # a mapping\n"
        "empty: # nothing\n"
        "bare: 1\n"
        "group: # of keys\n"
        "  # not of a key\n"
        "  inner: [1, 2] # a list\n"
    )
    assert cli_help.comments_of(file) == {
        "plain": "a number",
        "quoted": "with a hash",
        "flow": "a mapping",
        "empty": "nothing",
        "group": "of keys",
        "group.inner": "a list",
    }
    assert cli_help.description(file) == "What it is."


def test_comments_of_a_base_hold_until_a_choice_has_its_own(tmp_path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "train.yaml").write_text("defaults:\n  - _self_\n  - model: mine\n\nseed: 1 # of all\n")
    (tmp_path / "model/default.yaml").write_text("width: 1 # of the base\ndepth: 1 # layers\n")
    (tmp_path / "model/mine.yaml").write_text("defaults:\n  - default\n  - _self_\n\nwidth: 2 # of mine\n")
    (tmp_path / "model/other.yaml").write_text("depth: 1 # of another\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        told = cli_help.comments([tmp_path], compose("train", return_hydra_config=True).hydra)
    assert told == {"seed": "of all", "model.width": "of mine", "model.depth": "layers"}


def shown(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, program: str, *words: str) -> str:
    monkeypatch.setattr("sys.argv", [program, "--help", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_shows_groups_keys_and_examples(capsys, monkeypatch) -> None:
    text = shown(capsys, monkeypatch, "/bin/lightning-lss", "model=8b")
    for choice in CHOICES:
        assert f" {choice} " in text
    assert "* model=8b " in text
    assert "  model.width=4096 " in text
    assert "  seq_len=4096                        tokens in a sequence, L\n" in text
    assert "  model.seq_len=${seq_len} " in text
    assert "    lightning-lss mode=plan model=1b" in text
    assert "hardware.memory" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_help_knows_the_users_own_choices(capsys, monkeypatch, tmp_path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.yaml").write_text("# My own.\ndefaults:\n  - default\n\nwidth: 96 # narrow\n")
    text = shown(capsys, monkeypatch, "train.py", "--config-dir", str(tmp_path), "model=mine")
    assert "* model=mine                          My own." in text
    assert "  model.width=96                      narrow" in text
    assert "  model.mlp=gelu                      gelu or swiglu" in text
    assert "    python train.py\n" in text
