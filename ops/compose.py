"""Start and stop the service in containers, as in production: docker-compose.yml with what it has to be told."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

import click

from ops import KEY_FILE, artifacts_option
from ops.docker import DockerError, docker, missing
from ops.image import checks_of, exists, labels, plan

READY_S = 90  # for both containers to become healthy
LINES = 15  # of the service's log, shown when it does not become ready


def make_key(path: Path) -> None:
    """Write a random key unless there is one.

    The folder keeps other users of this machine out; the file itself is readable, because in the container another
    user has to read it.
    """
    if path.exists():
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.write_text(secrets.token_urlsafe(32) + "\n", encoding="ascii")
    path.chmod(0o444)


def expected_digest(image: str, artifacts: Path) -> str:
    """Return the digest that the image's model must have: MODEL_DIGEST if it is set, else what the registry says."""
    from mlops_course.blueprint import MODEL_NAME, read_registry

    if given := os.environ.get("MODEL_DIGEST"):
        return given
    version = labels(image)["model"]
    known = read_registry(artifacts / MODEL_NAME).versions
    if version not in known:
        raise DockerError(f"{image} carries model {version}, which the registry does not know; set MODEL_DIGEST")
    return known[version]


def compose(*arguments: str, dev: bool = False, environment: dict[str, str] | None = None, show: bool = True) -> str:
    """Run docker compose with our files."""
    files = ["--file", "docker-compose.yml", *(["--file", "docker-compose.dev.yml"] if dev else [])]
    return docker("compose", *files, *arguments, environment=environment, show=show)


def wait_for(url: str, seconds: float) -> None:
    """Wait until the service is ready behind its door. Raises `DockerError` when time is up."""
    import httpx

    end, last = time.monotonic() + seconds, "no answer"
    while time.monotonic() < end:
        try:
            answer = httpx.get(url + "/ready", timeout=2)
        except httpx.TransportError as error:
            last = type(error).__name__
        else:
            if answer.status_code == 200:
                return
            last = f"{answer.status_code} {answer.text[:200]}"
        time.sleep(0.1)
    raise DockerError(f"{url}/ready: {last}")


def start_checks(dev: bool, told: dict[str, str]) -> None:
    """Start the checks on a schedule. What serves is not stopped because nobody watches it, but it is said."""
    image = told["CHECKS_IMAGE"]
    try:
        if not exists(image):
            raise DockerError(f"there is no image {image}; `make image` builds it, or name another in CHECKS_IMAGE")
        compose("up", "--detach", "checks", dev=dev, environment=told)
    except DockerError as error:
        click.echo(f"Not checked on a schedule: {error.message}", err=True)


@click.command(short_help="Start the service in containers and wait until it is ready.")
@click.option("--image", "image_name", metavar="NAME", help="Default: the image of the commit that is checked out.")
@click.option(
    "--env", "place", type=click.Choice(["dev", "staging", "prod"]), envvar="APP_ENV", default="prod", show_default=True
)
@click.option("--dev", is_flag=True, help="With the code of the working copy, reloaded at each change.")
@artifacts_option
def up(image_name: str | None, place: str, dev: bool, artifacts: Path) -> None:
    """Start Envoy and the service from built images, wait until they are healthy, and print the URLs.

    Then the checks on a schedule are started; without them the service runs all the same. The API key is in
    .secrets/API_KEY; a random one is written there if there is none.
    """
    if why := missing():
        raise DockerError(why)
    name = image_name or os.environ.get("SERVICE_IMAGE") or plan(artifacts, None).tag
    if not exists(name):
        raise DockerError(f"there is no image {name}; build it with `make image`")
    key_file = Path(os.environ.get("API_KEY_FILE") or KEY_FILE)
    make_key(key_file)
    told = {
        "SERVICE_IMAGE": name,
        "CHECKS_IMAGE": os.environ.get("CHECKS_IMAGE") or checks_of(name),
        "APP_ENV": place,
        "MODEL_DIGEST": expected_digest(name, artifacts),
        "API_KEY_FILE": str(key_file.resolve()),
    }
    started = time.monotonic()
    try:
        compose("up", "--detach", "--wait", "--wait-timeout", str(READY_S), "envoy", dev=dev, environment=told)
        url = "http://" + compose("port", "envoy", "8080", environment=told, show=False).strip()
        wait_for(url, 10)
    except DockerError as error:
        logs = compose("logs", "--no-color", "--no-log-prefix", "service", environment=told, show=False).splitlines()
        # Its answers to the health check would hide what it said about itself.
        said = "\n".join([line for line in logs if '"event":"request"' not in line][-LINES:])
        raise DockerError(f"{error.message}\n{said}\nNot ready. `make down` removes what was started.") from error
    click.echo(f"{name} is ready after {time.monotonic() - started:.1f} s, as {place}")
    start_checks(dev, told)
    click.echo(f"  predictions  {url}/v1/predict   header X-API-Key: the text in {key_file}")
    click.echo(f"  readiness    {url}/ready")
    click.echo("Check it with `make smoke`, see its logs with `docker compose logs`, remove it with `make down`.")


@click.command(short_help="Stop and remove the containers that `up` has started.")
def down() -> None:
    """Stop the containers, letting requests in flight finish, and remove them with their networks."""
    compose("down", "--remove-orphans", "--volumes")
