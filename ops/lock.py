"""Resolve the lock files again, on purpose, and say what changed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from ops import ROOT

FULL_LOCK = "requirements.lock"
SERVICE_LOCK = "service/requirements.lock"
CHECKS_LOCK = "ops/checks/requirements.lock"
# One resolution for Linux and macOS on both processors; hashes, so that an install gets exactly these files.
COMMON = ["--universal", "--generate-hashes", "--python-version", "3.11", "--no-annotate", "--no-header"]

# A package (name, version) and the hashes of its files.
Pins = dict[tuple[str, str], frozenset[str]]

PIN = re.compile(r"(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;]+)")
HASH = re.compile(r"--hash=(sha256:[0-9a-f]{64})")


def read_lock(path: Path) -> Pins:
    """Return every pinned package of a lock file with its hashes.

    A package can appear with two versions, each for its own platforms. Raises `ValueError` for a line that
    is not a pinned package with hashes.
    """
    pins: dict[tuple[str, str], frozenset[str]] = {}
    # A pin goes on over the lines that end in a backslash.
    for entry in path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        if not entry.strip():
            continue
        pin, hashes = PIN.match(entry), frozenset(HASH.findall(entry))
        if pin is None or not hashes:
            raise ValueError(f"{path.name}: not a pinned package with hashes: {entry[:80]!r}")
        pins[pin["name"], pin["version"]] = hashes
    return pins


def versions(pins: Pins) -> dict[str, str]:
    """Return the version of each package as text; two versions are joined by a slash."""
    joined: dict[str, str] = {}
    for name, version in sorted(pins):
        joined[name] = f"{joined[name]} / {version}" if name in joined else version
    return joined


def changed(before: Pins, after: Pins) -> list[str]:
    """Return one line for each package that was added, removed or got another version, by name."""
    old, new = versions(before), versions(after)
    return [
        f"{name}: {old.get(name, 'not there')} -> {new.get(name, 'removed')}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def compile_lock(root: Path, output: Path, *arguments: str) -> None:
    """Run uv's resolver on the project's requirements.

    Raises `click.ClickException` when there is no solution.
    """
    command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", *arguments, *COMMON, "-o", str(output)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"could not resolve {output.name}; all locks stay as they were.\n{done.stderr}")


@click.command(short_help="Resolve the lock files again and print what changed.")
@click.option(
    "--upgrade/--no-upgrade", default=False, help="Take the newest allowed versions; default: change only what must."
)
def lock(upgrade: bool) -> None:
    """Write requirements.lock, then two parts of it with the same versions.

    service/requirements.lock is all that the service needs; ops/checks/requirements.lock is what the checks on a
    schedule need on top of that. Commit all. A failed resolution leaves all as they were.
    """
    extra = ["--upgrade"] if upgrade else []
    with tempfile.TemporaryDirectory(prefix="lock-") as temporary:
        full, service, checks = (Path(temporary, f"{name}.lock") for name in ("full", "service", "checks"))
        # uv keeps the versions it finds in the output file, unless told to upgrade.
        shutil.copy(ROOT / FULL_LOCK, full)
        shutil.copy(ROOT / SERVICE_LOCK, service)
        shutil.copy(ROOT / CHECKS_LOCK, checks)
        compile_lock(ROOT, full, "--all-extras", *extra)
        compile_lock(ROOT, service, "-c", str(full), *extra)
        there = [text for name, _ in read_lock(service) for text in ("--no-emit-package", name)]
        compile_lock(ROOT, checks, "--extra", "checks", "-c", str(full), *there, *extra)
        for name, new in ((FULL_LOCK, full), (SERVICE_LOCK, service), (CHECKS_LOCK, checks)):
            lines = changed(read_lock(ROOT / name), read_lock(new))
            click.echo(f"{name}: {len(lines) or 'no'} version{'' if len(lines) == 1 else 's'} changed")
            for line in lines:
                click.echo(f"  {line}")
            shutil.copyfile(new, ROOT / name)
