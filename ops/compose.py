"""Start and stop the service in containers, as in production: docker-compose.yml with what it has to be told."""

from __future__ import annotations

import secrets
import time
from pathlib import Path

import click

from ops import KEY_FILE, artifacts_option, setting, store_option
from ops.docker import DockerError, docker, missing
from ops.image import checks_of, exists, labels, plan
from ops.smoke import listens

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

    if given := setting("MODEL_DIGEST"):
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


def taken(told: dict[str, str]) -> str:
    """Return a line that says that the door's port belongs to another program, or nothing."""
    port = int(setting("DOOR_PORT", "8080"))
    ours = compose("ps", "--quiet", "--status=running", "envoy", environment=told, show=False).strip()
    if ours or not listens(port):
        return ""
    return f"\nPort {port} is taken by another program; choose another: DOOR_PORT=8090 make up"


def start_checks(dev: bool, told: dict[str, str]) -> None:
    """Start the checks on a schedule. What serves is not stopped because nobody watches it, but it is said."""
    image = told["CHECKS_IMAGE"]
    try:
        if not exists(image):
            raise DockerError(f"there is no image {image}; `make image` builds it, or name another in CHECKS_IMAGE")
        compose("up", "--detach", "checks", dev=dev, environment=told)
    except DockerError as error:
        click.echo(f"Not checked on a schedule: {error.message}", err=True)


def of_channel(channel: str, store_url: str | None) -> dict[str, str]:
    """Return what Compose is told to run the release of a channel, and pull its images if they are not here."""
    from mlops_course.release import variables
    from ops.release import pointed_to

    told = variables(pointed_to(channel, store_url))
    if not (image := told["SERVICE_IMAGE"]):
        raise DockerError(f"the release in {channel} has no image, so it cannot run in a container")
    pull(image)
    told["CHECKS_IMAGE"] = checks_of(image)
    try:
        pull(told["CHECKS_IMAGE"])
    except DockerError as error:
        click.echo(f"the image of the checks was not pulled: {error.message}", err=True)
    return told


def pull(image: str) -> None:
    """Bring an image here, unless it is. Raises `DockerError` if its registry does not give it."""
    if not exists(image):
        click.echo(f"pulling {image} ...")
        docker("pull", "--quiet", image)


@click.command(short_help="Start the service in containers and wait until it is ready.")
@click.option("--image", "image_name", metavar="NAME", help="Default: the image of the commit that is checked out.")
@click.option(
    "--channel",
    type=click.Choice(["candidate", "staging", "prod"]),
    help="Run the release of this channel: image, model digest and every setting as in the ledger.",
)
@click.option(
    "--env",
    "place",
    type=click.Choice(["dev", "staging", "prod"]),
    default=lambda: setting("APP_ENV") or None,
    help="Which kind of place this is. Default: prod; with --channel candidate or staging: staging.",
)
@store_option
@click.option("--dev", is_flag=True, help="With the code of the working copy, reloaded at each change.")
@artifacts_option
def up(
    image_name: str | None, channel: str | None, place: str | None, store_url: str | None, dev: bool, artifacts: Path
) -> None:
    """Start Envoy and the service from built images, wait until they are healthy, and print the URLs.

    Then the checks on a schedule are started; without them the service runs all the same. The API key is in
    .secrets/API_KEY; a random one is written there if there is none. With --channel nothing starts unless the ledger
    names a release, and no setting of the shell or of .env reaches it.
    """
    if why := missing():
        raise DockerError(why)
    if channel and (image_name or dev):
        raise click.UsageError("--channel says which image runs: leave out --image and --dev")
    release = of_channel(channel, store_url) if channel else {}
    place = place or ("staging" if channel in ("candidate", "staging") else "prod")
    name = release.get("SERVICE_IMAGE") or image_name or setting("SERVICE_IMAGE") or plan(artifacts, None).tag
    if not exists(name):
        raise DockerError(f"there is no image {name}; build it with `make image`")
    key_file = Path(setting("API_KEY_FILE") or KEY_FILE)
    make_key(key_file)
    told = {
        "SERVICE_IMAGE": name,
        "CHECKS_IMAGE": setting("CHECKS_IMAGE") or checks_of(name),
        "APP_ENV": place,
        "MODEL_DIGEST": release.get("MODEL_DIGEST") or expected_digest(name, artifacts),
        "API_KEY_FILE": str(key_file.resolve()),
        **release,
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
        why = f"{error.message}\n{said}{taken(told)}"
        raise DockerError(f"{why}\nNot ready. `make down` removes what was started.") from error
    click.echo(f"{name} is ready after {time.monotonic() - started:.1f} s, as {place}")
    start_checks(dev, told)
    click.echo(f"  predictions  {url}/v1/predict   header X-API-Key: the text in {key_file}")
    click.echo(f"  readiness    {url}/ready")
    check = f"make smoke CHANNEL={channel}" if channel else "make smoke"
    click.echo(f"Check it with `{check}`, see its logs with `docker compose logs`, remove it with `make down`.")


@click.command(short_help="Stop and remove the containers that `up` has started.")
def down() -> None:
    """Stop the containers, letting requests in flight finish, and remove them with their networks."""
    compose("down", "--remove-orphans", "--volumes")
