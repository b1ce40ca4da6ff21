"""`python -m ops course`, run the way a person runs it, on chapters of a few cells."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from click.testing import CliRunner
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from ops.course import course

HEADLINE = {"built": "a model of one line", "numbers": {"ROC AUC": "0.70 (0.69 to 0.71)", "rows": "3"}}
GOOD_CELLS = [
    "from pathlib import Path",
    "Path(build_root, 'seen.txt').write_text(f'{artifacts_root}|{build_root}|{Path.cwd()}');",
]


def write_chapter(path: Path, sources: list[str], headline: object = HEADLINE, drop_tag: str = "") -> None:
    """Write a chapter: a title, the parameters, the given cells, the headline; without the tag `drop_tag`."""
    parameters = new_code_cell("artifacts_root = ''\nbuild_root = ''", metadata={"tags": ["parameters"]})
    show = new_code_cell(
        f"from IPython.display import JSON, display\ndisplay(JSON({headline!r}))", metadata={"tags": ["headline"]}
    )
    for cell in (parameters, show):
        cell.metadata["tags"] = [tag for tag in cell.metadata["tags"] if tag != drop_tag]
    cells = [new_markdown_cell("# Tiny"), parameters, *map(new_code_cell, sources), show]
    # No language in the metadata, as nbdev-clean leaves it.
    kernel = {"name": "python3", "display_name": "python3"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


def run_course(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command over the chapters in `folder`, which also holds what it writes."""
    command = [sys.executable, "-m", "ops", "course", "--chapters-dir", str(folder)]
    command += ["--artifacts", str(folder / "artifacts"), "--build", str(folder / "build"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def good_run(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Two chapters that succeed, run once for the tests below."""
    folder = tmp_path_factory.mktemp("good")
    write_chapter(folder / "01_first.ipynb", GOOD_CELLS)
    write_chapter(folder / "02_second.ipynb", ["2 + 2"], {"built": "a sum", "numbers": {"sum": "4"}})
    write_chapter(folder / "scratch.ipynb", ["1 / 0"])
    return folder, run_course(folder)


def test_ends_with_a_table_of_what_was_built(good_run):
    _, done = good_run
    assert done.returncode == 0, done.stderr
    for text in ("01_first", "a model of one line", "ROC AUC: 0.70 (0.69 to 0.71)", "02_second", "sum: 4", "total"):
        assert text in done.stdout
    assert "scratch" not in done.stdout + done.stderr


def test_shows_progress_a_log_can_hold_and_nothing_else(good_run):
    _, done = good_run
    lines = done.stderr.splitlines()
    assert [line for line in lines if line.startswith("01_first: 6/6 cells")]
    assert [line for line in lines if not line.startswith(("01_first: ", "02_second: "))] == []


def test_writes_the_same_table_for_tools(good_run):
    folder, _ = good_run
    summary = json.loads((folder / "build/course.json").read_text())
    first, second = summary["chapters"]
    assert first.pop("seconds") + second.pop("seconds") == pytest.approx(summary["total_seconds"], abs=1e-3)
    assert first == HEADLINE | {
        "chapter": "01_first",
        "notebook": "chapters/01_first.ipynb",
        "html": "chapters/01_first.html",
    }
    assert second["numbers"] == {"sum": "4"}


def test_chapters_get_absolute_roots_and_run_in_their_own_folder(good_run):
    folder, _ = good_run
    assert (folder / "build/seen.txt").read_text() == f"{folder / 'artifacts'}|{folder / 'build'}|{folder}"


def test_leaves_executed_notebook_and_page(good_run):
    folder, _ = good_run
    executed = nbformat.read(folder / "build/chapters/02_second.ipynb", as_version=4)
    assert next(cell.outputs[0].data for cell in executed.cells if cell.source == "2 + 2") == {"text/plain": "4"}
    assert "<h1" in (folder / "build/chapters/02_second.html").read_text()
    # The chapters themselves stay without outputs.
    source = nbformat.read(folder / "02_second.ipynb", as_version=4)
    assert [cell.outputs for cell in source.cells if cell.cell_type == "code"] == [[], [], []]


def test_a_broken_cell_stops_the_run_and_is_shown(tmp_path):
    write_chapter(tmp_path / "01_broken.ipynb", ["rows = 3", "rows / 0  # the planted fault", "rows = 4"])
    write_chapter(tmp_path / "02_never.ipynb", GOOD_CELLS)
    (tmp_path / "build").mkdir()
    (tmp_path / "build/course.json").write_text("from an earlier run")
    done = run_course(tmp_path)
    assert done.returncode == 1
    assert "01_broken: cell 4 of 6 failed." in done.stderr
    assert "    rows / 0  # the planted fault\n" in done.stderr
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert "\x1b" not in done.stderr
    assert not (tmp_path / "build/seen.txt").exists()
    assert not (tmp_path / "build/course.json").exists()
    partial = nbformat.read(tmp_path / "build/chapters/01_broken.ipynb", as_version=4)
    assert "ZeroDivisionError" in [out.ename for cell in partial.cells for out in cell.get("outputs", [])]


def test_leaving_a_notebook_early_is_a_failure(tmp_path):
    write_chapter(tmp_path / "01_early.ipynb", ["import sys", "sys.exit(0)"])
    done = run_course(tmp_path)
    assert done.returncode == 1
    assert "01_early: cell 4 of 5 failed.\n\n    sys.exit(0)" in done.stderr


@pytest.mark.parametrize("tag", ["headline", "parameters"])
def test_a_chapter_without_its_tag_is_refused_before_anything_runs(tmp_path, tag):
    write_chapter(tmp_path / "01_first.ipynb", GOOD_CELLS)
    write_chapter(tmp_path / "02_second.ipynb", ["1"], drop_tag=tag)
    done = run_course(tmp_path)
    assert done.returncode == 1
    assert f"02_second.ipynb has no cell tagged '{tag}'" in done.stderr
    assert not (tmp_path / "build").exists()


def test_a_headline_of_another_shape_is_refused(tmp_path):
    write_chapter(tmp_path / "01_first.ipynb", [], {"built": "a model", "numbers": {"ROC AUC": 0.7}})
    done = run_course(tmp_path)
    assert done.returncode == 1
    assert '01_first: its headline is {"built": "a model", "numbers": {"ROC AUC": 0.7}}, expected' in done.stderr


@pytest.mark.parametrize(
    ("selection", "message"),
    [("7", "no chapter 7 (there are: 1)"), ("first", "'first' is not a list of chapter numbers such as 1,3")],
)
def test_a_wrong_selection_names_the_chapters_there_are(tmp_path, selection, message):
    write_chapter(tmp_path / "01_first.ipynb", [])
    done = run_course(tmp_path, "--chapters", selection)
    assert done.returncode == 2
    assert message in done.stderr


def test_importing_the_command_line_imports_nothing_heavy():
    heavy = ["nbformat", "numpy", "pandas", "rich"]
    code = f"import sys, ops.__main__; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


REAL = sorted((Path(__file__).parents[2] / "chapters").glob("[0-9][0-9]_*.ipynb"))


@pytest.mark.parametrize("chapter", REAL, ids=lambda path: path.stem)
def test_a_broken_cell_planted_in_a_real_chapter_stops_the_course(chapter: Path, tmp_path: Path) -> None:
    """The run of the chapters in `make test` proves something only if a chapter that breaks makes it fail."""
    notebook = nbformat.read(chapter, as_version=4)
    first = next(i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code")
    notebook.cells.insert(first, new_code_cell("1 / 0  # planted"))
    nbformat.write(notebook, tmp_path / chapter.name)
    done = run_course(tmp_path)
    assert done.returncode == 1
    assert f"{chapter.stem}: cell {first + 1} of" in done.stderr
    assert "1 / 0  # planted" in done.stderr
    assert "ZeroDivisionError" in done.stderr


def test_a_chapter_that_was_edited_but_not_exported_is_refused_before_it_runs(monkeypatch, tmp_path):
    """Later chapters import the package, so they would run the code from before the edit."""
    monkeypatch.setattr("ops.roundtrip.differences", lambda _: {"mlops_course/training.py": "not what is exported"})
    done = CliRunner().invoke(course, ["--build", str(tmp_path), "--artifacts", str(tmp_path)])
    assert done.exit_code == 1
    assert "mlops_course/training.py is not what the chapters export" in done.output
    assert "Run `make export`" in done.output
    assert list(tmp_path.iterdir()) == []


def test_the_page_has_a_title_and_leaves_out_what_only_tools_need(good_run):
    folder, _ = good_run
    page = (folder / "build" / "chapters" / "01_first.html").read_text()
    assert "<title>Tiny</title>" in page
    assert str(folder / "artifacts") not in page
