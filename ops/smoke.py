"""Smoke test of a running service: is it alive, ready, the expected release, and does it answer as training did?"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import click

from ops import KEY_FILE, ROOT, setting, store_option


class Failed(click.ClickException):
    """The service did not answer as it must; the exit code is 1."""


def url_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the option that says which service is meant."""
    text = (
        "Where the service answers. Default: this machine, the port in PORT or 8000; if nothing listens there, "
        "Envoy's, in DOOR_PORT or 8080."
    )
    return click.option("--url", default=local_url, help=text)(command)


def local_url() -> str:
    """Return the address of the service on this machine: its own if something listens there, else Envoy's."""
    own, door = int(os.environ.get("PORT", "8000")), int(setting("DOOR_PORT", "8080"))
    open_ports = [port for port in (own, door) if listens(port)]
    return f"http://127.0.0.1:{[*open_ports, own][0]}"


def listens(port: int) -> bool:
    """Whether anything accepts connections at this port of this machine."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def key_for(url: str) -> str | None:
    """Return the key: from API_KEY, from the secret of this container, or, for this machine, that of its containers."""
    from mlops_course.serving import SECRETS

    if given := os.environ.get("API_KEY"):
        return given
    here = urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
    files = [SECRETS / "API_KEY", *([KEY_FILE] if here else [])]
    return next((file.read_text(encoding="ascii").strip() for file in files if file.is_file()), None)


def golden_of(version: str | None) -> dict[str, Any]:
    """Golden cases of an approved release; those of the newest one, for their requests only, if not approved."""
    from mlops_course.blueprint import parse_version

    folder = ROOT / "ops" / "releases"
    names = [path.parent.name for path in folder.glob("[!.]*/golden.json")]
    if not names:
        raise Failed("no approved release in ops/releases: there are no golden cases to send")
    known = version if version in names else max(names, key=parse_version)
    golden: dict[str, Any] = json.loads((folder / known / "golden.json").read_text())
    return golden | {"exact": known == version}


@click.command(short_help="Ask a running service for predictions and check the answers.")
@url_option
@click.option("--version", help="The model version that must answer.")
@click.option("--digest", help="The MODEL's digest that must be served, sha256:…; not that of a release or an image.")
@click.option(
    "--channel",
    type=click.Choice(["candidate", "staging", "prod"]),
    help="The release of this channel must run there: model, commit, service version and settings, as in the ledger.",
)
@store_option
def smoke(url: str, version: str | None, digest: str | None, channel: str | None, store_url: str | None) -> None:
    """Check /health, /ready and /v1/model, send golden requests of the served version, and a bad one.

    Each answer must have exactly the documented fields and types and, if the served version is an approved release,
    its recorded probabilities. Outside dev the key is read from the environment variable API_KEY; for this machine
    also from .secrets/API_KEY, which `make up` writes.
    """
    from mlops_course.release import SMOKE_CASES, ReleaseError, asking, expected_of, summary
    from mlops_course.release import smoke as check

    expected = {name: value for name, value in (("version", version), ("digest", digest)) if value}
    if channel:
        from ops.release import pointed_to  # not in the image of the checks, which has this file too

        release = pointed_to(channel, store_url)
        expected = {**expected_of(release), **expected}
    times: list[float] = []
    try:
        with asking(url, key_for(url), times, synthetic=True) as ask:
            served = ask("GET", "/v1/model").body
            found = served.get("version") if isinstance(served, dict) else None
            checks = check(ask, expected, golden_of(found))
    except ReleaseError as error:
        raise Failed(str(error)) from error
    for one in checks:
        click.echo(f"  {'pass' if one.passed else 'FAIL'}  {one.name:20} {one.detail}", err=not one.passed)
    if not checks[-1].passed:
        advice = "; start it with `make run` or `make up`" if checks[-1].detail.startswith("no answer") else ""
        raise Failed(f"{url}: {checks[-1].name}: {checks[-1].detail}{advice}")
    took = summary(times)
    click.echo(f"  {took['answers']} answers, median {took['p50']:.1f} ms, slowest {took['max']:.1f} ms")
    click.echo(f"ok: {url} serves {served['version']} ({served['digest'][:19]}), {SMOKE_CASES} predictions checked")
    if channel:
        click.echo(f"{channel}: {release.digest} runs there, with commit {release.git_sha[:12]} and {release.config}")
