"""Push the images of a commit to a registry, once, and say by which digest they are known there."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import click

from ops.docker import DockerError, docker
from ops.image import REPOSITORY, checks_of, exists, revision
from ops.scan import findings


def remote(reference: str) -> tuple[str, str] | None:
    """Return (digest, image id) that a registry has under a tag, or None if it has no such tag."""
    command = ["docker", "buildx", "imagetools", "inspect", reference]
    done = subprocess.run([*command, "--raw"], capture_output=True, text=True, check=False)
    if done.returncode:
        if "not found" in done.stderr:
            return None
        raise DockerError(f"{reference}: {done.stderr.strip()[-300:]}")
    digest = json.loads(docker(*command[1:], "--format", "{{json .Manifest}}"))["digest"]
    return digest, json.loads(done.stdout).get("config", {}).get("digest", "")


def push_once(image: str, target: str) -> str:
    """Push an image under a tag that never moves, and return its digest.

    Nothing is sent if the registry has this very image there already. Raises `DockerError` if it has another one.
    """
    name, _, _ = target.rpartition(":")
    own = docker("image", "inspect", "--format", "{{.Id}}", image).strip()
    there = remote(target)
    if there is None:
        docker("tag", image, target)
        docker("push", "--quiet", target)
        there = remote(target)
    if there is None:
        raise DockerError(f"{target} was pushed, but the registry does not have it")
    digest, known = there
    if own not in (known, digest):
        raise DockerError(f"{target} is another image ({digest}), and a tag of a commit never moves")
    return f"{name}@{digest}"


@click.command(short_help="Push the images of this commit to a registry and print their digests.")
@click.option("--registry", required=True, help="Where to push to, such as ghcr.io/OWNER; log in with `docker login`.")
@click.option(
    "--archive", type=click.Path(path_type=Path, exists=True), help="Load the images from this file of `image` first."
)
@click.option(
    "--output", type=click.Path(path_type=Path), help="Append image=…, name=… and digest=… of the service's image."
)
def push(registry: str, archive: Path | None, output: Path | None) -> None:
    """Push flight-disruption:sha-COMMIT and the checks' image to REGISTRY under the same tag.

    Refused: an image of uncommitted changes, an image that `scan` finds a secret in, and a tag that already names
    another image. Take the first printed name for `release --image`.
    """
    if "://" in registry or not registry.strip():
        raise click.BadParameter(
            f"'{registry}' is not host/name, such as ghcr.io/OWNER or 127.0.0.1:5055; write it without http://",
            param_hint="--registry",
        )
    if archive:
        docker("load", "--quiet", "--input", str(archive))
    image = f"{REPOSITORY}:sha-{revision()}"
    if image.endswith("-dirty"):
        raise DockerError("there are uncommitted changes, so no image here is that of a commit; commit them first")
    pushed = []
    for one in (image, checks_of(image)):
        if not exists(one):
            raise DockerError(f"there is no image {one}; build it with `make image`")
        click.echo(f"scanning {one} for secrets ...", err=True)
        if found := findings(one):
            raise DockerError("\n".join([f"{one} must not be published:", *found]))
        click.echo(f"pushing {one} to {registry} ...", err=True)
        # Registries know small letters only; the name of an account may have others.
        pushed.append(push_once(one, f"{registry.rstrip('/').lower()}/{one}"))
        click.echo(pushed[-1])
    if output:
        name, _, digest = pushed[0].partition("@")
        with output.open("a", encoding="utf-8") as file:
            file.write(f"image={pushed[0]}\nname={name}\ndigest={digest}\n")
