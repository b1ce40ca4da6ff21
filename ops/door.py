"""Run the real Envoy on this machine with the configuration of ops/envoy: only the addresses are others."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from ops import ROOT

CONFIG = ROOT / "ops" / "envoy"
# Where a container finds the files.
HOME = "/etc/envoy"
# As in docker-compose.yml, which gives the reasons.
OPTIONS = ["--disable-hot-restart", "--concurrency", "2", "--log-level", "warning"]
OPTIONS += ["--file-flush-interval-msec", "1000"]


def configure(
    folder: Path,  # where to write the configuration
    door: int,  # port to listen on
    service: int,  # port of the service, on this machine
    admin: int = 0,  # port for statistics; 0 lets the system choose
) -> Path:
    """Write Envoy's configuration for this machine and return the file to start it with.

    Here statistics are asked for at the administration's port itself, so the listener that shows them to the inner
    network of the containers is left out.
    """
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    text = (CONFIG / "envoy.yaml").read_text(encoding="utf-8").replace(HOME, str(folder.resolve()))
    config: dict[str, Any] = yaml.safe_load(text)
    config["admin"]["address"]["socket_address"]["port_value"] = admin
    parts = config["static_resources"]
    parts["listeners"] = [one for one in parts["listeners"] if one["name"] == "door"]
    parts["clusters"] = [one for one in parts["clusters"] if one["name"] != "administration"]
    parts["listeners"][0]["address"]["socket_address"] = loopback(door)
    for cluster in parts["clusters"]:
        for place in cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]:
            place["endpoint"]["address"]["socket_address"] = loopback(service)
    shutil.copy(CONFIG / "routes.yaml", folder / "routes.yaml")
    target = folder / "envoy.json"
    target.write_text(json.dumps(config, indent=1), encoding="utf-8")
    return target


def loopback(port: int) -> dict[str, Any]:
    """Return an address of this machine only."""
    return {"address": "127.0.0.1", "port_value": port}


def executable() -> str:
    """Return where Envoy is: in this environment, or on the PATH. Raises `ClickException` if it is nowhere."""
    beside = Path(sys.executable).parent / "envoy"
    found = str(beside) if beside.exists() else shutil.which("envoy")
    if found is None:
        raise click.ClickException("there is no Envoy for this system on PyPI; use `make up`, which needs Docker")
    return found


def arguments(config: Path) -> list[str]:
    """Return the command line that starts Envoy, with the options of docker-compose.yml."""
    return [executable(), "-c", str(config), *OPTIONS]


@click.command(short_help="Run Envoy in front of a service on this machine.")
@click.option("--port", default=8080, show_default=True, help="Where Envoy listens.")
@click.option("--service", default=8000, show_default=True, help="The port of the service.")
def door(port: int, service: int) -> None:
    """Start the real Envoy, with the limits and routes of ops/envoy, until it is interrupted.

    Start the service first, with `make run`. No Docker is needed.
    """
    command = arguments(configure(ROOT / "build" / "door", port, service))
    click.echo(f"Envoy listens on http://127.0.0.1:{port}, in front of http://127.0.0.1:{service}; stop it with Ctrl-C")
    sys.stdout.flush()
    os.execv(command[0], command)  # noqa: S606 - a fixed list of arguments, and no shell is wanted
