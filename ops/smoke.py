"""Smoke test of a running service: is it alive, ready, and does it answer what training answered?"""

from __future__ import annotations

import json
import os
import socket
from typing import Any
from urllib.parse import urlsplit

import click

from ops import ROOT
from ops.compose import KEY_FILE

TIMEOUT_S = 5.0
# How many golden cases are asked over the network; the service itself replays all of them at start.
CASES = 5


class Failed(click.ClickException):
    """The service did not answer as it must; the exit code is 1."""


@click.command(short_help="Ask a running service for predictions and check the answers.")
@click.option(
    "--url",
    help="Where the service answers. Default: this machine, the port in PORT or 8000; if nothing listens there, "
    "Envoy's, in DOOR_PORT or 8080.",
)
def smoke(url: str | None) -> None:
    """Check /health, /ready and /v1/model, then send golden requests of the served version.

    The answers must have the documented fields and, if the served version is an approved release, its recorded
    probabilities. Outside dev the key is read from the environment variable API_KEY; for this machine also from
    .secrets/API_KEY, which `make up` writes.
    """
    import httpx

    url = url or local_url()
    key = os.environ.get("API_KEY") or local_key(url)
    headers = {"X-API-Key": key} if key else {}
    with httpx.Client(base_url=url, timeout=TIMEOUT_S, headers=headers) as client:
        try:
            model = check_up(client)
            count = check_answers(client, model)
        except httpx.HTTPError as error:
            raise Failed(
                f"{url} does not answer ({type(error).__name__}); start it with `make run` or `make up`"
            ) from error
    click.echo(f"ok: {url} serves {model['version']} ({model['digest'][:19]}), {count} predictions checked")


def local_url() -> str:
    """Return the address of the service on this machine: its own if something listens there, else Envoy's."""
    own, door = int(os.environ.get("PORT", "8000")), int(os.environ.get("DOOR_PORT", "8080"))
    open_ports = [port for port in (own, door) if listens(port)]
    return f"http://127.0.0.1:{[*open_ports, own][0]}"


def listens(port: int) -> bool:
    """Whether anything accepts connections at this port of this machine."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def local_key(url: str) -> str | None:
    """Return the key of the containers on this machine, if this is this machine and there is one."""
    if urlsplit(url).hostname not in ("127.0.0.1", "localhost", "::1") or not KEY_FILE.is_file():
        return None
    return KEY_FILE.read_text(encoding="ascii").strip()


def get(client: Any, path: str) -> dict[str, Any]:
    """GET a path and return its JSON. Raises `Failed` for anything but 200."""
    answer = client.get(path)
    if answer.status_code != 200:
        raise Failed(f"GET {path} answered {answer.status_code}: {answer.text[:300]}")
    return content(answer, path)


def content(answer: Any, path: str) -> dict[str, Any]:
    """Return the JSON object of an answer. Raises `Failed` for anything else."""
    try:
        body = answer.json()
    except ValueError as error:
        raise Failed(f"{path} answered no JSON: {answer.text[:300]}") from error
    if not isinstance(body, dict):
        raise Failed(f"{path} answered no object: {answer.text[:300]}")
    return body


def check_up(client: Any) -> dict[str, Any]:
    """Alive, ready, and able to say which model it serves."""
    get(client, "/health")
    get(client, "/ready")
    model = get(client, "/v1/model")
    if missing := {"version", "digest"} - model.keys():
        raise Failed(f"GET /v1/model lacks {', '.join(sorted(missing))}")
    return model


def golden_of(version: str) -> dict[str, Any]:
    """Golden cases of an approved release; those of the newest one, for their requests only, if not approved."""
    from mlops_course.blueprint import parse_version

    folder = ROOT / "ops" / "releases"
    names = [path.parent.name for path in folder.glob("[!.]*/golden.json")]
    if not names:
        raise Failed("no approved release in ops/releases: there are no golden cases to send")
    known = version if version in names else max(names, key=parse_version)
    golden: dict[str, Any] = json.loads((folder / known / "golden.json").read_text())
    return golden | {"exact": known == version}


def check_answers(client: Any, model: dict[str, Any]) -> int:
    """Send golden requests. Fields, bounds and decision are always checked, the probability where it is recorded."""
    golden = golden_of(model["version"])
    # The answer is rounded to four decimals, which may move it by half of the last one.
    tolerance = golden["tolerance"] + 0.5e-4
    for case in golden["cases"][:CASES]:
        answer = client.post("/v1/predict", json=case["request"])
        if answer.status_code != 200:
            raise Failed(f"POST /v1/predict answered {answer.status_code}: {answer.text[:300]}")
        body = content(answer, "POST /v1/predict")
        if missing := {"request_id", "prediction", "probability", "threshold", "model_version"} - body.keys():
            raise Failed(f"the answer lacks {', '.join(sorted(missing))}")
        number = isinstance(body["probability"], float | int)
        if not number or not 0 <= body["probability"] <= 1 or body["model_version"] != model["version"]:
            raise Failed(f"implausible answer: {body}")
        if body["prediction"] != ("disrupted" if body["probability"] >= body["threshold"] else "on_time"):
            raise Failed(f"the prediction contradicts probability and threshold: {body}")
        if golden["exact"] and abs(body["probability"] - case["probability"]) > tolerance:
            raise Failed(f"probability {body['probability']}, recorded {case['probability']}: another model?")
    return CASES
