"""Chapter 3's module, piece by piece: settings, schema, errors, decisions, and what the loader refuses."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from mlops_course.blueprint import (
    DERIVED,
    FEATURES,
    INPUTS,
    MANIFEST,
    MODEL_NAME,
    NUMERIC,
    ArtifactError,
    artifact_digest,
    canonical_json,
    resolve_channel,
    verify_artifact,
)
from mlops_course.serving import (
    check_secret,
    BATCH_LIMIT,
    DECIMALS,
    ERRORS,
    EXAMPLE,
    LOCAL_TIME,
    ConfigError,
    NullObserver,
    Prediction,
    PredictRequest,
    Problem,
    Runtime,
    Score,
    ServiceError,
    Settings,
    accept_id,
    config_fingerprint,
    decide,
    features,
    load_model,
    load_settings,
    model_source,
    new_id,
    problem,
    reload,
    render,
    run_graph,
)

KEY = "k7Qz9-mR2vXw8-Lp4tNb6"
DIGEST = "sha256:" + "a" * 64
PROD = {"APP_ENV": "prod", "MODEL_URI": "/models/1.0.0", "MODEL_DIGEST": DIGEST, "API_KEY": KEY, "GIT_SHA": "abc"}


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Settings]:
    """Read settings from exactly these variables."""

    def read(secrets: Path = tmp_path / "none", **variables: str) -> Settings:
        for name in set(os.environ) & {name.upper() for name in Settings.model_fields}:
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return load_settings(secrets)

    return read


# Settings


def test_dev_needs_nothing(env: Callable[..., Settings]) -> None:
    settings = env()
    assert (settings.app_env, settings.host, settings.port, settings.api_key) == ("dev", "127.0.0.1", 8000, None)


@pytest.mark.parametrize("app_env", ["staging", "prod"])
@pytest.mark.parametrize("name", ["MODEL_URI", "MODEL_DIGEST", "API_KEY", "GIT_SHA"])
@pytest.mark.parametrize("value", [None, ""])
def test_outside_dev_nothing_is_guessed(
    env: Callable[..., Settings], app_env: str, name: str, value: str | None
) -> None:
    variables = {**PROD, "APP_ENV": app_env}
    assert env(**variables).app_env == app_env
    del variables[name]
    with pytest.raises(ConfigError) as refused:
        env(**variables, **({} if value is None else {name: value}))
    assert re.fullmatch(rf"{name}: is missing, and is required .* \({name} is the .+\)", str(refused.value))


BAD_KEYS = [
    "changeme-changeme",
    "ChangeMeChangeMe99",
    "placeholder-0000-zz",
    "my-password-is-good",
    "your-api-key-here-please",
    "secretsecretsecret9",
    "insert_key_here_ok",
    "0000000000000000",
    "abababababababab",
    "tooshort9",
    "test-key-test-key-9",
]


def test_no_random_key_is_taken_for_a_placeholder() -> None:
    """Short words happen: one random key of some hundred holds "me" between two digits."""
    dice = random.Random(4)
    keys = [base64.urlsafe_b64encode(dice.randbytes(32)).decode().rstrip("=") for _ in range(2_000)]
    assert any(re.search(r"(?<![A-Za-z])me(?![A-Za-z])", key, re.IGNORECASE) for key in keys)
    for key in keys:
        check_secret(key)


@pytest.mark.parametrize("key", BAD_KEYS)
@pytest.mark.parametrize("app_env", ["dev", "prod"])
def test_a_weak_or_placeholder_key_is_refused_everywhere(env: Callable[..., Settings], key: str, app_env: str) -> None:
    with pytest.raises(ConfigError) as refused:
        env(**{**PROD, "APP_ENV": app_env, "API_KEY": key})
    assert str(refused.value).startswith("API_KEY: is ")
    assert key not in str(refused.value)
    assert refused.value.__cause__ is None
    assert refused.value.__context__ is None


@pytest.mark.parametrize("key", ["9f1234ab7c0d5e6f", "aGtest9-mR2vXw8Lp4", "x1234-y56789abcdef"])
def test_a_random_key_may_hold_a_digit_run_or_a_word_inside(env: Callable[..., Settings], key: str) -> None:
    assert env(API_KEY=key).api_key is not None


@pytest.mark.parametrize("key", ["k7Qz9 mR2vXw8-Lp4tNb6", "k7Qz9-mR2vXw8-Lp4tNbé", "k7Qz9-mR2v\tXw8-Lp4tNb6"])
def test_a_key_that_no_header_can_carry_is_refused(env: Callable[..., Settings], key: str) -> None:
    with pytest.raises(ConfigError, match="API_KEY: is not made of printable ASCII"):
        env(API_KEY=key)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "flights.example", "127.example.com"])  # noqa: S104
def test_an_open_door_needs_a_key_in_dev_too(env: Callable[..., Settings], host: str) -> None:
    with pytest.raises(ConfigError, match="API_KEY: is missing, and is required when HOST is not a loopback address"):
        env(HOST=host)
    assert env(HOST=host, API_KEY=KEY).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "::1", "localhost"])
def test_a_loopback_address_needs_no_key(env: Callable[..., Settings], host: str) -> None:
    assert env(HOST=host).api_key is None


def test_an_empty_environment_is_not_dev(env: Callable[..., Settings]) -> None:
    with pytest.raises(ConfigError, match="APP_ENV: is empty"):
        env(APP_ENV="")


def test_an_error_says_what_the_setting_is(env: Callable[..., Settings]) -> None:
    with pytest.raises(ConfigError, match=r"\(PORT is the port to listen on\)"):
        env(PORT="x")


@pytest.mark.parametrize("kind", ["folder", "bytes", "empty"])
def test_a_secret_file_that_is_no_text_is_told(env: Callable[..., Settings], tmp_path: Path, kind: str) -> None:
    if kind == "folder":
        (tmp_path / "API_KEY").mkdir()
    else:
        (tmp_path / "API_KEY").write_bytes(b"\xff\xfe" * 20 if kind == "bytes" else b"")
    with pytest.raises(ConfigError, match=r"^API_KEY: .*API_KEY (is empty or not a file|cannot be read as text)"):
        env(tmp_path)


def test_a_secret_is_in_no_text(env: Callable[..., Settings]) -> None:
    settings = env(**PROD)
    assert isinstance(settings.api_key, SecretStr)
    texts = [repr(settings), str(settings), settings.model_dump_json(), str(settings.model_dump())]
    texts += [config_fingerprint(settings), repr(Runtime(settings, NullObserver()))]
    assert not [text for text in texts if KEY in text]


def test_all_problems_are_told_at_once_and_no_value(env: Callable[..., Settings]) -> None:
    with pytest.raises(ConfigError) as refused:
        env(PORT="hunter2", LOG_LEVEL="hunter2", THRESHOLD="1.5", MAX_BATCH="100000", MODEL_DIGEST="hunter2")
    lines = str(refused.value).splitlines()
    assert {line.split(":")[0] for line in lines} == {"PORT", "LOG_LEVEL", "THRESHOLD", "MAX_BATCH", "MODEL_DIGEST"}
    assert "hunter2" not in str(refused.value)
    assert "100000" not in str(refused.value)


def test_a_remote_model_is_refused_without_showing_its_address(env: Callable[..., Settings]) -> None:
    with pytest.raises(ConfigError, match="fetch the artifact first") as refused:
        env(MODEL_URI="s3://user:hunter2@bucket/1.0.0")
    assert "hunter2" not in str(refused.value)


def test_secret_files_count_like_variables_and_variables_win(env: Callable[..., Settings], tmp_path: Path) -> None:
    (tmp_path / "API_KEY").write_text(KEY + "\n")
    (tmp_path / "PORT").write_text("9001")
    settings = env(tmp_path)
    assert settings.api_key is not None
    assert (settings.api_key.get_secret_value(), settings.port) == (KEY, 9001)
    assert env(tmp_path, PORT="9002").port == 9002


def test_settings_do_not_change(env: Callable[..., Settings]) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        env().port = 1


def test_the_fingerprint_is_about_behaviour_only(env: Callable[..., Settings]) -> None:
    base = config_fingerprint(env())
    door = {"HOST": "0.0.0.0", "API_KEY": KEY}  # noqa: S104
    same = [{"PORT": "9"}, door, {"LOG_LEVEL": "DEBUG"}, {"GIT_SHA": "abc"}, PROD, {"DRAIN_S": "1"}, {"KEEP_ALIVE_S": "9"}]
    assert {config_fingerprint(env(**variables)) for variables in same} == {base}
    assert config_fingerprint(env(MAX_BATCH="9")) != base
    assert config_fingerprint(env(THRESHOLD="0.3")) != base


def test_every_setting_says_what_it_is() -> None:
    assert all(field.description for field in Settings.model_fields.values())


def test_a_configured_digest_is_never_ignored(env: Callable[..., Settings], tmp_path: Path) -> None:
    assert model_source(env(MODEL_URI=str(tmp_path), MODEL_DIGEST=DIGEST)) == (tmp_path, DIGEST)
    assert model_source(env(MODEL_URI=str(tmp_path))) == (tmp_path, None)


# Schema, ids, decisions


def test_the_request_follows_the_contract() -> None:
    assert list(PredictRequest.model_fields) == ["request_id", *(column.name for column in INPUTS)]
    assert NUMERIC[: len(DERIVED)] == tuple(column.name for column in DERIVED)


def test_the_published_pattern_allows_exactly_the_days_that_exist() -> None:
    pattern = re.compile(LOCAL_TIME)
    exists = {(datetime(2000, 1, 1) + timedelta(days=day)).strftime("%Y-%m-%d") for day in range(36_525)}  # noqa: DTZ001
    texts = [f"{y:04}-{m:02}-{d:02}" for y in range(1999, 2102) for m in range(14) for d in range(33)]
    assert {text for text in texts if pattern.fullmatch(text + "T00:00")} == exists
    clock = [f"2013-01-01T{h:02}:{m:02}" for h in range(26) for m in range(62)]
    assert sum(pattern.fullmatch(text) is not None for text in clock) == 24 * 60


def test_the_features_are_in_the_models_order() -> None:
    flight = PredictRequest.model_validate_json(json.dumps({**EXAMPLE, "pressure_mb": None}))
    categories, numbers = features(flight)
    row = dict(zip(FEATURES, (*categories, *numbers), strict=True))
    assert row["minute_of_day"] == 17 * 60 + 29
    assert row["day_of_week"] == 3
    assert row["pressure_mb"] is None
    assert {name: row[name] for name in row if name in EXAMPLE and name != "pressure_mb"} == {
        name: value for name, value in EXAMPLE.items() if name not in ("scheduled_departure", "pressure_mb")
    }


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.4, 1.0])
def test_an_answer_never_contradicts_itself(threshold: float) -> None:
    for step in range(-30, 31):
        probability = min(1.0, max(0.0, threshold + step * 1e-5))
        (score,) = decide([probability], threshold)
        assert score.disrupted == (score.probability >= threshold)
        assert abs(score.probability - probability) <= 0.5 * 10**-DECIMALS + 1e-12


@pytest.mark.parametrize("wrong", [float("nan"), -0.1, 1.1, float("inf")])
def test_what_is_no_probability_is_never_published(wrong: float) -> None:
    with pytest.raises(ArithmeticError):
        decide([0.1, wrong], 0.4)


def test_ids_are_uuids_or_hex() -> None:
    assert accept_id(new_id())
    assert new_id() != new_id()
    assert [accept_id(text) for text in (None, "", "a" * 31, "a" * 33, "g" * 32, "a" * 32 + "\n")] == [""] * 6


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_has_the_same_shape(error: type[ServiceError]) -> None:
    answer = problem(error("why"), "0" * 32)
    body = Problem.model_validate_json(answer.body, strict=True)
    assert (body.status, answer.status) == (error.status, error.status)
    assert (body.detail, body.errors) == ("why", [])
    assert len({(e.kind, e.status) for e in ERRORS}) == len(ERRORS)


# The model


@pytest.fixture(scope="session")
def release(artifacts_root: Path) -> tuple[Path, str]:
    """Folder and digest of the model in the prod channel."""
    return resolve_channel(artifacts_root / MODEL_NAME, "prod")


@pytest.fixture
def copied(release: tuple[Path, str], tmp_path: Path) -> Path:
    """Return a copy of the released artifact that may be broken."""
    return shutil.copytree(release[0], tmp_path / release[0].name)


def seal(folder: Path, **changes: Any) -> str:
    """Rewrite the manifest so that the folder agrees with itself again; return the new digest."""
    manifest = json.loads((folder / MANIFEST).read_text())
    names = [path.name for path in folder.iterdir() if path.name != MANIFEST]
    manifest["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    (folder / MANIFEST).write_bytes(canonical_json({**manifest, **changes}))
    return artifact_digest((folder / MANIFEST).read_bytes())


def test_the_released_model_loads_and_answers_alike_alone_and_together(release: tuple[Path, str]) -> None:
    model = load_model(*release)
    cases = json.loads((release[0] / "golden.json").read_bytes())["cases"]
    rows = [features(PredictRequest.model_validate_json(json.dumps(case["request"]))) for case in cases]
    together = run_graph(model.session, rows)
    for case, row, ours in zip(cases, rows, together, strict=True):
        assert type(ours) is float
        assert abs(ours - case["probability"]) <= 1e-5
        assert run_graph(model.session, [row])[0] == pytest.approx(ours, abs=1e-7)
        assert model.score(row) == model.score_many([row])[0]
    assert (model.digest, model.threshold) == (release[1], model.manifest.threshold)
    assert set(model.reference["features"]) == set(FEATURES)


def test_the_threshold_can_be_replaced(release: tuple[Path, str]) -> None:
    row = features(PredictRequest.model_validate_json(json.dumps(EXAMPLE)))
    assert load_model(*release, 0.0).score(row).disrupted
    assert not load_model(*release, 1.0).score(row).disrupted


def test_the_rendered_answer_is_the_schemas(release: tuple[Path, str]) -> None:
    model = load_model(*release)
    for score in (Score(0.0, False), Score(1.0, True), Score(0.0001, False), Score(0.4321, True)):
        (text,) = render(["0" * 32], [score], model)
        answer = Prediction.model_validate_json(text, strict=True)
        assert answer.model_dump_json() == text


def _flip(folder: Path) -> None:
    data = bytearray((folder / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.onnx").write_bytes(data)


def _edit(folder: Path, old: str, new: str) -> None:
    text = (folder / MANIFEST).read_text()
    assert re.search(old, text)
    (folder / MANIFEST).write_text(re.sub(old, new, text, count=1))


def _swap_features(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest["features"][:2] = manifest["features"][1::-1]
    (folder / MANIFEST).write_bytes(canonical_json(manifest))


def _unlink(folder: Path) -> dict[str, Any]:
    (folder / "golden.json").unlink()
    return {}


def _folder_for_file(folder: Path) -> None:
    _unlink(folder)
    (folder / "golden.json").mkdir()


def _file_for_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("x")


def _link(folder: Path, name: str) -> None:
    outside = folder.parent / name
    shutil.move(folder / name, outside)
    (folder / name).symlink_to(outside)


TAMPERED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a flipped bit": (_flip, "model.onnx was changed"),
    "an edited threshold": (lambda f: _edit(f, r'"threshold": [0-9.]+', '"threshold": 0.01'), "changed after"),
    "another feature order": (_swap_features, "changed after it was registered"),
    "a missing file": (lambda f: (f / "golden.json").unlink(), "golden.json is missing"),
    "a file too many": (lambda f: (f / "extra.txt").write_text("x"), "extra.txt is not listed"),
    "a folder instead of a file": (_folder_for_file, "golden.json"),
    "a symlink out of the folder": (lambda f: _link(f, "model.onnx"), "model.onnx is missing or not a plain file"),
    "a manifest that is a symlink": (lambda f: _link(f, MANIFEST), "symbolic link"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "cannot read"),
    "an empty manifest": (lambda f: (f / MANIFEST).write_bytes(b""), "changed after it was registered"),
    "no folder": (shutil.rmtree, "cannot read"),
    "a file instead of a folder": (_file_for_folder, "cannot read"),
}


@pytest.mark.parametrize(("tamper", "said"), TAMPERED.values(), ids=TAMPERED)
def test_a_tampered_artifact_is_refused(
    release: tuple[Path, str], copied: Path, tamper: Callable[[Path], Any], said: str
) -> None:
    tamper(copied)
    with pytest.raises(ArtifactError, match=re.escape(said)):
        load_model(copied, release[1])


def test_a_manifest_that_is_a_pipe_is_refused_without_waiting(copied: Path) -> None:
    (copied / MANIFEST).unlink()
    os.mkfifo(copied / MANIFEST)
    with pytest.raises(ArtifactError, match="not a plain file"):
        load_model(copied, DIGEST)


def test_a_wrong_digest_is_refused(release: tuple[Path, str]) -> None:
    with pytest.raises(ArtifactError, match=f"expected {DIGEST}.*or MODEL_DIGEST is wrong"):
        load_model(release[0], DIGEST)


def _other_columns(folder: Path) -> dict[str, Any]:
    columns = json.loads((folder / MANIFEST).read_bytes())["features"]
    columns[-1]["high"] = 9_999
    return {"features": columns}


# Artifacts that agree with themselves, and are still not for this service.
FOREIGN: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "another major version": (lambda _: {"version": "2.0.0"}, "version 2.0.0 has another input contract"),
    "no version": (lambda _: {"version": "latest"}, "cannot be read as an artifact"),
    "another model": (lambda _: {"name": "churn"}, "another model"),
    "another order of features": (
        lambda f: {"features": json.loads((f / MANIFEST).read_bytes())["features"][::-1]},
        "another order",
    ),
    "another range": (_other_columns, "another type, unit or range"),
    "an impossible threshold": (lambda _: {"threshold": 1.5}, "threshold is not between"),
    "an unknown field in the manifest": (lambda _: {"surprise": 1}, "is not a manifest of this course"),
    "no golden cases": (lambda f: ((f / "golden.json").write_text('{"cases": []}'), {})[1], "there is no case in it"),
    "golden cases that are no JSON": (lambda f: ((f / "golden.json").write_text("{"), {})[1], "golden.json: cannot be read"),
    "bins that are no JSON": (
        lambda f: ((f / "reference.json").write_text("{"), {})[1],
        "reference.json: cannot be read",
    ),
    "no golden file": (_unlink, "golden.json is missing"),
    "a graph that is no graph": (lambda f: ((f / "model.onnx").write_bytes(b"x" * 99), {})[1], "model.onnx: cannot be read"),
}


@pytest.mark.parametrize(("change", "said"), FOREIGN.values(), ids=FOREIGN)
def test_an_artifact_that_is_not_for_this_service_is_refused(
    copied: Path, change: Callable[[Path], dict[str, Any]], said: str
) -> None:
    changes = change(copied)
    digest = seal(copied, **changes)
    with pytest.raises(ArtifactError, match=re.escape(said)):
        load_model(copied, digest)


def test_a_file_named_outside_the_folder_is_refused(copied: Path) -> None:
    (copied.parent / "other").write_bytes(b"x")
    manifest = json.loads((copied / MANIFEST).read_bytes())
    manifest["files"]["../other"] = hashlib.sha256(b"x").hexdigest()
    (copied / MANIFEST).write_bytes(canonical_json(manifest))
    with pytest.raises(ArtifactError):
        load_model(copied, artifact_digest((copied / MANIFEST).read_bytes()))


@pytest.mark.parametrize("shift", [2e-5, -2e-5, float("nan")])
def test_training_serving_skew_is_refused(copied: Path, shift: float) -> None:
    golden = json.loads((copied / "golden.json").read_bytes())
    golden["cases"][-1]["probability"] += shift
    (copied / "golden.json").write_text(json.dumps(golden))
    with pytest.raises(ArtifactError, match="training-serving skew"):
        load_model(copied, seal(copied))


def test_the_tolerance_is_the_services_and_not_the_files(copied: Path) -> None:
    golden = json.loads((copied / "golden.json").read_bytes())
    golden["tolerance"] = 1.0
    golden["cases"][0]["probability"] += 0.01
    (copied / "golden.json").write_text(json.dumps(golden))
    with pytest.raises(ArtifactError, match="training-serving skew"):
        load_model(copied, seal(copied))


def test_golden_cases_pass_through_the_schema(copied: Path) -> None:
    golden = json.loads((copied / "golden.json").read_bytes())
    golden["cases"][0]["request"]["humidity_pct"] = 140
    (copied / "golden.json").write_text(json.dumps(golden))
    with pytest.raises(ArtifactError, match="cannot be read as an artifact"):
        load_model(copied, seal(copied))


def test_a_file_swapped_after_the_check_does_not_matter(
    release: tuple[Path, str], copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def verify_then_swap(folder: Path, digest: str | None) -> Any:
        manifest = verify_artifact(folder, digest)
        _flip(folder)
        return manifest

    monkeypatch.setattr("mlops_course.serving.verify_artifact", verify_then_swap)
    with pytest.raises(ArtifactError, match="changed while it was read"):
        load_model(copied, release[1])


class Told(NullObserver):
    """Remembers refusals."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def load_failed(self, reason: str) -> None:
        self.reasons.append(reason)


def test_a_good_model_goes_on_when_the_next_one_is_bad(release: tuple[Path, str], copied: Path) -> None:
    observer = Told()
    good = Settings.model_construct(model_uri=str(release[0]), model_digest=release[1])
    runtime = Runtime(good, observer)
    assert reload(runtime)
    first = runtime.model
    _flip(copied)
    runtime.settings = good.model_copy(update={"model_uri": str(copied)})
    assert not reload(runtime)
    assert runtime.model is first
    assert observer.reasons == [runtime.reason]
    assert "model.onnx was changed" in runtime.reason


def test_the_limit_of_a_batch_is_published() -> None:
    from mlops_course.serving import BatchRequest

    assert BatchRequest.model_json_schema()["properties"]["flights"]["maxItems"] == BATCH_LIMIT
