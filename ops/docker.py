"""What the commands that need Docker share: calling it, and saying clearly when it is not there."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping

import click

from ops import ROOT


class DockerError(click.ClickException):
    """Docker is missing or refused; the message says what to do, the exit code is 1."""


def missing() -> str | None:
    """Return why Docker cannot be used here, or None if it can."""
    if shutil.which("docker") is None:
        return "there is no `docker` command; install Docker Engine or Docker Desktop, with Compose and buildx"
    done = subprocess.run(["docker", "info"], capture_output=True, text=True, check=False)  # noqa: S607 - on the PATH
    if done.returncode:
        return f"no Docker engine answers; start it ({done.stderr.strip().splitlines()[-1][:200]})"
    return None


def docker(
    *arguments: str,
    environment: Mapping[str, str] | None = None,  # on top of this process's
    show: bool = False,  # let the output through instead of returning it
) -> str:
    """Run docker in the project's folder and return what it printed. Raises `DockerError` when it fails."""
    done = subprocess.run(
        ["docker", *arguments],  # noqa: S607 - on the PATH
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdout=None if show else subprocess.PIPE,
        stderr=None if show else subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        if why := missing():
            raise DockerError(why)
        said = "" if show else f": {done.stderr.strip()[-2000:]}"
        raise DockerError(f"docker {' '.join(arguments[:3])} … failed{said}")
    return done.stdout or ""
