"""Rules of the house that the import contracts in pyproject.toml cannot say."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_lss

PACKAGE = Path(lightning_lss.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
COMMUNICATES = (
    *("sequence", "parallel", "proof", "checkpoint", "strategy", "megatron", "testing", "planner", "verifier"),
    "nn/loss.py",
)
"""Folders and files that may import ``torch.distributed``."""


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_communication_has_its_places(path) -> None:
    name = path.relative_to(PACKAGE).as_posix()
    if not name.startswith(COMMUNICATES):
        assert not [x for x in imports(path) if x.startswith("torch.distributed")], name


def test_a_file_is_one_idea() -> None:
    assert {path.name: n for path in FILES if (n := len(path.read_text().splitlines())) > 400} == {}


def test_nothing_but_the_root_lies_directly_in_the_package() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "version.py"}


TESTS = Path(__file__).parent
TEST_FILES = sorted(TESTS.rglob("*.py"))


@pytest.mark.parametrize("path", TEST_FILES, ids=lambda path: path.relative_to(TESTS).as_posix())
def test_tests_share_the_toolbox_and_helpers_only(path) -> None:
    found = set(imports(path))
    assert not [name for name in found if re.match(r"tests\.(\w+\.)*test_", name)]
    if path.parent.name != "benchmarks":
        assert not [name for name in found if name.split(".")[0] == "benchmarks"]
