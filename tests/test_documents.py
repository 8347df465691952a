"""Links in the documents lead somewhere, their code runs, and their tables say what the code says."""

import re
import runpy

import torch

from lightning_lss.attention.kernels import KERNELS, _obstacle_of_tensors
from tests.processes import ROOT

REPOSITORY = r"https://(?:github.com/lightning-lss/lightning-lss/blob|raw.githubusercontent.com/lightning-lss/lightning-lss)/main/"


def test_links_in_documents_lead_somewhere() -> None:
    documents = ["CONTRIBUTING.md", "benchmarks/README.md", *ROOT.glob("docs/*.md")]
    for document in (ROOT / name for name in documents):
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_links_in_the_readme_are_absolute_since_pypi_shows_it_too() -> None:
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert not [link for link in links if not link.startswith(("https://", "#"))]
    files = [re.sub(REPOSITORY, "", link) for link in links if re.match(REPOSITORY, link)]
    assert len(files) > 5
    assert all((ROOT / file).exists() for file in files), files


def test_masks_of_the_document_and_its_tables_are_those_of_the_code() -> None:
    """Its code blocks run, since the masks of the tables are made by them."""
    figures = runpy.run_path(str(ROOT / "docs/make_figures.py"))
    text = (ROOT / "docs/masks.md").read_text()
    assert figures["with_tables"](text) == text, "run: python docs/make_figures.py"
    assert all(f"| `{name}` |" in text for name in KERNELS)
    assert set(re.findall(r"\]\(masks/(\w+)\.png\)", text)) == set(figures["TITLES"])


def test_the_table_of_kernels_says_which_run_on_a_cpu() -> None:
    devices = runpy.run_path(str(ROOT / "docs/make_figures.py"))["DEVICES"]
    runs = [name for name in KERNELS if _obstacle_of_tensors(name, torch.zeros(1, 1, 2, 8), 8) is None]
    assert runs == [name for name in KERNELS if devices[name][0] in ("CPU", "any")]


def test_every_program_of_the_readme_is_one_of_the_examples_which_other_tests_run() -> None:
    programs = [path.read_text() for path in (ROOT / "examples").glob("*.py")]
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    assert all(any(block.strip() in program for program in programs) for block in blocks)
