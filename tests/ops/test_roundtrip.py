"""`python -m ops roundtrip` on a project of one chapter: what it must notice, and that it edits nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ops.roundtrip import run_tool, snapshot


def write_notebook(path: Path, *sources: str) -> None:
    """Write a clean notebook with one code cell for each source."""
    cells = [
        {
            "cell_type": "code",
            "execution_count": None,
            "id": f"cell{number}",
            "metadata": {"tags": ["parameters"]} if number == 1 else {},
            "outputs": [],
            "source": source.splitlines(keepends=True),
        }
        for number, source in enumerate(sources)
    ]
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    notebook = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(notebook, indent=1, sort_keys=True) + "\n")


@pytest.fixture(scope="module")
def pristine(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with this one's configuration, one clean chapter and the module it exports."""
    project = tmp_path_factory.mktemp("pristine")
    shutil.copy(root / "pyproject.toml", project)
    (project / "chapters").mkdir()
    write_notebook(
        project / "chapters/01_tiny.ipynb", "#| default_exp tiny", "rows = 3", "#| export\ndef one():\n    return 1"
    )
    (project / "mlops_course").mkdir()
    (project / "mlops_course/__init__.py").write_text('__version__ = "1.2.3"\n')
    run_tool("nbdev-export", project, project / "no-config")
    return project


@pytest.fixture
def project(pristine: Path, tmp_path: Path) -> Path:
    """A copy of the project that the test may damage."""
    shutil.copytree(pristine, tmp_path / "project")
    return tmp_path / "project"


def check(project: Path, status: int) -> str:
    """Run the command, assert its exit code and that it changed no file; return what it printed."""
    before = snapshot(project)
    command = [sys.executable, "-m", "ops", "roundtrip", "--root", str(project)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    assert snapshot(project) == before
    return f"{done.stdout}{done.stderr}"


def test_a_clean_project_passes_and_keeps_version_and_tags(project):
    assert check(project, 0) == "The chapters are clean and mlops_course is what they export.\n"
    assert '__version__ = "1.2.3"' in (project / "mlops_course/__init__.py").read_text()
    assert '"parameters"' in (project / "chapters/01_tiny.ipynb").read_text()


def test_an_edited_module_and_a_dirty_notebook_are_named(project):
    module, chapter = project / "mlops_course/tiny.py", project / "chapters/01_tiny.ipynb"
    module.write_text(module.read_text().replace("return 1", "return 2"))
    chapter.write_text(chapter.read_text().replace('"execution_count": null', '"execution_count": 7', 1))
    output = check(project, 1)
    assert "mlops_course/tiny.py: not what the chapters export" in output
    assert "-    return 2" in output
    assert "+    return 1" in output
    assert "chapters/01_tiny.ipynb: not clean" in output
    assert "make export" in output


def test_missing_and_orphaned_modules_are_named(project):
    (project / "mlops_course/tiny.py").rename(project / "mlops_course/old.py")
    output = check(project, 1)
    assert "mlops_course/tiny.py: missing" in output
    assert "mlops_course/old.py: no chapter exports it" in output


def test_two_chapters_for_one_module_are_named(project):
    # The same content, so that no file differs whichever of the two wins.
    shutil.copy(project / "chapters/01_tiny.ipynb", project / "chapters/00_copy.ipynb")
    assert "tiny: exported by 00_copy.ipynb and 01_tiny.ipynb" in check(project, 1)


def test_a_notebook_that_nbdev_cannot_clean_is_a_failure(project):
    # nbdev-clean itself only warns and exits 0.
    (project / "chapters/02_bad.ipynb").write_text('{"cells": [], "metadata": null}')
    assert "nbdev-clean failed" in check(project, 1)


def test_a_notebook_with_merge_marks_is_named(project):
    (project / "chapters/02_bad.ipynb").write_text("<<<<<<< HEAD\n")
    assert "02_bad.ipynb is not a notebook" in check(project, 1)
