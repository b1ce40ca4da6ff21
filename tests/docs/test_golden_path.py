"""The runbook's commands are run, in order, in a copy of the project, and must print what the page says."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

BLOCK = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MARK = "\x1e"  # separates the outputs of the commands; nothing prints it


def steps(page: str) -> list[tuple[str, str]]:
    """Return (command, expected output) of each `$ ` line in the page's console blocks."""
    found: list[tuple[str, str]] = []
    for block in BLOCK.findall(page):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, expected = part.partition("\n")
            found.append((command, expected))
    return found


def matches(expected: str, printed: str) -> bool:
    """Whether the output is the expected one, where `...` stands for anything, and runs of blanks are alike."""
    blank = re.compile(r"\s+")
    pieces = [re.escape(blank.sub(" ", piece)) for piece in expected.strip().split("...")]
    pattern = r"[\s\S]*?".join(piece.replace(r"\ ", r"\s+") for piece in pieces)
    return re.fullmatch(r"\s*" + pattern + r"\s*", printed) is not None


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        ("a b", "a  b\n", True),
        ("a ... c", "a and then c", True),
        ("a ... c", "a and then d", False),
        ("pass", "passed", False),
        ("", "something", False),
    ],
)
def test_the_comparison_can_fail(expected: str, printed: str, same: bool) -> None:
    assert matches(expected, printed) is same


@pytest.fixture(scope="module")
def page(root: Path) -> list[tuple[str, str]]:
    return steps((root / "docs" / "golden_path.md").read_text())


def copy_files(root: Path, folder: Path) -> Path:
    """Copy every file that git knows or would add; return the folder."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (root / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)
    return folder


@pytest.fixture
def copy_of_project(root: Path, course_build: Path, artifacts_root: Path, tmp_path: Path) -> Path:
    """Every file that git knows or would add, the environment, and what `make course` has built."""
    folder = copy_files(root, tmp_path / "project")
    (folder / ".venv").symlink_to(root / ".venv")
    (folder / "build").mkdir()
    # What was released here is no part of a clean checkout.
    shutil.copytree(artifacts_root, folder / "artifacts", ignore=shutil.ignore_patterns("ledger.jsonl", ".lock"))
    # A release is of a commit, so the copy has to be one. The link to the environment is no part of it.
    git = ["git", "-C", str(folder), "-c", "user.name=reader", "-c", "user.email=reader@example.com"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    (folder / ".git" / "info" / "exclude").write_text(".venv\n")
    subprocess.run([*git, "add", "--all"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--no-verify", "--message", "copy"], check=True)
    return folder


def clean_environment() -> dict[str, str]:
    """The environment without what `make test` around us, or a configured service, would add to it."""
    foreign = ("MODEL_", "APP_", "API_KEY", "MAKE", "MFLAGS")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)}


def test_make_course_prints_what_the_runbook_says(page: list[tuple[str, str]], root: Path, course_build: Path) -> None:
    """`make test` has run the command of `make course` already, so its recorded output is compared."""
    command, expected = page[0]
    assert command == "make course"
    recipe = subprocess.run(
        ["make", "-n", "course"], cwd=root, env=clean_environment(), capture_output=True, text=True, check=True
    ).stdout
    assert recipe.strip().splitlines()[-1] == ".venv/bin/python -m ops course"
    printed = (course_build / "course.txt").read_text()
    assert matches(expected, printed), printed


def test_every_other_command_prints_what_the_runbook_says(
    page: list[tuple[str, str]], copy_of_project: Path, unused_port: Callable[[], int]
) -> None:
    port, rest = unused_port(), page[1:]
    commands = [command.replace(":8000", f":{port}") for command, _ in rest]
    # One shell for all, with job control, because the page starts the service in one step and stops it in another.
    lines = ["set -m", *(f"{command}\nprintf '{MARK}'" for command in commands), "wait"]
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)],
        cwd=copy_of_project,
        env={**clean_environment(), "PORT": str(port), "PYTHONPATH": str(copy_of_project)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    outputs = done.stdout.split(MARK)
    log = copy_of_project / "build" / "service.log"
    assert len(outputs) == len(rest) + 1, done.stderr
    for (command, expected), printed in zip(rest, outputs, strict=False):
        told = printed.replace(f":{port}", ":8000")
        assert matches(expected, told), f"$ {command}\n{told}\n{done.stderr}\n{log.read_text() if log.exists() else ''}"


def test_the_runbook_has_what_a_runbook_needs(page: list[tuple[str, str]], root: Path) -> None:
    text = (root / "docs" / "golden_path.md").read_text()
    for heading in ("## Checklist", "## Definition of done", "## Rollback plan", "## Signals that must exist"):
        assert heading in text
    assert [command.split(" ")[0] for command, _ in page].count("make") >= 4
