"""Compose the text of ``--help`` from the YAML files of ``conf/`` and their comments."""

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

WIDTH, LEFT = 100, 38  # characters of a line, and of its left column

EXAMPLES = {
    "two CPU ranks share sequences of 4,096 bytes": "",
    "two groups of two ranks": "seq_len=8192 devices=4 sequence_parallel_size=2",
    "your own file or folder, as bytes": "data=text data.path=/my/text.txt",
    "text as a tokenizer's tokens": "data=tokens data.path=/my/texts data.tokenizer=/my/tokenizer.json",
    "what fits, how fast, what to choose; nothing is trained": "mode=plan model=1b seq_len=1048576 devices=64 hardware=h100",
    "resume, on any number of ranks": "ckpt_path=outputs/.../checkpoints/last.ckpt trainer.max_steps=400",
    "fine-tune a checkpoint of Hugging Face": "model=huggingface model.path=/my/folder data=text data.path=/my/texts",
    "several runs, each in a folder of its own": "--multirun seq_len=1024,2048",
    "choices of your own: my_conf/model/mine.yaml": "--config-dir my_conf model=mine",
    "the keys below, as they are with other choices": "--help model=8b mode=plan hardware=h100",
}


def help_text(_root_: DictConfig) -> str:
    """List the groups with their choices, and all keys of the configuration ``_root_``, each with its comment.

    Hydra reads the text as ``hydra.help.template``; there ``$`` is written twice.
    """
    runtime = _root_.hydra.runtime
    folders = [Path(source.path) for source in runtime.config_sources if source.schema == "file"]
    choices = {group: name for group, name in reversed(runtime.choices.items()) if not group.startswith("hydra")}
    cfg: Any = OmegaConf.to_container(_root_)
    del cfg["hydra"]
    name = program_name()
    command = {"train.py": "python train.py", "lightning_lss.cli": "python -m lightning_lss.cli"}.get(name, name)
    lines = [
        f"{name}: train the LSS Transformer on sequences that do not fit one device.\n",
        f"    {command} [GROUP=CHOICE ...] [KEY=VALUE ...] [--config-dir FOLDER] [--multirun]\n",
        "Examples\n",
        *(f"    # {what}\n    {command} {words}".rstrip() for what, words in EXAMPLES.items()),
        "\nGroups: GROUP=CHOICE, * marks the present choice",
    ]
    for group, chosen in choices.items():
        lines.append("")
        for file in [file for folder in folders for file in sorted((folder / group).glob("*.yaml"))]:
            lines.append(_columns(f"{'*' if file.stem == chosen else ' '} {group}={file.stem}", description(file)))
    lines.append("\nKeys: KEY=VALUE, with the values of these choices\n")
    for key, value, comment in keys(cfg, "", comments(folders, _root_.hydra)):
        lines.append("" if key in choices else _columns(f"  {key}{value}", comment))
    lines.append("\n--hydra-help shows Hydra's own options. HYDRA_FULL_ERROR=1 shows where an error was found.")
    return "\n".join(lines).replace("$", "$$")


def program_name() -> str:
    """Return the name of this program, as the user typed it: ``train.py``, ``lightning-lss`` or the module's name."""
    name = Path(sys.argv[0]).name
    return "lightning_lss.cli" if name == "__main__.py" else name


def _columns(left: str, right: str) -> str:
    """Put ``right``, wrapped, beside ``left``; below it where ``left`` is too long."""
    margin = " " * LEFT
    block = textwrap.fill(right, WIDTH, initial_indent=margin, subsequent_indent=margin, break_long_words=False)
    return f"{left}\n{block}".rstrip() if len(left) > LEFT - 2 else left + block[len(left) :]


def keys(section: dict[str, Any], prefix: str, known: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """Yield each key below ``prefix``, its value as ``=YAML``, and its comment, ``""`` where it has none.

    A mapping is a value itself, unless it makes an object or one of its keys has a comment.
    """
    for name, value in section.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and ("_target_" in value or any(other.startswith(f"{key}.") for other in known)):
            yield key, "", known.get(key, "")
            yield from keys(value, f"{key}.", known)
        elif name != "_target_":
            yield key, f"={_as_yaml(value)}", known.get(key, "")


def _as_yaml(value: Any) -> str:
    if isinstance(value, dict) and value:
        return "{...}"
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"  # 8e+10 rather than 80000000000.0
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def comments(folders: list[Path], hydra: DictConfig) -> dict[str, str]:
    """Find the comment of each key, such as ``model.width``, in the files that Hydra composes, in its order."""
    loader = GlobalHydra.instance().config_loader()
    composed = loader.compute_defaults_list(hydra.job.config_name, [*hydra.overrides.task], RunMode.RUN).defaults
    known: dict[str, str] = {}
    for default in composed:
        files = (folder / f"{default.config_path}.yaml" for folder in folders)
        file = next((file for file in files if file.is_file()), None)  # none for Hydra's own
        if file is not None:
            prefix = f"{default.package}." if default.package else ""
            known |= {f"{prefix}{key}": comment for key, comment in comments_of(file).items()}
    return known


def comments_of(file: Path) -> dict[str, str]:
    """Find the comment beside each key of a YAML file; dots join nested keys. Keys without a comment are left out."""
    lines, known = file.read_text().splitlines(), {}
    mappings: list[tuple[str, Any]] = [("", yaml.compose("\n".join(lines)))]
    for prefix, mapping in mappings:  # the list grows by nested mappings
        for key, value in mapping.value:
            line = key.start_mark.line
            end = value.end_mark if value.end_mark.line == line else key.end_mark  # a # within a value is part of it
            if comment := lines[line][end.column :].partition("#")[2]:
                known[f"{prefix}{key.value}"] = comment.strip()
            if isinstance(value, yaml.MappingNode) and not value.flow_style:
                mappings.append((f"{prefix}{key.value}.", value))
    return known


def description(file: Path) -> str:
    """Return the first comment line of a YAML file; ``""`` if there is none above its keys."""
    first = next((line for line in file.read_text().splitlines() if not line.startswith("# @package")), "")
    return first.removeprefix("#").strip() if first.startswith("#") else ""
