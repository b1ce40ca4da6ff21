"""Ask the vulnerability service of PyPI about every locked package. What could not be asked counts as a failure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from ops import ROOT
from ops.lock import CHECKS_LOCK, FULL_LOCK, SERVICE_LOCK


class Found(click.ClickException):
    """Something is vulnerable, or nobody could say; the exit code is 1."""


def ask(lock: Path) -> list[dict[str, Any]]:
    """Return what pip-audit says about each package of a lock that belongs on this platform."""
    options = ["--disable-pip", "--require-hashes", "--format", "json", "--progress-spinner", "off"]
    command = [sys.executable, "-m", "pip_audit", *options, "--requirement", str(lock)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        found: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except ValueError:
        said = done.stderr.strip().splitlines() or ["no output"]
        raise Found(f"{lock.name} was not audited: pip-audit ended without a result: {said[-1][:300]}") from None
    return found


def problems(found: list[dict[str, Any]]) -> list[str]:
    """Return one line for each vulnerability, and one for the packages that nobody could say anything about."""
    lines = [
        f"{one['name']} {one['version']}: {bug['id']}, fixed in {', '.join(bug['fix_versions']) or 'no version yet'}"
        for one in found
        for bug in one.get("vulns", ())
    ]
    unknown = [one["name"] for one in found if "skip_reason" in one]
    if unknown:
        lines.append(
            f"{len(unknown)} of {len(found)} packages were not audited: PyPI's vulnerability service does not answer "
            f"here, or does not know them ({', '.join(unknown[:3])}, …)"
        )
    return lines


@click.command(short_help="Look for known vulnerabilities of the locked packages.")
@click.argument("locks", nargs=-1, type=click.Path(path_type=Path, exists=True, dir_okay=False))
def audit(locks: tuple[Path, ...]) -> None:
    """Audit LOCKS; by default all lock files that the project installs from.

    Exit code 1 for a known vulnerability, and also if a package could not be audited: silence is no answer. Packages
    for other platforms than this one are not asked about.
    """
    failed = False
    for lock in locks or tuple(ROOT / name for name in (FULL_LOCK, SERVICE_LOCK, CHECKS_LOCK)):
        name = lock.relative_to(ROOT).as_posix() if lock.is_relative_to(ROOT) else str(lock)
        found = ask(lock)
        lines = problems(found)
        click.echo(f"{name}: {len(found)} packages, {'no known vulnerability' if not lines else 'not in order'}")
        for line in lines:
            click.echo(f"  {line}")
        failed = failed or bool(lines)
    if failed:
        raise Found("not every package is known to be free of known vulnerabilities; see above")
