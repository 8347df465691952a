"""Links in the documents lead somewhere."""

import re

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
