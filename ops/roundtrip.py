"""Check that the chapters are clean and that `mlops_course` is exactly what they export."""

from __future__ import annotations

import difflib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from ops import ROOT

CHAPTERS, PACKAGE = "chapters", "mlops_course"
# The data is large and no tool rewrites it; the rest are caches.
NOT_COPIED = shutil.ignore_patterns("data", "__pycache__", ".ipynb_checkpoints", ".last_checked")
DIFF_LINES = 20


def snapshot(root: Path) -> dict[str, bytes]:
    """Return the content of every file in `root`'s chapters and package, by path relative to `root`."""
    files = (path for part in (CHAPTERS, PACKAGE) for path in (root / part).rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def run_tool(name: str, cwd: Path, config_home: Path) -> None:
    """Run one nbdev command in `cwd`. Raises `click.ClickException` with its output when it fails."""
    # A personal nbdev configuration would change what it writes; IN_TEST makes nbdev-export do nothing.
    env = {key: value for key, value in os.environ.items() if key != "IN_TEST"} | {"XDG_CONFIG_HOME": str(config_home)}
    tool = Path(sys.executable).parent / name
    done = subprocess.run([tool], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    # nbdev-clean only warns about a notebook that it cannot read, and exits 0.
    if done.returncode or "Failed to clean" in done.stderr:
        raise click.ClickException(f"{name} failed:\n{done.stdout}{done.stderr}")


def clashing_targets(root: Path) -> list[str]:
    """Return one line for each module that more than one notebook exports to.

    nbdev lets the last notebook win without a word, and the result is stable, so comparing files cannot
    see it. Raises `click.ClickException` for a file that is not JSON, such as one with merge marks.
    """
    owners: dict[str, list[str]] = {}
    for path in sorted((root / CHAPTERS).rglob("*.ipynb")):
        try:
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        except ValueError as err:
            raise click.ClickException(f"{path.name} is not a notebook: {err}") from err
        for cell in cells:
            for line in "".join(cell["source"]).splitlines():
                if line.startswith("#|") and line[2:].split()[:1] == ["default_exp"]:
                    owners.setdefault(line.split()[-1], []).append(path.name)
    return [f"{module}: exported by {' and '.join(names)}" for module, names in owners.items() if len(names) > 1]


def differences(root: Path) -> dict[str, str]:
    """Return what is wrong with each file that clean and export would change, by its path.

    Works on a temporary copy: nothing under `root` is touched. Raises `click.ClickException` when a tool
    fails.
    """
    with tempfile.TemporaryDirectory(prefix="roundtrip-") as temporary:
        copy, config_home = Path(temporary, "tree"), Path(temporary, "config")
        for part in (CHAPTERS, PACKAGE):
            shutil.copytree(root / part, copy / part, ignore=NOT_COPIED)
        shutil.copy(root / "pyproject.toml", copy)
        before = snapshot(copy)
        # Export never deletes: without this a module whose chapter is gone would look up to date.
        # __init__.py stays, because nbdev reads the version from it.
        for path in (copy / PACKAGE).rglob("*.py"):
            if path.name != "__init__.py":
                path.unlink()
        run_tool("nbdev-clean", copy, config_home)
        run_tool("nbdev-export", copy, config_home)
        after = snapshot(copy)
    return {
        name: explain(name, before.get(name), after.get(name))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    }


def explain(name: str, before: bytes | None, after: bytes | None) -> str:
    """Return what is wrong with one file, with the first lines of the diff where both sides exist."""
    if before is None:
        return f"{name}: missing, export would create it"
    if after is None:
        return f"{name}: no chapter exports it"
    old, new = (side.decode(errors="replace").splitlines() for side in (before, after))
    diff = list(difflib.unified_diff(old, new, "in the tree", "after clean and export", lineterm="", n=1))
    more = [f"... {len(diff) - DIFF_LINES} more lines"] if len(diff) > DIFF_LINES else []
    reason = "not clean" if name.startswith(CHAPTERS) else "not what the chapters export"
    return "\n".join([f"{name}: {reason}", *(f"    {line}" for line in diff[:DIFF_LINES] + more)])


@click.command(short_help="Check that the notebooks are clean and the generated package is up to date.")
@click.option("--root", type=click.Path(path_type=Path, exists=True, file_okay=False), default=ROOT, hidden=True)
def roundtrip(root: Path) -> None:
    """Clean and export a temporary copy of the chapters and compare it with the working tree.

    Nothing is edited. Each differing file is named; exit code 1 when there is any.
    """
    problems = [*clashing_targets(root), *differences(root).values()]
    for problem in problems:
        click.echo(problem)
    if problems:
        raise click.ClickException("run `make export` and commit the result; edit chapters, never the modules")
    click.echo("The chapters are clean and mlops_course is what they export.")
