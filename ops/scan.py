"""Look for secrets in an image: in every layer of ours, also under files deleted later, and in its history."""

from __future__ import annotations

import json
import os
import re
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import click

from ops import KEY_FILE
from ops.docker import DockerError, docker
from ops.image import REPOSITORY, exists, own_start, revision

# Files that hold secrets, by their names.
NAMES = re.compile(
    r"(?:^|/)(?:\.env(?:\..+)?|\.secrets|\.netrc|\.npmrc|\.pypirc|\.git|\.aws|\.ssh|pip\.conf|id_(?:rsa|dsa|ecdsa|ed25519)"
    r"|[^/]+\.(?:key|pem|p12|pfx|jks))(?:/|$)"
)
# Certificates of public authorities, as every browser has them: no secret, whatever the name. Looked into all the same.
PUBLIC = re.compile(r"(?:^|/)certifi/cacert\.pem$")
# What secrets look like, wherever they stand.
FORMS = {
    "a private key": rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----\s+[A-Za-z0-9+/=]{16}",
    "a key of Amazon": rb"\bAKIA[0-9A-Z]{16}\b",
    "a token of GitHub": rb"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{60})",
    "a token of Slack": rb"\bxox[abprs]-[0-9A-Za-z-]{20}",
}
# In instructions and variables of the image a name is enough to be suspicious, if a value follows.
SUSPICIOUS = re.compile(r"(?i)\b\w*(?:password|passwd|secret|token|api_?key|credential)\w*\s*[=:]\s*[^\s$]{6,}")


def known_secrets() -> list[bytes]:
    """Return the secrets of this machine that an image must not hold: the API key's value, wherever it is kept."""
    values = [os.environ.get("API_KEY", "")]
    if KEY_FILE.is_file():
        values.append(KEY_FILE.read_text(encoding="ascii").strip())
    return [value.encode() for value in values if value]


def suspects(content: bytes, secrets: list[bytes]) -> list[str]:
    """Return which kinds of secrets these bytes hold. The secret itself is never repeated."""
    found = [name for name, form in FORMS.items() if re.search(form, content)]
    return found + (["this machine's API key"] if any(secret in content for secret in secrets) else [])


def scan_layer(layer: IO[bytes], secrets: list[bytes]) -> Iterator[str]:
    """Yield one line for each suspicious file of a layer, an uncompressed tar archive."""
    with tarfile.open(fileobj=layer, mode="r:*") as archive:
        for member in archive:
            if NAMES.search(member.name) and not PUBLIC.search(member.name):
                yield f"{member.name}: a file of this name often holds a secret"
            if member.isfile() and (file := archive.extractfile(member)):
                yield from (f"{member.name}: holds {what}" for what in suspects(file.read(), secrets))


@contextmanager
def own_layers(image: str) -> Iterator[list[IO[bytes]]]:
    """Save an image and open the layers that our Dockerfile copies into it, first to last, as tar archives."""
    made_by = docker("image", "history", "--no-trunc", "--format", "{{.CreatedBy}}", image).splitlines()[::-1]
    count = sum(line.startswith("COPY ") for line in made_by[made_by.index(own_start(made_by)) :])
    with tempfile.TemporaryDirectory(prefix="scan-") as temporary:
        saved = Path(temporary, "image.tar")
        docker("image", "save", "--output", str(saved), image)
        with tarfile.open(saved) as archive:
            names = json.load(opened(archive, "manifest.json"))[0]["Layers"][-count:]
            yield [opened(archive, name) for name in names]


def opened(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    """Return a file of an archive. Raises `DockerError` if it is not there."""
    try:
        file = archive.extractfile(name)
    except KeyError:
        file = None
    if file is None:
        raise DockerError(f"docker saved no {name}")
    return file


def findings(image: str) -> list[str]:
    """Return what looks like a secret in the image's history, variables, labels and in every layer of ours."""
    secrets = known_secrets()
    config = docker("image", "inspect", "--format", "{{json .Config}}", image)
    history = docker("image", "history", "--no-trunc", "--format", "{{.CreatedBy}}", image)
    found = [
        f"the image's {place}: holds {what}"
        for place, text in (("configuration", config), ("history", history))
        for what in [
            *suspects(text.encode(), secrets),
            *(["a value named like a secret"] if SUSPICIOUS.search(text) else []),
        ]
    ]
    with own_layers(image) as layers:
        for layer in layers:
            found += scan_layer(layer, secrets)
    return found


@click.command(short_help="Look for secrets in an image.")
@click.argument("image", required=False)
def scan(image: str | None) -> None:
    """Search the history, the variables and every layer of IMAGE that is ours; exit code 1 if anything is found.

    Default: the image of the commit that is checked out.
    """
    image = image or f"{REPOSITORY}:sha-{revision()}"
    if not exists(image):
        raise DockerError(f"there is no image {image}; build it with `make image`, or name another")
    click.echo(f"scanning {image} ...", err=True)
    if found := findings(image):
        raise DockerError("\n".join([f"{image} must not be published:", *found]))
    click.echo(f"{image}: no secret found")
