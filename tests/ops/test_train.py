"""What an operator may do with releases: train, approve once, and move a channel on purpose only."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mlops_course import blueprint, training
from mlops_course.blueprint import MODEL_NAME, artifact_digest, canonical_json, read_registry, verify_artifact
from ops import train as command
from ops.__main__ import cli

# skl2onnx hands True and False to a field of whole numbers, which protobuf 7.34 will refuse; protobuf 6 is locked.
pytestmark = pytest.mark.filterwarnings("ignore:Field onnx.AttributeProto.ints. Expected an int, got a boolean")


COMMIT = "c" * 40


def run(*arguments: str | Path) -> Result:
    """Run one command of `python -m ops` and return what it printed and its exit code."""
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def everything(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def project(tmp_path, monkeypatch, root):
    """Return a folder that takes the project's place, with a copy of the approved releases.

    Data and code stay where they are; what is approved here is not approved there.
    """
    releases = tmp_path / "ops" / "releases"
    shutil.copytree(root / "ops" / "releases", releases)
    monkeypatch.setattr(command, "ROOT", tmp_path)
    for module in (blueprint, training):
        monkeypatch.setattr(module, "releases_folder", lambda: releases)
    return tmp_path


def trained_from(artifacts: Path, version: str, commit: str) -> None:
    """Let the manifest of a version name another commit, and register its new digest."""
    shelf = artifacts / MODEL_NAME
    path = shelf / version / "manifest.json"
    content = json.loads(path.read_bytes())
    content["provenance"]["git_sha"] = commit
    path.write_bytes(canonical_json(content))
    registry = read_registry(shelf)
    registry.versions[version] = artifact_digest(path.read_bytes())
    (shelf / "registry.json").write_bytes(canonical_json(registry.model_dump()))


@pytest.fixture
def artifacts(project, artifacts_root):
    """Return a copy of the built artifacts, which a test may change, as if trained from a commit."""
    folder = Path(shutil.copytree(artifacts_root, project / "artifacts"))
    trained_from(folder, "1.1.0-rc.1", COMMIT)
    return folder


@pytest.fixture
def quick(project, monkeypatch, flights):
    """Let training take seconds: one flight in eight, one setting a recipe, few resamples."""
    recipes = {v: r.model_copy(update={"search": r.search[:1]}) for v, r in training.RECIPES.items()}
    monkeypatch.setattr(training, "RECIPES", recipes)
    monkeypatch.setattr(training, "MIN_TRAIN_ROWS", 10_000)
    monkeypatch.setattr(training, "assess", functools.partial(training.assess, rounds=5))
    monkeypatch.setattr(blueprint, "load_dataset", lambda: flights.iloc[::8])
    # Whoever runs the tests may have changed the chapters since the last commit.
    committed = training.provenance().model_copy(update={"git_sha": COMMIT})
    monkeypatch.setattr(training, "provenance", lambda: committed)
    # These few rows are compared with no release that was trained on all of them.
    shutil.rmtree(project / "ops" / "releases")
    return project


# --- train ------------------------------------------------------------------------------------------------------


def test_training_tells_each_gate_the_quality_the_digests_and_what_prod_serves(quick):
    result = run("train", "--artifacts", quick / "artifacts")
    assert result.exit_code == 0, result.output
    shelf = quick / "artifacts" / MODEL_NAME
    registry = read_registry(shelf)
    assert list(registry.versions) == ["1.0.0", "1.1.0-rc.1"]
    for version, digest in registry.versions.items():
        verify_artifact(shelf / version, digest)
        assert f"training {version}: {training.RECIPES[version].title}" in result.output
        assert f"gates for {version}" in result.output
        assert f"{version:12} {digest}" in result.output
    assert result.output.count("  pass    onnx_parity") == 2
    assert "REFUSE" not in result.output
    assert "roc_auc" in result.output
    assert registry.channels == {}
    assert result.output.endswith("channel prod points to nothing: no release is approved yet\n")

    # The same again changes no version.
    before = everything(shelf)
    again = run("train", "--artifacts", quick / "artifacts", "--version", "1.0.0")
    assert again.exit_code == 0, again.output
    assert everything(shelf) == before

    # Once the first release is approved, prod gets it, and training never moves it again.
    assert run("approve", "1.0.0", "--by", "Ann", "--note", "Good.", "--artifacts", quick / "artifacts").exit_code == 0
    approved = run("train", "--artifacts", quick / "artifacts", "--version", "1.0.0")
    assert approved.output.endswith("channel prod points to 1.0.0\n")
    assert read_registry(shelf).channels == {"prod": "1.0.0"}


def test_an_unknown_version_is_a_wrong_use_of_the_command(project):
    result = run("train", "--artifacts", project / "artifacts", "--version", "9.9.9")
    assert result.exit_code == 2
    assert "--version: 9.9.9 is not one of 1.0.0, 1.1.0-rc.1" in result.output
    assert not (project / "artifacts").exists()


def test_a_refusal_names_the_gate_and_leaves_nothing_behind(quick, monkeypatch):
    monkeypatch.setattr(training, "MIN_TRAIN_ROWS", 100_000)
    result = run("train", "--artifacts", quick / "artifacts", "--version", "1.0.0")
    assert result.exit_code == 1
    rows = len(blueprint.split_by_time(blueprint.load_dataset())["train"])
    assert "Error: version 1.0.0 is refused:\n" in result.output
    assert f"- data: {rows:,} training rows, at least 100,000 expected. Likely causes: a damaged" in result.output
    assert not (quick / "artifacts").exists()


def test_broken_data_is_refused_with_row_and_column(quick, monkeypatch):
    def broken() -> None:
        raise blueprint.DataError("row 7, column 'carrier': None is missing")

    monkeypatch.setattr(blueprint, "load_dataset", broken)
    result = run("train", "--artifacts", quick / "artifacts")
    assert result.exit_code == 1
    assert "Error: row 7, column 'carrier': None is missing\n" in result.output
    assert not (quick / "artifacts").exists()


def test_training_over_a_tampered_version_is_refused_without_a_traceback(quick):
    first = run("train", "--artifacts", quick / "artifacts", "--version", "1.0.0")
    assert first.exit_code == 0, first.output
    (quick / "artifacts" / MODEL_NAME / "1.0.0" / "model.onnx").write_bytes(b"other")
    result = run("train", "--artifacts", quick / "artifacts", "--version", "1.0.0")
    assert result.exit_code == 1
    assert "Error: 1.0.0/model.onnx was changed: its SHA-256 is not the manifest's" in result.output


# --- Which version prod gets by itself ---------------------------------------------------------------------------


def test_prod_that_points_somewhere_is_never_moved(artifacts):
    shelf = artifacts / MODEL_NAME
    registry = read_registry(shelf)
    registry.channels = {"prod": "1.1.0-rc.1"}
    (shelf / "registry.json").write_bytes(canonical_json(registry.model_dump()))
    before = (shelf / "registry.json").read_bytes()
    command.point_prod(shelf)
    assert (shelf / "registry.json").read_bytes() == before


def test_prod_gets_the_newest_approved_release_and_no_candidate(artifacts):
    shelf = artifacts / MODEL_NAME
    registry = read_registry(shelf)
    registry.channels = {}
    (shelf / "registry.json").write_bytes(canonical_json(registry.model_dump()))
    command.point_prod(shelf)
    assert read_registry(shelf).channels == {"prod": "1.0.0"}


# --- approve ----------------------------------------------------------------------------------------------------


def approve(version: str, artifacts: Path) -> Result:
    """Approve a version, by Ann."""
    return run("approve", version, "--by", "Ann", "--note", "Ranks better.", "--artifacts", artifacts)


def test_an_approval_copies_the_record_and_says_who_what_and_why(artifacts, project):
    registry = (artifacts / MODEL_NAME / "registry.json").read_bytes()
    digest = read_registry(artifacts / MODEL_NAME).versions["1.1.0-rc.1"]
    result = approve("1.1.0-rc.1", artifacts)
    assert result.exit_code == 0, result.output
    assert result.output == f"approved 1.1.0-rc.1 {digest}; commit ops/releases/1.1.0-rc.1\n"
    record = project / "ops" / "releases" / "1.1.0-rc.1"
    assert {path.name for path in record.iterdir()} == {*command.RECORD, "approval.json"}
    for name in command.RECORD:
        assert (record / name).read_bytes() == (artifacts / MODEL_NAME / "1.1.0-rc.1" / name).read_bytes()
    approval = json.loads((record / "approval.json").read_text())
    assert {key: approval[key] for key in ("version", "digest", "by", "note")} == {
        "version": "1.1.0-rc.1",
        "digest": digest,
        "by": "Ann",
        "note": "Ranks better.",
    }
    assert [path.name for path in record.parent.iterdir() if path.name.startswith(".")] == []
    # An approval is no release: no channel moves.
    assert (artifacts / MODEL_NAME / "registry.json").read_bytes() == registry


def test_an_approval_needs_a_name_and_a_reason(artifacts, project):
    before = everything(project / "ops")
    for missing, given in (("--by", ["--note", "Fine."]), ("--note", ["--by", "Ann"])):
        result = run("approve", "1.1.0-rc.1", *given, "--artifacts", artifacts)
        assert result.exit_code == 2
        assert f"Missing option '{missing}'" in result.output
    assert everything(project / "ops") == before


def test_an_approval_is_given_once(artifacts, project):
    before = everything(project / "ops")
    result = approve("1.0.0", artifacts)
    assert result.exit_code == 1
    assert "Error: version 1.0.0 is approved already (ops/releases/1.0.0); raise the version\n" in result.output
    assert everything(project / "ops") == before


def test_what_was_never_trained_cannot_be_approved(artifacts, project):
    before = everything(project / "ops")
    result = approve("3.0.0", artifacts)
    assert result.exit_code == 1
    assert (
        f"Error: version 3.0.0 is not registered in {artifacts / MODEL_NAME}; run `make train` first" in result.output
    )
    assert everything(project / "ops") == before


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("model.onnx", "1.1.0-rc.1/model.onnx was changed: its SHA-256 is not the manifest's"),
        ("manifest.json", "1.1.0-rc.1/manifest.json has digest sha256:"),
    ],
)
def test_a_tampered_version_cannot_be_approved(artifacts, project, name, problem):
    path = artifacts / MODEL_NAME / "1.1.0-rc.1" / name
    path.write_bytes(path.read_bytes() + b"\n")
    before = everything(project / "ops")
    result = approve("1.1.0-rc.1", artifacts)
    assert result.exit_code == 1
    assert f"Error: {problem}" in result.output
    assert everything(project / "ops") == before


@pytest.mark.parametrize("commit", [f"{COMMIT}-dirty", "unknown"])
def test_what_nobody_can_check_out_cannot_be_approved(artifacts, project, commit):
    trained_from(artifacts, "1.1.0-rc.1", commit)
    before = everything(project / "ops")
    result = approve("1.1.0-rc.1", artifacts)
    assert result.exit_code == 1
    assert f"Error: version 1.1.0-rc.1 was trained from '{commit}', which is not a commit" in result.output
    assert everything(project / "ops") == before


def test_the_advice_of_that_refusal_works(quick, monkeypatch):
    """Commit, discard, train again: the same content from a commit can then be approved."""
    dirty = training.provenance().model_copy(update={"git_sha": f"{COMMIT}-dirty"})
    with monkeypatch.context() as changed:
        changed.setattr(training, "provenance", lambda: dirty)
        assert run("train", "--artifacts", quick / "artifacts", "--version", "1.0.0").exit_code == 0
    assert "`.venv/bin/python -m ops discard 1.0.0`" in approve("1.0.0", quick / "artifacts").output
    discarded = run("discard", "1.0.0", "--artifacts", quick / "artifacts")
    assert (discarded.exit_code, discarded.output) == (0, "discarded 1.0.0\n")
    assert not (quick / "artifacts" / MODEL_NAME / "1.0.0").exists()
    again = run("train", "--artifacts", quick / "artifacts", "--version", "1.0.0")
    assert again.exit_code == 0, again.output
    assert approve("1.0.0", quick / "artifacts").exit_code == 0


def test_an_approval_that_dies_leaves_no_record_and_can_be_repeated(artifacts, project, monkeypatch):
    def dies(source: Path, target: Path) -> None:
        if target.name == "golden.json":
            raise OSError("disk full")
        target.write_bytes(source.read_bytes())

    with monkeypatch.context() as broken:
        broken.setattr(shutil, "copyfile", dies)
        assert isinstance(approve("1.1.0-rc.1", artifacts).exception, OSError)
    assert not (project / "ops" / "releases" / "1.1.0-rc.1").exists()
    # What the dead one left behind is not in the way of the gates, nor of the next attempt.
    evidence = json.loads((artifacts / MODEL_NAME / "1.1.0-rc.1" / "metrics.json").read_text())
    assert [r.gate for r in training.run_gates(evidence) if not r.passed] == []
    assert approve("1.1.0-rc.1", artifacts).exit_code == 0


# --- ledger -----------------------------------------------------------------------------------------------------


def test_the_ledger_command_writes_the_committed_ledger(tmp_path, monkeypatch, flights, root):
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(blueprint, "load_dataset", lambda: flights)
    monkeypatch.setattr(blueprint, "data_folder", lambda: tmp_path)
    result = run("ledger")
    assert (result.exit_code, result.output) == (0, "wrote split_ledger.json\n")
    committed = root / "chapters" / "data" / "split_ledger.json"
    assert (tmp_path / "split_ledger.json").read_bytes() == committed.read_bytes()
