"""Record a release, move it from candidate to staging to prod, put it back, and read what happened."""

from __future__ import annotations

import getpass
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ops import ROOT, artifacts_option, store_option
from ops.smoke import key_for, url_option

if TYPE_CHECKING:
    from mlops_course.release import Evidence, Release, Store


class Refused(click.ClickException):
    """A step that was refused for a reason its message gives; the exit code is 1."""


STORE_HELP = (
    "for s3://… set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, outside Amazon, AWS_ENDPOINT_URL; for a folder "
    "look at its rights"
)


@contextmanager
def told() -> Iterator[None]:
    """Turn the errors of chapters 1 and 4 and of the store into one line and exit code 1; warnings are printed."""
    from botocore.exceptions import BotoCoreError  # type: ignore[import-untyped]

    from mlops_course.blueprint import ArtifactError, VersionError
    from mlops_course.release import BehindWarning, Conflict, ReleaseError

    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always", BehindWarning)
            yield
    except Conflict as error:
        raise Refused(
            f"{error} at the same moment; look at `.venv/bin/python -m ops history`, then run this again"
        ) from error
    except (ArtifactError, VersionError, ReleaseError) as error:
        raise Refused(str(error)) from error
    except (BotoCoreError, OSError) as error:
        raise Refused(f"the store cannot be used ({error}); {STORE_HELP}") from error
    for warning in seen:
        click.echo(f"Warning: {warning.message}", err=True)


def by_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the option that says who acts."""
    return click.option("--by", default=getpass.getuser, show_default="your user name", help="Who does this.")(command)


note_option = click.option("--note", default="", help="Why, in one sentence.")


def open_store(url: str | None) -> Store:
    """Return the store that an option names, or the project's own."""
    from mlops_course.blueprint import MODEL_NAME
    from mlops_course.release import Store

    return Store(url or ROOT / "artifacts" / MODEL_NAME)


def pointed_to(channel: str, store_url: str | None) -> Release:
    """Return the release that a channel points to. Raises `Refused` if there is none."""
    from mlops_course.release import read_ledger

    with told():
        found = read_ledger(open_store(store_url)).current(channel)  # type: ignore[arg-type]
    if found is None:
        raise Refused(f"{channel} points to nothing yet; see `.venv/bin/python -m ops history`")
    return found


def head() -> str:
    """Return the commit that is checked out. With uncommitted changes it is refused: nobody could find them again."""
    from ops.image import revision

    found = revision()
    if found.endswith("-dirty"):
        raise Refused(
            "there are uncommitted changes, so this is no release of a commit; commit them, or give --git-sha"
        )
    return found


@click.command(short_help="Record image, model and configuration as a new release, in channel candidate.")
@click.argument("version")
@click.option("--image", help="The built image, as host/name@sha256:… in its registry.")
@click.option("--git-sha", help="Commit of the service. Default: the commit that is checked out.")
@click.option("--set", "pairs", multiple=True, metavar="NAME=VALUE", help="A setting that changes answers; repeatable.")
@click.option("--quiet", is_flag=True, help="Print the digest alone.")
@by_option
@note_option
@store_option
@artifacts_option
def release(
    version: str,
    image: str | None,
    git_sha: str | None,
    pairs: tuple[str, ...],
    quiet: bool,
    by: str,
    note: str,
    store_url: str | None,
    artifacts: Path,
) -> None:
    """Put model VERSION, the service and its settings together, prove that all of it exists, and write it down.

    The model comes from --artifacts and is copied into the store if it is not there yet.
    """
    from mlops_course.blueprint import MODEL_NAME
    from mlops_course.release import Store, make_release, model_of, publish, record_release

    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise click.BadParameter(f"{wrong[0]!r} is not NAME=VALUE", param_hint="--set")
    with told():
        store, shelf = open_store(store_url), artifacts.resolve() / MODEL_NAME
        digest = model_of(Store(shelf), version)
        publish(store, shelf / version, digest)
        settings = dict(pair.split("=", 1) for pair in pairs)
        made = make_release(git_sha or head(), version, digest, image, settings)
        record_release(store, made, by, note)
    if quiet:
        click.echo(made.digest)
        return
    click.echo(f"release {made.digest}")
    click.echo(f"  service {made.service_version} of commit {made.git_sha[:12]}, image {made.image or 'none'}")
    click.echo(f"  model   {made.model_version} {made.model_digest}")
    click.echo(f"  config  {made.config} {made.settings or '(defaults)'}")


@click.command(short_help="Check the running release and move staging or prod to it.")
@click.argument("digest")
@click.option("--to", "channel", type=click.Choice(["staging", "prod"]), required=True)
@url_option
@by_option
@note_option
@store_option
def promote(digest: str, channel: str, url: str, by: str, note: str, store_url: str | None) -> None:
    """Run smoke and synthetic checks against the service at --url, record them, and move the channel.

    DIGEST is the release's, or the first eight or more of its hex digits. Refused: an unknown digest, prod without
    staging, a model that nobody approved, a service that runs something else, and a failed check.
    """
    from mlops_course.release import find_release, read_ledger
    from mlops_course.release import promote as move

    with told():
        store = open_store(store_url)
        chosen = find_release(read_ledger(store), digest)
        evidence = move(store, chosen, channel, url, by, key_for(url), note)  # type: ignore[arg-type]
    for check in evidence.checks:
        click.echo(f"  pass  {check.name:20} {check.detail}")
    click.echo(f"{channel} points to {chosen.digest} (model {chosen.model_version})")


@click.command(short_help="Put the release before this one back.")
@click.option("--channel", type=click.Choice(["staging", "prod"]), default="prod", show_default=True)
@by_option
@note_option
@store_option
def rollback(channel: str, by: str, note: str, store_url: str | None) -> None:
    """Move a channel back to the release before, after proving that its image, model and settings still exist.

    Nothing is built. Running it again goes one release further back.
    """
    from mlops_course.release import roll_back

    with told():
        back = roll_back(open_store(store_url), by, channel, note)  # type: ignore[arg-type]
    click.echo(
        f"{channel} points to {back.digest} (model {back.model_version}); start it there: "
        f"`.venv/bin/python -m ops up --channel {channel}`"
    )


@click.command(short_help="Print the variables that run what a channel points to.")
@click.argument("channel", type=click.Choice(["candidate", "staging", "prod"]))
@store_option
def env(channel: str, store_url: str | None) -> None:
    """Print image, commit, model digest and settings of the channel's release, one NAME=VALUE a line.

    A setting without a value has its default. `up --channel` takes all this from the ledger by itself.
    What differs from place to place (APP_ENV, API_KEY, addresses) is not in a release and not printed.
    """
    from mlops_course.release import variables

    for name, value in variables(pointed_to(channel, store_url)).items():
        click.echo(f"{name}={value}")


@click.command(short_help="Print the ledger of releases.")
@store_option
def history(store_url: str | None) -> None:
    """Check the ledger from its first line to its last, and print it, oldest event first."""
    from mlops_course.release import read_ledger

    with told():
        ledger = read_ledger(open_store(store_url))
    for event in ledger.events:
        says = f"{event.release.digest[7:19]} model {event.release.model_version}"
        click.echo(f"{event.at[:19]}Z  {event.action:8} {event.channel:9} {says}  by {event.by}  {event.note}".rstrip())
        if event.evidence:
            click.echo(f"{'':22}{describe(event.evidence)}")
    for channel in ("candidate", "staging", "prod"):
        now = ledger.current(channel)
        click.echo(f"{channel:9} -> {now.digest + ' model ' + now.model_version if now else 'nothing'}")
    if ledger.events:
        click.echo(f"{len(ledger.events)} events, hash of the last line {ledger.head}")


def describe(evidence: Evidence) -> str:
    """Return one line about what was checked."""
    if evidence.failed:
        return f"failed at {evidence.url}: " + "; ".join(f"{one.name}: {one.detail}" for one in evidence.failed)
    took = evidence.latency_ms
    times = f"{took['answers']:.0f} answers, median {took['p50']} ms"
    return f"{len(evidence.checks)} checks passed at {evidence.url}, {times}"


@click.command(short_help="Bring a model from any address and verify it.")
@click.argument("url")
@click.option("--digest", required=True, help="The digest that the model must have, sha256:…")
@click.option("--to", "target", type=click.Path(path_type=Path), required=True, help="The folder to make.")
def fetch(url: str, digest: str, target: Path) -> None:
    """Copy the artifact at URL (a folder, s3://…, or anything else that fsspec reads) and compare every hash.

    The folder appears when everything is verified, and not before. A folder that is there already is verified again.
    """
    from mlops_course.release import fetch as bring

    with told():
        manifest = bring(url, digest, target.resolve())
    click.echo(f"{target} holds {manifest.name} {manifest.version}, verified: {digest}")
