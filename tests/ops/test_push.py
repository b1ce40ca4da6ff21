"""Images of a commit get into a real registry once, and only if they may be published."""

from __future__ import annotations

import os
import subprocess
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
    service, checks = first.stdout.splitlines()
    assert first.stderr.splitlines()[:2] == [f"scanning {built} for secrets ...", f"pushing {built} to {place} ..."]
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
    assert (again.exit_code, again.stdout) == (0, first.stdout)


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


@pytest.mark.parametrize("place", ["http://127.0.0.1:5055", "https://ghcr.io/owner", "", " "])
def test_a_registry_is_named_without_a_scheme(place: str) -> None:
    result = push("--registry", place)
    assert result.exit_code == 2
    assert "is not host/name, such as ghcr.io/OWNER" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (["push"], "name the registry, without http://: make push REGISTRY=ghcr.io/NAME"),
        (["push", "REGISTRY=http://127.0.0.1:5055"], "REGISTRY is host/name, without http://"),
        (["promote", "TO=staging"], "name the release: make promote DIGEST="),
        (["promote", "DIGEST=sha256:12345678"], "name the channel: make promote DIGEST=… TO=staging"),
        (["image", "ARCHIVE=/nowhere/images.tar"], "there is no folder /nowhere"),
    ],
)
def test_make_names_the_variable_that_is_missing_or_wrong(root: Path, line: list[str], problem: str) -> None:
    bare = {name: value for name, value in os.environ.items() if name not in ("REGISTRY", "DIGEST", "TO", "ARCHIVE")}
    done = subprocess.run(
        ["make", *line, "--old-file=setup"], cwd=root, env=bare, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert problem in done.stderr


def test_rollback_and_promote_have_the_defaults_of_their_commands(root: Path) -> None:
    bare = {name: value for name, value in os.environ.items() if name not in ("TO", "URL", "BY", "STORE", "NOTE")}

    def called(*line: str) -> str:
        command = ["make", "--dry-run", *line]
        return subprocess.run(command, cwd=root, env=bare, capture_output=True, text=True, check=True).stdout

    assert "--channel" not in called("rollback")
    assert "--channel" in called("rollback", "TO=staging")
    assert "--url" not in called("promote", "DIGEST=x", "TO=prod")
    assert "--url" in called("promote", "DIGEST=x", "TO=prod", "URL=http://x")


def test_an_image_that_is_not_there_is_told_with_the_fix(engine: None) -> None:
    result = CliRunner().invoke(cli, ["scan", "flight-disruption:absent"])
    assert result.exit_code == 1
    assert "there is no image flight-disruption:absent; build it with `make image`" in result.output


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
