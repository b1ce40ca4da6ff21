"""The commands that move releases, on a copy of the shelf, with a real service; images in a real registry."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from click.testing import CliRunner, Result

import ops.image
from mlops_course import release as chapter
from mlops_course.blueprint import MODEL_NAME, read_registry
from mlops_course.release import (
    CHANGES_ANSWERS,
    Store,
    asking,
    expected_of,
    find_release,
    image_labels,
    make_release,
    read_ledger,
    tag_image,
    tagged_digest,
)
from mlops_course.serving import EXAMPLE
from ops import smoke
from ops.__main__ import cli
from ops.image import Plan, build, build_checks

from .conftest import docker

SHA = "a" * 40
KEY = "k7Qz9-mR2vXw8-Lp4tNb6"  # only here; not a secret


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch, tmp_path):
    """The environment and the containers of whoever runs the tests must not decide."""
    for name in ("API_KEY", "PORT", "DOOR_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(smoke, "KEY_FILE", tmp_path / "API_KEY")


@pytest.fixture
def artifacts(artifacts_root: Path, tmp_path: Path) -> Path:
    """Return a copy of the artifacts, without a ledger."""
    ignore = shutil.ignore_patterns("ledger.jsonl", ".*")
    return Path(shutil.copytree(artifacts_root, tmp_path / "artifacts", ignore=ignore))


@pytest.fixture
def run(artifacts: Path) -> Callable[..., Result]:
    """Return a function that runs a command on these artifacts, by ann."""

    def command(*arguments: str) -> Result:
        given = [*arguments, "--store", str(artifacts / MODEL_NAME)]
        given += ["--artifacts", str(artifacts)] if arguments[0] == "release" else []
        given += ["--by", "ann"] if arguments[0] in ("release", "promote", "rollback") else []
        return CliRunner().invoke(cli, given)

    return command


def fine(result: Result) -> str:
    """Return what a command printed that succeeded."""
    assert result.exit_code == 0, result.output
    return result.output


def refused(result: Result) -> str:
    """Return the error of a command that was refused."""
    assert (result.exit_code, type(result.exception)) == (1, SystemExit), result.output
    return result.output.partition("Error: ")[2]


def test_release_promote_rollback_history_and_env(run, artifacts, running_service):
    digest = read_registry(artifacts / MODEL_NAME).versions["1.0.0"]
    first = fine(run("release", "1.0.0", "--git-sha", SHA, "--quiet", "--note", "first")).strip()
    told = fine(run("release", "1.0.0", "--git-sha", SHA, "--set", "THRESHOLD=0.5"))
    second = told.splitlines()[0].removeprefix("release ")
    assert f"model   1.0.0 {digest}" in told
    assert "{'THRESHOLD': '0.5'}" in told
    own = {"MODEL_URI": str(artifacts / MODEL_NAME / "1.0.0"), "GIT_SHA": SHA}
    assert "is not in staging (nothing is)" in refused(run("promote", first, "--to", "prod", "--url", "http://x"))
    with running_service(**own) as url:
        moved = fine(run("promote", first, "--to", "staging", "--url", url))
        assert moved.count("  pass  ") == 9
        assert moved.endswith(f"staging points to {first} (model 1.0.0)\n")
        fine(run("promote", first[7:20], "--to", "prod", "--url", url, "--note", "first in prod"))
        assert "release: config is" in refused(run("promote", second, "--to", "staging", "--url", url))
    with running_service(**own, THRESHOLD="0.5") as url:
        fine(run("promote", second, "--to", "staging", "--url", url))
        fine(run("promote", second, "--to", "prod", "--url", url))
    assert "THRESHOLD=0.5\n" in fine(run("env", "prod"))
    assert fine(run("rollback", "--note", "too few warnings")) == (
        f"prod points to {first} (model 1.0.0); start it there: `.venv/bin/python -m ops up --channel prod`\n"
    )
    assert fine(run("env", "prod")).splitlines() == [
        "SERVICE_IMAGE=",
        f"GIT_SHA={SHA}",
        f"MODEL_DIGEST={digest}",
        "MODEL_VERSION=1.0.0",
        *(f"{name}=" for name in CHANGES_ANSWERS),
    ]
    assert "nothing to go back to" in refused(run("rollback"))
    story = fine(run("history")).splitlines()
    assert [line.split()[1:3] for line in story if "  by ann" in line] == [
        ["release", "candidate"],
        ["release", "candidate"],
        ["promote", "staging"],
        ["promote", "prod"],
        ["refuse", "staging"],
        ["promote", "staging"],
        ["promote", "prod"],
        ["rollback", "prod"],
    ]
    assert sum("9 checks passed at http://127.0.0.1:" in line for line in story) == 4
    assert sum("failed at http://127.0.0.1:" in line and "config is" in line for line in story) == 1
    assert story[-2] == f"prod      -> {first} model 1.0.0"
    assert story[-1] == f"8 events, hash of the last line {read_ledger(Store(artifacts / MODEL_NAME)).head}"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["release", "3.0.0", "--git-sha", SHA], "model 3.0.0 is not registered in"),
        (["release", "1.0.0", "--git-sha", "main"], "this is not a release: git_sha"),
        (["release", "1.0.0", "--git-sha", SHA, "--set", "PORT=1"], "setting PORT changes no answer"),
        (["release", "1.0.0", "--git-sha", SHA, "--image", "a:v1"], "'a:v1' is not host/name@sha256:…; push the image"),
        (["release", "1.0.0", "--git-sha", SHA, "--set", "FOO=1"], "unknown setting FOO; those of a release: "),
        (["release", "1.0.0", "--git-sha", SHA, "--set", "MAX_BATCH=1000"], "MAX_BATCH has its default value"),
        (
            ["promote", "sha256:12345678", "--to", "staging", "--url", "http://x"],
            "names no single release; known: none",
        ),
        (["rollback"], "prod has no release before this one"),
        (["env", "prod"], "prod points to nothing yet"),
        (["up", "--channel", "prod"], "prod points to nothing yet"),
        (["smoke", "--channel", "prod", "--url", "http://127.0.0.1:1"], "prod points to nothing yet"),
    ],
)
def test_what_is_refused_is_told_in_one_line_and_writes_nothing(run, artifacts, arguments, problem):
    before = (artifacts / MODEL_NAME / "registry.json").read_bytes()
    assert problem in refused(run(*arguments))
    assert (artifacts / MODEL_NAME / "registry.json").read_bytes() == before
    assert not (artifacts / MODEL_NAME / "ledger.jsonl").exists()


def test_the_smoke_test_proves_a_channel(run, artifacts, running_service, monkeypatch):
    first, second = (
        fine(run("release", "1.0.0", "--git-sha", SHA, "--quiet", *more)).strip()
        for more in ([], ["--set", "THRESHOLD=0.5"])
    )
    own = {"MODEL_URI": str(artifacts / MODEL_NAME / "1.0.0"), "GIT_SHA": SHA}
    with running_service(**own) as url:
        fine(run("promote", first, "--to", "staging", "--url", url))
        told = fine(run("smoke", "--url", url, "--channel", "staging"))
        assert told.splitlines()[-1].startswith(f"staging: {first} runs there, with commit {SHA[:12]} and ")
        # Candidate is the second release, and it is not what runs there.
        assert "release: config is" in refused(run("smoke", "--url", url, "--channel", "candidate"))
    with running_service(**own | {"GIT_SHA": "b" * 40}) as url:
        assert "release: service_git_sha is bbb" in refused(run("smoke", "--url", url, "--channel", "staging"))
    with running_service(**own, THRESHOLD="0.5") as url:
        assert f"candidate: {second} runs there" in fine(run("smoke", "--url", url, "--channel", "candidate"))


def test_a_tag_that_is_behind_is_a_warning_and_the_channel_moves(run, artifacts, unused_port):
    store, digest = Store(artifacts / MODEL_NAME), read_registry(artifacts / MODEL_NAME).versions["1.0.0"]
    plain = make_release(SHA, "1.0.0", digest)
    away = make_release(SHA, "1.0.0", digest, f"127.0.0.1:{unused_port()}/a@sha256:{'0' * 64}")
    for channel, made in (("staging", away), ("prod", plain), ("prod", away)):
        chapter.append(
            store, read_ledger(store), action="promote", by="ann", channel=channel, to=made.digest, release=made
        )
    told = fine(run("rollback"))
    assert f"Warning: the ledger says that staging is {away.digest[:19]}, and that counts" in told
    assert told.splitlines()[-1].startswith(f"prod points to {plain.digest}")


def test_what_is_no_evidence_is_not_recorded(run, artifacts, unused_port):
    made = fine(run("release", "1.0.0", "--git-sha", SHA, "--quiet")).strip()
    before = (artifacts / MODEL_NAME / "ledger.jsonl").read_bytes()
    for url in (f"http://127.0.0.1:{unused_port()}", "", "staging"):
        assert refused(run("promote", made, "--to", "staging", "--url", url))
    assert (artifacts / MODEL_NAME / "ledger.jsonl").read_bytes() == before


@pytest.fixture
def new_connections():
    """Connections that other tests have opened are kept by fsspec for later, whatever the variables say now."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.mark.parametrize("command", [["history"], ["env", "prod"], ["rollback"]])
def test_a_store_that_does_not_answer_is_one_line(command, new_connections, unused_port, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused_port()}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    told = refused(CliRunner().invoke(cli, [*command, "--store", f"s3://bucket/dead-{command[0]}"]))
    assert "the store cannot be used" in told
    assert "AWS_ENDPOINT_URL" in told


def test_a_store_without_credentials_is_one_line(new_connections, unused_port, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    # Else the files of whoever runs this, or the machine's own address for credentials, are asked.
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused_port()}")
    digest = ["--digest", "sha256:" + "0" * 64, "--to", str(tmp_path / "model")]
    told = refused(CliRunner().invoke(cli, ["fetch", "s3://bucket/no-credentials/1.0.0", *digest]))
    assert "the store cannot be used" in told
    assert "AWS_ACCESS_KEY_ID" in told


def test_a_setting_without_a_value_is_a_usage_error(run):
    result = run("release", "1.0.0", "--git-sha", SHA, "--set", "THRESHOLD")
    assert result.exit_code == 2
    assert "'THRESHOLD' is not NAME=VALUE" in result.output


def test_a_damaged_ledger_is_told(run, artifacts):
    fine(run("release", "1.0.0", "--git-sha", SHA))
    ledger = artifacts / MODEL_NAME / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes()[:-5])
    for command in (["history"], ["rollback"], ["env", "candidate"], ["release", "1.0.0", "--git-sha", SHA]):
        assert "line 1 is cut off" in refused(run(*command))


def test_the_loser_of_a_race_is_told_what_to_do(run, monkeypatch):
    def loses(*_: Any) -> None:
        raise chapter.Conflict("ledger.jsonl in here was changed by somebody else")

    monkeypatch.setattr(chapter, "record_release", loses)
    assert "look at `.venv/bin/python -m ops history`, then run this again" in refused(
        run("release", "1.0.0", "--git-sha", SHA)
    )


@pytest.mark.parametrize(("found", "problem"), [(f"{SHA}-dirty", "there are uncommitted changes"), (SHA, "")])
def test_a_release_is_of_a_commit(run, monkeypatch, found, problem):
    monkeypatch.setattr(ops.image, "revision", lambda: found)
    result = run("release", "1.0.0")
    assert problem in refused(result) if problem else f"of commit {SHA[:12]}" in fine(result)


def test_fetch_brings_a_verified_model_or_nothing(artifacts, tmp_path):
    folder, target = artifacts / MODEL_NAME / "1.0.0", tmp_path / "here"
    digest = read_registry(artifacts / MODEL_NAME).versions["1.0.0"]
    command = ["fetch", str(folder), "--to", str(target), "--digest"]
    assert "has digest" in refused(CliRunner().invoke(cli, [*command, "sha256:" + "0" * 64]))
    assert not target.exists()
    told = fine(CliRunner().invoke(cli, [*command, digest]))
    assert told == f"{target} holds flight-disruption 1.0.0, verified: {digest}\n"
    (target / "model.onnx").write_bytes(b"other")
    assert "model.onnx was changed" in refused(CliRunner().invoke(cli, [*command, digest]))


# --- Images, in a real registry ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(image_registry: str, image_plan: Plan) -> Generator[tuple[str, str]]:
    """Build one commit twice, push both, and return them by digest."""
    clean, found = replace(image_plan, revision=SHA), []
    for tag in ("one", "two"):
        name = f"{image_registry}/flight-disruption:{tag}"
        build(clean, name)
        docker("push", "--quiet", name)
        found.append(docker("image", "inspect", "--format", "{{index .RepoDigests 0}}", name))
        time.sleep(1)  # the time of the build is a label
    yield found[0], found[1]
    docker("image", "rm", "--force", *found, *(f"{image_registry}/flight-disruption:{tag}" for tag in ("one", "two")))


def test_a_tag_moves_between_digests_and_a_fixed_one_does_not(images):
    one, two = images
    assert one != two  # the same commit, built twice
    for image in (one, two, one):
        tag_image(image, "staging")
        assert tagged_digest(image, "staging") == image.partition("@")[2]
    assert not tag_image(one, "staging")
    for tag in (f"sha-{SHA}", "v1.2.3", "v1.2.3-rc.1"):
        assert tag_image(one, tag)
        with pytest.raises(chapter.ReleaseError, match=f"tag {tag} belongs to sha256:.* and never moves"):
            tag_image(two, tag)
        assert tagged_digest(two, tag) == one.partition("@")[2]
    assert tagged_digest(one, "nobody-set-this") is None


def test_the_registry_gives_the_image_that_was_pushed(images):
    one, _ = images
    config = docker("image", "inspect", "--format", "{{.Id}}", one)
    docker("image", "rm", "--force", one)
    docker("pull", "--quiet", one)
    assert docker("image", "inspect", "--format", "{{.Id}}", one) == config
    assert image_labels(one)["org.opencontainers.image.revision"] == SHA


@pytest.fixture
def in_container(image_plan: Plan) -> Callable[..., Any]:
    """Return a context manager that runs an image hardened, as in production, and gives address and container."""
    from contextlib import contextmanager

    @contextmanager
    def start(variables: dict[str, str]) -> Generator[tuple[str, str]]:
        own = {**variables, "API_KEY": KEY, "APP_ENV": "staging", "DRAIN_S": "0"}
        options = [f"--env={name}={value}" for name, value in own.items() if name != "SERVICE_IMAGE"]
        hard = ["--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--publish=127.0.0.1::8000"]
        name = docker("run", "--detach", "--rm", *hard, *options, own["SERVICE_IMAGE"])
        try:
            url, end = f"http://{docker('port', name, '8000/tcp').splitlines()[0]}", time.monotonic() + 30
            with asking(url) as ask:
                while ask("GET", "/ready").status != 200:
                    assert time.monotonic() < end, docker("logs", name)
                    time.sleep(0.2)
            yield url, name
        finally:
            docker("rm", "--force", name)

    return start


def variables_of(printed: str) -> dict[str, str]:
    """Return the variables that `env` printed."""
    return dict(line.split("=", 1) for line in printed.splitlines())


def test_the_digest_that_runs_in_prod_is_the_digest_that_was_tested(
    images, image_plan, in_container, run, artifacts, monkeypatch
):
    """Released, promoted and rolled back by the commands, with two images of one commit."""
    monkeypatch.setenv("API_KEY", KEY)
    digests, tested = [], []
    for image in images:
        made = run("release", image_plan.model, "--git-sha", SHA, "--image", image, "--quiet")
        digests.append(fine(made).strip())
        with in_container(variables_of(fine(run("env", "candidate")))) as (url, name):
            tested.append(docker("inspect", "--format", "{{.Image}}", name))
            fine(run("promote", digests[-1], "--to", "staging", "--url", url))
            fine(run("promote", digests[-1], "--to", "prod", "--url", url))
        assert tagged_digest(image, "prod") == image.partition("@")[2]
    assert tested[0] != tested[1]
    with in_container(variables_of(fine(run("env", "prod")))) as (_, name):
        assert docker("inspect", "--format", "{{.Image}}", name) == tested[1]
    # Back to the first, with no docker and no git to be found: a rollback builds nothing.
    with monkeypatch.context() as bare:
        bare.setenv("PATH", "")
        assert digests[0] in fine(run("rollback"))
    assert tagged_digest(images[0], "prod") == images[0].partition("@")[2]
    assert tagged_digest(images[0], "staging") == images[1].partition("@")[2]
    with in_container(variables_of(fine(run("env", "prod")))) as (url, name):
        assert docker("inspect", "--format", "{{.Image}}", name) == tested[0]
        assert CliRunner().invoke(cli, ["smoke", "--url", url]).exit_code == 0


def test_an_image_that_does_not_carry_the_releases_model_or_commit_is_refused(images, run, image_plan):
    other = run("release", image_plan.model, "--git-sha", "b" * 40, "--image", images[0])
    assert f"has label org.opencontainers.image.revision={SHA}, the release says {'b' * 40}" in refused(other)
    boosted = run("release", "1.1.0-rc.1", "--git-sha", SHA, "--image", images[0])
    assert "has label flight-disruption.model.digest=" in refused(boosted)


def test_an_image_that_is_gone_stops_a_rollback_before_anything_moves(images, run, artifacts):
    store, digest = Store(artifacts / MODEL_NAME), read_registry(artifacts / MODEL_NAME).versions["1.0.0"]
    gone = images[0].partition("@")[0] + "@sha256:" + "0" * 64
    for image in (gone, images[1]):
        made = make_release(SHA, "1.0.0", digest, image)
        chapter.append(
            store, read_ledger(store), action="promote", by="ann", channel="prod", to=made.digest, release=made
        )
    chapter.follow(store, read_ledger(store))
    before = (artifacts / MODEL_NAME / "ledger.jsonl").read_bytes()
    assert "is not in its registry; push it again, or choose another release" in refused(run("rollback"))
    assert (artifacts / MODEL_NAME / "ledger.jsonl").read_bytes() == before
    assert tagged_digest(images[1], "prod") == images[1].partition("@")[2]


def test_the_image_of_the_checks_is_not_released_as_the_service(images, run, image_plan, image_registry):
    service = f"{image_registry}/flight-disruption:one"
    checks = build_checks(service)
    try:
        docker("push", "--quiet", checks)
        pushed = docker("image", "inspect", "--format", "{{index .RepoDigests 0}}", checks)
        other = run("release", image_plan.model, "--git-sha", SHA, "--image", pushed)
        assert "has label org.opencontainers.image.title=flight-disruption-checks" in refused(other)
    finally:
        docker("image", "rm", "--force", checks)


def test_up_runs_exactly_the_release_in_the_ledger(
    images, image_plan, run, artifacts, tmp_path, unused_port, monkeypatch
):
    """As an operator does it, `python -m ops up --channel candidate`, in a shell that has settings of its own."""
    image, project = images[0], f"flights-release-{os.getpid()}"
    pairs = ["--set", "THRESHOLD=0.5", "--set", "MAX_BATCH=50"]
    digest = fine(run("release", image_plan.model, "--git-sha", SHA, "--image", image, "--quiet", *pairs)).strip()
    tested = docker("image", "inspect", "--format", "{{.Id}}", image)
    docker("image", "rm", "--force", image)
    key_file, port = tmp_path / "secrets" / "API_KEY", unused_port()
    own = {"COMPOSE_PROJECT_NAME": project, "DOOR_PORT": str(port), "API_KEY_FILE": str(key_file)}
    left_behind = {"THRESHOLD": "0.9", "MAX_WAITING": "7", "SERVICE_IMAGE": "other", "MODEL_DIGEST": "sha256:short"}
    environment = {**os.environ, **own, **left_behind}
    ops = [sys.executable, "-m", "ops"]
    there = ["--channel", "candidate", "--store", str(artifacts / MODEL_NAME)]
    try:
        done = subprocess.run(
            [*ops, "up", *there], env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"pulling {image}" in done.stderr
        assert f"{image} is ready after" in done.stdout
        assert ", as staging" in done.stdout
        assert docker("inspect", "--format", "{{.Image}}", f"{project}-service-1") == tested
        monkeypatch.setenv("API_KEY", key_file.read_text().strip())
        url = f"http://127.0.0.1:{port}"
        with asking(url, key_file.read_text().strip()) as ask:
            served = ask("GET", "/v1/model").body
            refused_batch = ask("POST", "/v1/predict/batch", {"flights": [EXAMPLE] * 51})
        made = find_release(read_ledger(Store(artifacts / MODEL_NAME)), digest)
        assert expected_of(made).items() <= served.items()
        assert (served["service_git_sha"], served["threshold"], refused_batch.status) == (SHA, 0.5, 422)
        fine(run("smoke", "--channel", "candidate", "--url", url))
        fine(run("promote", digest, "--to", "staging", "--url", url))
    finally:
        subprocess.run([*ops, "down", "--volumes"], env=environment, capture_output=True, check=True)
