"""Start and stop the service in containers, as in production: docker-compose.yml with what it has to be told."""

from __future__ import annotations

import json
import secrets
import time
from pathlib import Path

import click

from ops import KEY_FILE, ROOT, artifacts_option, setting, store_option
from ops.docker import DockerError, docker, missing
from ops.image import checks_of, exists, labels, plan
from ops.smoke import listens

READY_S = 90  # for both containers to become healthy
WATCHING_S = 60  # for each of those that watch
SECRETS = KEY_FILE.parent
SUMMARY = ROOT / "build" / "summary"  # `python -m ops summary` writes it, Grafana shows it
# Where alerts go until somebody names another place: the container that writes them down.
INBOX_URL = "http://inbox:8080/"
LINES = 15  # of the service's log, shown when it does not become ready


def make_key(path: Path, text: str | None = None) -> None:
    """Write a secret unless there is one: a random key, or `text`.

    The folder keeps other users of this machine out; the file itself is readable, because in the container another
    user has to read it.
    """
    if path.exists():
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.write_text((text or secrets.token_urlsafe(32)) + "\n", encoding="ascii")
    path.chmod(0o444)


def make_secrets() -> dict[str, str]:
    """Write each secret that is not there, and return which variable names which file."""
    files = {}
    for name, text in (("API_KEY", None), ("ALERT_WEBHOOK_URL", INBOX_URL), ("GRAFANA_PASSWORD", None)):
        variable = "ALERT_WEBHOOK_FILE" if name == "ALERT_WEBHOOK_URL" else f"{name}_FILE"
        path = Path(setting(variable) or SECRETS / name)
        make_key(path, text)
        files[variable] = str(path.resolve())
    return files


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


# What watches, in the order in which it is started: the service's name in docker-compose.yml, what is missing without
# it, the port inside the container for those that somebody looks at.
WATCHERS = {
    "checks": ("Not checked on a schedule", None),
    "inbox": ("No inbox for alerts", None),
    "alertmanager": ("No alerts are sent", 9093),
    "prometheus": ("Not watched by Prometheus", 9090),
    "grafana": ("No dashboards", 3000),
}


def obtain(image: str) -> None:
    """Make sure that an image is here. Raises `DockerError` that says in one line why it is not."""
    if exists(image):
        return
    if image.startswith("flight-disruption"):
        raise DockerError(f"there is no image {image}; `make image` builds it, or name another in CHECKS_IMAGE")
    click.echo(f"pulling {image}", err=True)
    try:
        docker("pull", "--quiet", image)
    except DockerError as error:
        why = error.message.strip().splitlines()[-1].rpartition("daemon: ")[2]
        raise DockerError(f"the image {image} is not here and cannot be pulled ({why})") from error


def start_watchers(dev: bool, told: dict[str, str]) -> dict[str, str]:
    """Start what watches, and return the addresses. What serves is not stopped because nobody looks, but it is said."""
    found: dict[str, str] = {}
    services = json.loads(compose("config", "--format", "json", environment=told, show=False))["services"]
    for name, (without, port) in WATCHERS.items():
        try:
            obtain(services[name]["image"])
            waiting = ["--wait", "--wait-timeout", str(WATCHING_S)] if port else []
            compose("up", "--detach", "--no-deps", *waiting, name, dev=dev, environment=told)
            if port:
                found[name] = "http://" + compose("port", name, str(port), environment=told, show=False).strip()
        except DockerError as error:
            click.echo(f"{without}: {error.message}", err=True)
    return found


def of_channel(channel: str, store_url: str | None) -> dict[str, str]:
    """Return what Compose is told to run the release of a channel, and pull its images if they are not here."""
    from mlops_course.release import variables
    from ops.release import pointed_to

    told = variables(pointed_to(channel, store_url))
    if not (image := told["SERVICE_IMAGE"]):
        raise DockerError(f"the release in {channel} has no image, so it cannot run in a container")
    obtain(image)
    told["CHECKS_IMAGE"] = checks_of(image)  # brought by `start_watchers`, or missed there
    return told


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

    Then what watches them is started: checks on a schedule, Prometheus, Alertmanager, Grafana. Without one of these the
    rest runs all the same, and a line says so. The API key is in .secrets/API_KEY, Grafana's password beside it; what
    is not there is made. With --channel nothing starts unless the ledger names a release, and no setting of the shell
    or of .env reaches it.
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
    SUMMARY.mkdir(parents=True, exist_ok=True)  # else Docker makes it, and then it is root's
    told = make_secrets() | {
        "SERVICE_IMAGE": name,
        "CHECKS_IMAGE": setting("CHECKS_IMAGE") or checks_of(name),
        "APP_ENV": place,
        "MODEL_DIGEST": release.get("MODEL_DIGEST") or expected_digest(name, artifacts),
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
    found = start_watchers(dev, told)
    click.echo(f"  predictions   {url}/v1/predict   header X-API-Key: the text in {told['API_KEY_FILE']}")
    click.echo(f"  readiness     {url}/ready")
    for name, text in (
        ("prometheus", "metrics, rules, alerts"),
        ("alertmanager", "who was told"),
        ("grafana", "dashboards"),
    ):
        if name in found:
            click.echo(f"  {name:12}  {found[name]}   {text}")
    if "grafana" in found:
        click.echo(f"                looking needs no password; that of admin is in {told['GRAFANA_PASSWORD_FILE']}")
    check = f"make smoke CHANNEL={channel}" if channel else "make smoke"
    click.echo(f"Check it with `{check}`, see its logs with `docker compose logs`, remove it with `make down`.")


@click.command(short_help="Stop and remove the containers that `up` has started.")
@click.option("--volumes", is_flag=True, help="Delete what Prometheus and Alertmanager have kept, too.")
def down(volumes: bool) -> None:
    """Stop the containers, letting requests in flight finish, and remove them with their networks.

    The samples stay, for the objectives look back 30 days.
    """
    compose("down", "--remove-orphans", *(["--volumes"] if volumes else []))
