"""Build the image of the service from this commit and one verified model, and say what is in it and how large it is."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import click

from ops import ROOT, artifacts_option
from ops.docker import DockerError, docker

REPOSITORY = "flight-disruption"
MIB = 1024 * 1024
# Labels of the image, by what they hold.
LABELS = {
    "revision": "org.opencontainers.image.revision",
    "created": "org.opencontainers.image.created",
    "version": "org.opencontainers.image.version",
    "model": "flight-disruption.model.version",
    "digest": "flight-disruption.model.digest",
}


@dataclass(frozen=True)
class Plan:
    """One image to build: which commit, which model."""

    revision: str  # commit, with -dirty if files differ from it
    service: str  # version of the service
    model: str  # version of the model
    folder: Path  # of the model's artifact
    digest: str  # of the model, from the registry
    named: bool  # whether somebody chose the model, so that the tag must name it

    @property
    def tag(self) -> str:
        """The image's name and tag: sha-<commit>, and the model if it is not the one in channel prod."""
        return f"{REPOSITORY}:sha-{self.revision}" + (f"-model-{self.model}" if self.named else "")


def git(*arguments: str) -> str:
    """Return what git prints. Raises `ClickException` outside a repository."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S607
    if done.returncode:
        raise click.ClickException(f"an image is named after a commit, and git says: {done.stderr.strip()}")
    return done.stdout.strip()


def revision() -> str:
    """Return the commit that is checked out, with -dirty if any file differs from it."""
    return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")


def plan(artifacts: Path, version: str | None) -> Plan:
    """Choose the model: a registered version, or what channel prod points to. Its digest comes from the registry."""
    import mlops_course
    from mlops_course.blueprint import MODEL_NAME, ArtifactError, read_registry, resolve_channel

    shelf = artifacts.resolve() / MODEL_NAME
    if version is None:
        try:
            folder, digest = resolve_channel(shelf, "prod")
        except ArtifactError as error:
            raise click.ClickException(str(error)) from error
    else:
        known = read_registry(shelf).versions
        if version not in known:
            raise click.ClickException(f"model {version} is not registered in {shelf}; known: {', '.join(known)}")
        folder, digest = shelf / version, known[version]
    if not folder.is_relative_to(ROOT):
        raise click.ClickException(f"{folder} is outside the project, so Docker cannot read it; copy it to artifacts/")
    return Plan(revision(), mlops_course.__version__, folder.name, folder, digest, version is not None)


def labels(image: str) -> dict[str, str]:
    """Return what an image says about itself, by the names in `LABELS`. Raises `DockerError` if it is not there."""
    found = json.loads(docker("image", "inspect", "--format", "{{json .Config.Labels}}", image)) or {}
    return {name: found.get(label, "") for name, label in LABELS.items()}


def exists(image: str) -> bool:
    """Whether the engine has this image."""
    return bool(docker("image", "ls", "--quiet", image).strip())


def build(chosen: Plan, tag: str, *options: str, environment: Mapping[str, str] | None = None) -> None:
    """Build the image, showing Docker's progress. `options` go to docker build."""
    arguments = {
        "MODEL": chosen.folder.relative_to(ROOT).as_posix(),
        "MODEL_VERSION": chosen.model,
        "MODEL_DIGEST": chosen.digest,
        "GIT_SHA": chosen.revision,
        "SERVICE_VERSION": chosen.service,
        "CREATED": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    given = [text for name, value in arguments.items() for text in ("--build-arg", f"{name}={value}")]
    docker("build", *given, "--tag", tag, *options, ".", environment=environment, show=True)


def checks_of(image: str) -> str:
    """Return the name of the checks' image that belongs to an image of the service: same place, same commit."""
    name, _, digest = image.partition("@")
    if digest:
        return f"{name}-checks:sha-{labels(image)['revision']}"
    name, tag = (image, "latest") if ":" not in image.rpartition("/")[2] else image.rsplit(":", 1)
    return f"{name}-checks:{tag}"


def build_checks(service: str) -> str:
    """Build the image of the checks on top of an image of the service, and return its name."""
    tag = checks_of(service)
    given = ["--file", "ops/checks/Dockerfile", "--build-arg", f"SERVICE_IMAGE={service}", "--tag", tag]
    docker("build", *given, ".", show=True)
    return tag


def layers(image: str) -> list[tuple[str, int]]:
    """Return the layers that hold anything, first to last: the instruction that made it, and its bytes."""
    lines = docker("image", "history", "--no-trunc", "--human=false", "--format", "{{json .}}", image).splitlines()
    found = [(entry["CreatedBy"], int(entry["Size"])) for entry in map(json.loads, reversed(lines))]
    return [(made_by, size) for made_by, size in found if size]


def own_start(made_by: list[str]) -> str:
    """Return the first instruction of ours in an image's history; what comes before belongs to the base image."""
    return next(line for line in made_by if line.startswith("COPY /opt/venv"))


def report(image: str) -> str:
    """Return a table of the image's own layers, and of the base as a whole."""
    rows = [(made_by.removesuffix("# buildkit").strip(), size) for made_by, size in layers(image)]
    names = [made_by for made_by, _ in rows]
    own = rows[names.index(own_start(names)) :]
    total = sum(size for _, size in rows)
    table = [("base image", total - sum(size for _, size in own)), *own]
    said = labels(image)
    lines = [
        f"{image}  model {said['model']} ({said['digest'][:19]}), built {said['created']}",
        *(f"  {size / MIB:7.1f} MiB  {size / total:5.1%}  {name}" for name, size in table),
        f"  {total / MIB:7.1f} MiB  in all, {sum(size for _, size in own) / MIB:.1f} MiB on top of the base image",
    ]
    return "\n".join(lines)


@click.command(short_help="Build the service's image from this commit and one verified model.")
@click.option("--model", metavar="VERSION", help="A registered version. Default: the one in channel prod.")
@click.option("--archive", type=click.Path(path_type=Path), help="Save both images to this file, for `push`.")
@artifacts_option
def image(model: str | None, archive: Path | None, artifacts: Path) -> None:
    """Build flight-disruption:sha-COMMIT and print the share of each layer; then the image of the checks on top of it.

    A tag that names a commit is built once and then kept. With uncommitted changes the tag ends in -dirty and is
    built anew each time. The build fails unless the model passes its digest, its hashes and its golden requests.
    """
    if archive and not archive.resolve().parent.is_dir():
        raise click.BadParameter(f"there is no folder {archive.parent}; make it first", param_hint="--archive")
    chosen = plan(artifacts, model)
    dirty = chosen.revision.endswith("-dirty")
    if dirty:
        click.echo("There are uncommitted changes, so the image is marked -dirty and must not be released.", err=True)
    if dirty or not exists(chosen.tag):
        build(chosen, chosen.tag)
    elif labels(chosen.tag)["digest"] != chosen.digest:
        raise DockerError(
            f"{chosen.tag} exists with another model ({labels(chosen.tag)['model']}), and a tag is never used twice; "
            f"name the model: .venv/bin/python -m ops image --model {chosen.model}"
        )
    if dirty or not exists(checks_of(chosen.tag)):
        build_checks(chosen.tag)
    click.echo(report(chosen.tag))
    more = sum(size for _, size in layers(checks_of(chosen.tag))) - sum(size for _, size in layers(chosen.tag))
    click.echo(f"{checks_of(chosen.tag)}  {more / MIB:.1f} MiB on top of it")
    if archive:
        docker("save", "--output", str(archive), chosen.tag, checks_of(chosen.tag))
        click.echo(f"both are in {archive}, {archive.stat().st_size / MIB:.0f} MiB")
