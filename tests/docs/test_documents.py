"""Generated parts of the documents are fresh, and documents point at things that exist."""

import json
import re
from pathlib import Path

import pytest

from mlops_course.blueprint import sha256_file
from ops.publish import PARTS, fill, render

LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("document", PARTS)
def test_generated_parts_are_fresh(document: str, root: Path) -> None:
    """A number that differs from the committed JSON, or a setting that changed, needs `make publish`."""
    assert render(document) == (root / document).read_text()


def test_a_stale_number_would_be_noticed(root: Path) -> None:
    text = (root / "README.md").read_text()
    stale = re.sub(r"0\.\d{3}", "0.999", text, count=1)
    assert stale != text
    for name, make in PARTS["README.md"].items():
        stale = fill(stale, name, make())
    assert stale == text


def test_missing_markers_are_an_error() -> None:
    with pytest.raises(ValueError, match="markers <!-- quality:begin -->"):
        fill("no markers here", "quality", "content")


def documents(root: Path) -> list[Path]:
    return [*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("chapters/**/*.md")]


def test_links_to_files_lead_somewhere(root: Path) -> None:
    dead = [
        f"{path.relative_to(root)}: {target}"
        for path in documents(root)
        for target in LINK.findall(path.read_text())
        if not target.startswith(("http://", "https://")) and not (path.parent / target).exists()
    ]
    assert dead == []


def test_the_changelog_tells_what_each_model_changed(root: Path) -> None:
    from mlops_course.training import RECIPES

    models = (root / "CHANGELOG.md").read_text().partition("## Models")[2]
    sections = dict(re.findall(r"^### (\S+)\n+(.*?)(?=\n### |\Z)", models, re.DOTALL | re.MULTILINE))
    for version, recipe in RECIPES.items():
        assert recipe.changes in sections[version].replace("\n", " ")


def test_the_pinning_record_belongs_to_its_script_and_data(root: Path) -> None:
    """Chapter 1 shows what one script gave with several sets of libraries; the record names script and data."""
    record = json.loads((root / "chapters/data/pinning.json").read_text())
    assert record["script_sha256"] == sha256_file(root / "ops/pinning/script.py")
    assert record["data_sha256"] == sha256_file(root / "chapters/data/flights.parquet")
