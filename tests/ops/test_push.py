"""Images of a commit get into a real registry once, and only if they may be published."""

from __future__ import annotations

import os
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import ops.push
from ops.__main__ import cli
from ops.docker import DockerError
from ops.image import Plan, build, build_checks, checks_of
from ops.push import push_once, remote

from .conftest import docker

SHA = f"{os.getpid():040x}"
IMAGE = f"flight-disruption:sha-{SHA}"


@pytest.fixture(scope="module")
def built(image_plan: Plan) -> Generator[str]:
    """Build the images of a commit that nobody else has."""
    build(replace(image_plan, revision=SHA), IMAGE)
    build_checks(IMAGE)
    # By their ids: that removes every name that the tests give them.
    ids = [docker("image", "inspect", "--format", "{{.Id}}", name) for name in (IMAGE, checks_of(IMAGE))]
    yield IMAGE
    docker("image", "rm", "--force", *ids[::-1])


@pytest.fixture(autouse=True)
def _commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.push, "revision", lambda: SHA)


def push(*arguments: str) -> Result:
    """Run the command."""
    return CliRunner().invoke(cli, ["push", *arguments])


def test_both_images_are_pushed_once_from_a_saved_file(built: str, image_registry: str, tmp_path: Path) -> None:
    archive, told = tmp_path / "images.tar", tmp_path / "told"
    ids = [docker("image", "inspect", "--format", "{{.Id}}", name) for name in (built, checks_of(built))]
    docker("save", "--output", str(archive), built, checks_of(built))
    docker("image", "rm", "--force", built, checks_of(built))
    place = f"{image_registry}/Some-Owner"
    first = push("--registry", place, "--archive", str(archive), "--output", str(told))
    assert first.exit_code == 0, first.output
    service, checks = first.output.splitlines()
    assert service.startswith(f"{place.lower()}/flight-disruption@sha256:")
    assert checks.startswith(f"{place.lower()}/flight-disruption-checks@sha256:")
    # The same bytes that were saved come back out of the registry.
    for name, expected in zip((service, checks), ids, strict=True):
        docker("image", "rm", "--force", name.partition("@")[0] + f":sha-{SHA}")
        docker("pull", "--quiet", name)
        assert docker("image", "inspect", "--format", "{{.Id}}", name) == expected
    name, _, digest = service.partition("@")
    assert told.read_text() == f"image={service}\nname={name}\ndigest={digest}\n"
    again = push("--registry", place)
    assert (again.exit_code, again.output) == (0, first.output)


def test_a_tag_of_a_commit_never_moves(built: str, image_registry: str) -> None:
    target = f"{image_registry}/flight-disruption:sha-{SHA}"
    digest = push_once(built, target).partition("@")[2]
    with pytest.raises(DockerError, match=f"{target} is another image \\({digest}\\), and a tag of a commit never"):
        push_once(checks_of(built), target)
    found = remote(target)
    assert found is not None
    assert found[0] == digest


def test_a_registry_that_does_not_answer_is_told(built: str, unused_port) -> None:
    result = push("--registry", f"127.0.0.1:{unused_port()}")
    assert result.exit_code == 1
    assert "connection refused" in result.output


def test_what_must_not_be_published_is_not_pushed(built: str, image_registry: str, monkeypatch) -> None:
    monkeypatch.setattr(ops.push, "revision", lambda: SHA + "-dirty")
    assert "there are uncommitted changes" in push("--registry", image_registry).output
    monkeypatch.setattr(ops.push, "revision", lambda: "f" * 40)
    assert "build it with `make image`" in push("--registry", image_registry).output
    monkeypatch.setattr(ops.push, "revision", lambda: SHA)
    # A key of this machine that is found in the image: here a word that is there.
    monkeypatch.setenv("API_KEY", "never-in-an-image-k7Qz9")
    assert push("--registry", f"{image_registry}/clean").exit_code == 0
    monkeypatch.setenv("API_KEY", "def create_app")
    refused = push("--registry", f"{image_registry}/secret")
    assert refused.exit_code == 1
    assert "must not be published" in refused.output
    assert remote(f"{image_registry}/secret/{IMAGE}") is None
