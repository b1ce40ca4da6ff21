"""Train, judge and package the releases; approve one; write the split ledger."""

from __future__ import annotations

import re
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ops import ROOT, artifacts_option

if TYPE_CHECKING:
    from mlops_course.training import GateResult, Trained

# What is kept, in git, of an approved release: enough to compare with, to recognise it, and to test behaviour.
RECORD = ("manifest.json", "metrics.json", "golden.json", "release.json")


class Refused(click.ClickException):
    """A command that was refused for a reason its message gives; the exit code is 1."""


def print_gates(version: str, results: list[GateResult]) -> None:
    """Print one line for each gate."""
    click.echo(f"\ngates for {version}")
    for result in results:
        click.echo(f"  {'pass  ' if result.passed else 'REFUSE'}  {result.gate:18} {result.detail}")


def print_quality(trained: dict[str, Trained]) -> None:
    """Print the quality of each version on the locked test month, with 95 % intervals from resampled days."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title="locked test month (95 % interval, resampling days)")
    table.add_column("metric")
    for version in trained:
        table.add_column(version, justify="right")
    metrics = next(iter(trained.values())).metrics["test"]["metrics"]
    for name in metrics:
        cells = []
        for one in trained.values():
            low, high = one.metrics["intervals"].get(name, (None, None))
            spread = f" ({low:.3f} to {high:.3f})" if low is not None else ""
            cells.append(f"{one.metrics['test']['metrics'][name]:.3f}{spread}")
        table.add_row(name, *cells)
    Console(width=100).print(table)


@click.command(short_help="Train, pass the gates and package the releases.")
@artifacts_option
@click.option("--version", "versions", multiple=True, help="Only this version; may be repeated. Default: all.")
def train(artifacts: Path, versions: tuple[str, ...]) -> None:
    """Reproduce training: load, split, search, judge, package and register every version.

    A version that exists with the same content is left as it is. Channel `prod` is pointed to the newest approved
    release if it points to nothing yet; it is never moved. A refusal by a gate exits 1 and leaves nothing behind.
    """
    from mlops_course.blueprint import MODEL_NAME, ArtifactError, DataError, VersionError, load_dataset, split_by_time
    from mlops_course.training import RECIPES, GateRefusal, run_gates, train_release

    if unknown := sorted(set(versions) - RECIPES.keys()):
        raise click.BadParameter(f"{unknown[0]} is not one of {', '.join(RECIPES)}", param_hint="--version")
    shelf = artifacts.resolve() / MODEL_NAME
    done: dict[str, Trained] = {}
    digests = {}
    try:
        click.echo("loading and checking the data")
        splits = split_by_time(load_dataset())
        for version in versions or RECIPES:
            click.echo(f"training {version}: {RECIPES[version].title}")
            done[version], _, digests[version] = train_release(version, shelf, splits)
            print_gates(version, run_gates(done[version].metrics))
    except (ArtifactError, DataError, GateRefusal, VersionError) as error:
        raise Refused(str(error)) from error
    print_quality(done)
    for version, digest in digests.items():
        click.echo(f"{version:12} {digest}")
    point_prod(shelf)


def point_prod(shelf: Path) -> None:
    """Let `prod` point to the newest approved release on the shelf, unless it already points somewhere."""
    from mlops_course.blueprint import approved_versions, point_channel, read_registry

    registry = read_registry(shelf)
    approved = [version for version in approved_versions() if version in registry.versions]
    if "prod" not in registry.channels and approved:
        point_channel(shelf, "prod", approved[-1])
    current = read_registry(shelf).channels.get("prod", "nothing: no release is approved yet")
    click.echo(f"channel prod points to {current}")


@click.command(short_help="Record a trained version as approved, in ops/releases.")
@click.argument("version")
@click.option("--by", "name", required=True, help="Who approves.")
@click.option("--note", required=True, help="Why, in one sentence.")
@artifacts_option
def approve(version: str, name: str, note: str, artifacts: Path) -> None:
    """Copy the record of a verified version to ops/releases, with the approval. Commit the result.

    An approval is given once: a version that has a record is refused.
    """
    from mlops_course.blueprint import (
        MODEL_NAME,
        ArtifactError,
        canonical_json,
        read_registry,
        releases_folder,
        verify_artifact,
    )

    shelf, target = artifacts.resolve() / MODEL_NAME, releases_folder() / version
    digest = read_registry(shelf).versions.get(version)
    if digest is None:
        raise Refused(f"version {version} is not registered in {shelf}; run `make train` first")
    if target.exists():
        raise Refused(f"version {version} is approved already ({target.relative_to(ROOT)}); raise the version")
    try:
        manifest = verify_artifact(shelf / version, digest)
    except ArtifactError as error:
        raise Refused(str(error)) from error
    if not re.fullmatch("[0-9a-f]{40}", manifest.provenance.git_sha):
        raise Refused(
            f"version {version} was trained from '{manifest.provenance.git_sha}', which is not a commit that "
            f"anybody can check out; commit your changes, `.venv/bin/python -m ops discard {version}`, and train again"
        )
    scratch = target.with_name(f".{version}.writing")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for file in RECORD:
        shutil.copyfile(shelf / version / file, scratch / file)
    approval = {
        "version": version,
        "digest": digest,
        "by": name,
        "note": note,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    (scratch / "approval.json").write_bytes(canonical_json(approval))
    scratch.rename(target)
    click.echo(f"approved {version} {digest}; commit {target.relative_to(ROOT)}")


@click.command(short_help="Delete a version that nobody uses.")
@click.argument("version")
@artifacts_option
def discard(version: str, artifacts: Path) -> None:
    """Delete a trained version, so that its number can be used again. Approved versions and those in a channel stay."""
    from mlops_course.blueprint import MODEL_NAME, VersionError, discard_version

    try:
        discard_version(artifacts.resolve() / MODEL_NAME, version)
    except VersionError as error:
        raise Refused(str(error)) from error
    click.echo(f"discarded {version}")


@click.command(short_help="Write chapters/data/split_ledger.json again.")
def ledger() -> None:
    """Write the committed split ledger from the data. Only needed after the data or the splits changed on purpose."""
    from mlops_course.blueprint import canonical_json, data_folder, load_dataset, split_by_time, split_ledger

    target = data_folder() / "split_ledger.json"
    target.write_bytes(canonical_json(split_ledger(split_by_time(load_dataset()))))
    click.echo(f"wrote {target.relative_to(ROOT)}")
