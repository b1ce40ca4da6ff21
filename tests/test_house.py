"""Rules of the house that no other tool checks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# Folders that commands write or tools own; everything else is read by people.
NOT_OURS = {".git", ".venv", "artifacts", "build", "__pycache__", ".ipynb_checkpoints", ".hypothesis"}
TEXT = {"", ".cfg", ".ipynb", ".json", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml"}

# A letter in brackets matches itself, and keeps this file from being caught by its own rules.
FORBIDDEN = {
    "a path of one machine": r"(?<![\w.:/~-])/(?:home|Users|work|root|private)/",
    "where packages come from, which each machine decides": r"(?:index|find)-(?:url|link[s])\b|/simpl[e]/",
    "work left open": r"\b(?:TOD[O]|FIXM[E])\b|NotImplementedErro[r]",
    "advertising": r"(?i)\b(?:seamles[s]|effortles[s]|blazin[g]|cutting[ -]edg[e]|game[ -]changin[g])",
}


def our_files(root: Path) -> list[Path]:
    """Return every text file that people write or that is committed, without the lock files."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in NOT_OURS and not name.endswith("_cache")]
        found += [Path(folder, name) for name in names if Path(name).suffix in TEXT]
    return found


def forbidden_lines(path: Path) -> list[str]:
    """Return what a file says that it must not say, one line for each place."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [
        f"{path.name}:{number}: {what}: {line.strip()[:100]}"
        for number, line in enumerate(lines, start=1)
        for what, pattern in FORBIDDEN.items()
        if re.search(pattern, line)
    ]


def test_no_file_says_what_it_must_not_say(root):
    files = our_files(root)
    assert root / "Makefile" in files
    assert [line for path in files for line in forbidden_lines(path)] == []


@pytest.mark.parametrize(
    "line", ["open('/ho" + "me/ann/data.csv')", "# TO" + "DO: later", "a seam" + "less flow", "pip --index" + "-url x"]
)
def test_the_rule_sees_such_words(tmp_path, line):
    (tmp_path / "some.py").write_text(f"fine = 1\n{line}\n")
    assert [found.split(":")[1] for found in forbidden_lines(tmp_path / "some.py")] == ["2"]


def makefile_targets(root: Path) -> list[str]:
    """Return the targets of the Makefile that have a name people type."""
    return re.findall(r"^([a-z][a-z-]*):", (root / "Makefile").read_text(), re.MULTILINE)


def test_every_target_is_explained_declared_and_documented(root):
    targets = makefile_targets(root)
    phony = re.search(r"^\.PHONY: (.+)$", (root / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert sorted(phony[1].split()) == sorted(targets)
    shown = subprocess.run(["make", "help"], cwd=root, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^  make (\S+) +\S", shown, re.MULTILINE) == targets
    guide = (root / "CONTRIBUTING.md").read_text()
    assert [target for target in targets if f"`make {target}`" not in guide] == []


def make_setup(folder: Path, root: Path, python: Path) -> subprocess.CompletedProcess[str]:
    """Run the setup target in a folder without an environment, with the given Python."""
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(root / name, folder)
    command = ["make", "setup", f"PYTHON={python}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_setup_refuses_another_python_and_says_what_to_do(root, tmp_path):
    fake = tmp_path / "python3.12"
    fake.write_text("#!/bin/sh\necho 3.12\n")
    fake.chmod(0o755)
    done = make_setup(tmp_path, root, fake)
    assert done.returncode != 0
    assert f"This project needs Python 3.11, but {fake} is 3.12." in done.stderr
    assert "make setup PYTHON=/path/to/python3.11" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_setup_refuses_a_missing_python(root, tmp_path):
    done = make_setup(tmp_path, root, tmp_path / "absent")
    assert done.returncode != 0
    assert "absent is not there." in done.stderr


def test_setup_refuses_an_environment_of_another_python(root, tmp_path):
    other = tmp_path / ".venv/bin/python"
    other.parent.mkdir(parents=True)
    other.write_text("#!/bin/sh\necho 3.12\n")
    other.chmod(0o755)
    done = make_setup(tmp_path, root, Path(sys.executable))
    assert done.returncode != 0
    assert ".venv was made by another Python." in done.stderr


@pytest.mark.parametrize(("require_all", "expected"), [("0", 0), ("1", 1)])
def test_a_skip_is_a_failure_where_everything_is_required(root, tmp_path, require_all, expected):
    shutil.copy(root / "tests/conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text(
        "import pytest\n\ndef test_runs(): pass\n\ndef test_skips(): pytest.skip('no such tool')\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path]
    environment = os.environ | {"REQUIRE_ALL": require_all}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == expected, done.stdout
    assert ("REQUIRE_ALL=1 allows no skip" in done.stdout) == bool(expected)
