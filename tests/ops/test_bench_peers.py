"""The other ways of serving the model: their locks, what they are sent, and how their answers are read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mlops_course.blueprint import FEATURES
from mlops_course.serving import EXAMPLE, BatchPrediction, BatchRequest, Prediction, PredictRequest
from ops.bench.peers import HERE, PEERS, prepare_mlflow
from ops.bench.peers.echo import app as echo
from ops.bench.peers.tutorial import app as tutorial
from ops.lock import FULL_LOCK, SERVICE_LOCK, read_lock, versions

JSON = {"content-type": "application/json"}

# One flight with an unknown pressure, and what the model sees of it: 12:10 is minute 730, a Tuesday is day 1.
UNKNOWN = {**EXAMPLE, "scheduled_departure": "2013-08-13T12:10:00", "pressure_mb": None}
SEEN = ["UA", "EWR", "IAH", 730, 1, 1400, 78.1, 70.0, 76.3, 10.4, 0.0, None, 10.0, 31.5]

# Answers of the real servers to one and to two of the golden requests of 1.1.0-rc.1, the first and the fourth.
GOLDEN = (0.23767819, 0.562687407)
ANSWERS = {
    "tutorial": (
        b'{"request_id":"5b8509e67c7c46de9df6d36034fbd521","prediction":"disrupted","probability":0.5626874065239063,'
        b'"threshold":0.46,"model_version":"1.1.0-rc.1"}',
        b'{"request_id":"e9997b9c4d754e38b84af7f837672bca","predictions":['
        b'{"request_id":"3072dccbd94a44368b9f2784efe62e40","prediction":"on_time","probability":0.2376781898042184,'
        b'"threshold":0.46,"model_version":"1.1.0-rc.1"},'
        b'{"request_id":"2e83da515fc94b96b020c6bc591cb554","prediction":"disrupted","probability":0.5626874065239063,'
        b'"threshold":0.46,"model_version":"1.1.0-rc.1"}]}',
    ),
    "mlserver": (
        b'{"model_name":"flight-disruption","id":"57efc228-7f86-4d51-b8b2-73cbee4e66ae","parameters":{},"outputs":['
        b'{"name":"predict_proba","shape":[1,2],"datatype":"FP64","parameters":{"content_type":"np"},'
        b'"data":[0.43731259347609375,0.5626874065239063]}]}',
        b'{"model_name":"flight-disruption","id":"68273814-c24f-4841-a0f7-2a490dda2080","parameters":{},"outputs":['
        b'{"name":"predict_proba","shape":[2,2],"datatype":"FP64","parameters":{"content_type":"np"},'
        b'"data":[0.7623218101957816,0.2376781898042184,0.43731259347609375,0.5626874065239063]}]}',
    ),
    "bentoml": (b"[0.5626874065239063]", b"[0.2376781898042184, 0.5626874065239063]"),
    "mlflow": (
        b'{"predictions": [[0.43731259347609375, 0.5626874065239063]]}',
        b'{"predictions": [[0.7623218101957816, 0.2376781898042184], [0.43731259347609375, 0.5626874065239063]]}',
    ),
}


def test_every_folder_is_a_peer():
    folders = {path.name for path in HERE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert {peer.lock.parent.name for peer in PEERS.values()} == folders
    assert list(PEERS) == [peer.name for peer in PEERS.values()]


def test_importing_the_table_is_cheap():
    check = "import sys, ops.bench.peers; print(sorted({'numpy', 'pandas', 'fastapi', 'sklearn'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", PEERS)
def test_every_requirement_is_locked_with_hashes(name):
    lines = PEERS[name].lock.with_suffix(".in").read_text().splitlines()
    wanted = [Requirement(line) for line in lines if line and not line.startswith(("#", "-c "))]
    locked = versions(read_lock(PEERS[name].lock))  # refuses a line without hashes
    missing = [r for r in wanted if not r.specifier.contains(locked.get(canonicalize_name(r.name), "0"))]
    assert wanted
    assert missing == []
    assert {canonicalize_name(r.name) for r in wanted} <= locked.keys()


@pytest.mark.parametrize("name", [name for name in PEERS if name != "echo"])
def test_the_model_is_loaded_by_what_it_was_written_with(root, name):
    project, locked = versions(read_lock(root / FULL_LOCK)), versions(read_lock(PEERS[name].lock))
    numeric = ("joblib", "numpy", "pandas", "scikit-learn", "scipy")
    assert {package: locked[package] for package in numeric} == {package: project[package] for package in numeric}


@pytest.mark.parametrize("name", ["echo", "tutorial"])
def test_what_fastapi_serves_runs_on_the_versions_of_the_service(root, name):
    project, locked = versions(read_lock(root / SERVICE_LOCK)), versions(read_lock(PEERS[name].lock))
    serving = ("fastapi", "httptools", "pydantic", "pydantic-core", "starlette", "uvicorn", "uvloop")
    assert {package: locked[package] for package in serving} == {package: project[package] for package in serving}


def constraints(schema: Any) -> Any:
    """Return a JSON schema without what does not decide whether a value is accepted."""
    if isinstance(schema, list):
        return [constraints(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    words = {"title", "description", "examples", "x-unit"}
    return {key: constraints(value) for key, value in schema.items() if key not in words}


@pytest.mark.parametrize("module", [echo, tutorial])
def test_fastapi_accepts_what_the_service_accepts(module):
    ours, theirs = (constraints(m.model_json_schema()) for m in (PredictRequest, module.Flight))
    # The service has a pattern of its own; a tutorial takes pydantic's type.
    assert ours["properties"].pop("scheduled_departure")["type"] == "string"
    assert theirs["properties"].pop("scheduled_departure") == {"type": "string", "format": "date-time"}
    assert theirs == ours
    assert list(module.Prediction.model_fields) == list(Prediction.model_fields)


def test_the_batch_of_the_tutorial_is_that_of_the_service():
    ours, theirs = (constraints(m.model_json_schema())["properties"] for m in (BatchRequest, tutorial.Flights))
    assert (theirs["flights"]["minItems"], theirs["flights"]["maxItems"]) == (1, ours["flights"]["maxItems"])
    assert list(tutorial.Predictions.model_fields) == list(BatchPrediction.model_fields)


def test_the_echo_answers_with_constants_and_the_id_of_the_request():
    client, peer = TestClient(echo.app, headers=JSON), PEERS["echo"]
    one = client.post(peer.one, content=peer.single({**UNKNOWN, "request_id": "a" * 32}))
    assert one.status_code == 200
    assert one.json()["request_id"] == "a" * 32
    assert len(client.post(peer.one, content=peer.single(UNKNOWN)).json()["request_id"]) == 32
    assert client.post(peer.one, content=peer.single({**UNKNOWN, "origin": "SFO"})).status_code == 422
    assert peer.probabilities(one.content) == []


def test_the_tutorial_serves_the_model(artifacts_root, monkeypatch):
    artifact, peer = artifacts_root / "flight-disruption" / "1.1.0-rc.1", PEERS["tutorial"]
    cases = json.loads((artifact / "golden.json").read_text())["cases"]
    flights, expected = [case["request"] for case in cases], [case["probability"] for case in cases]
    assert any(flight["pressure_mb"] is None for flight in flights)
    monkeypatch.setenv("MODEL_FOLDER", str(artifact))
    with TestClient(tutorial.app, headers=JSON) as client:
        singles = [client.post(peer.one, content=peer.single(flight)).content for flight in flights]
        batch = client.post(str(peer.many), content=peer.batch(flights)).content
    assert [peer.probabilities(answer)[0] for answer in singles] == pytest.approx(expected, abs=1e-5)
    assert peer.probabilities(batch) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["echo", "tutorial"])
def test_fastapi_is_sent_the_flight_itself(name):
    peer = PEERS[name]
    assert json.loads(peer.single(UNKNOWN)) == UNKNOWN
    assert json.loads(peer.batch([EXAMPLE, UNKNOWN])) == {"flights": [EXAMPLE, UNKNOWN]}


def test_mlserver_is_sent_one_tensor_for_each_column():
    peer = PEERS["mlserver"]
    inputs = json.loads(peer.single(UNKNOWN))["inputs"]
    assert [one["name"] for one in inputs] == list(FEATURES)
    assert [one["data"] for one in inputs] == [[value] for value in SEEN]
    assert [one["datatype"] for one in inputs] == ["BYTES"] * 3 + ["FP32"] * 11
    many = json.loads(peer.batch([EXAMPLE, UNKNOWN]))["inputs"]
    assert {tuple(one["shape"]) for one in many} == {(2, 1)}
    assert many[FEATURES.index("pressure_mb")]["data"] == [EXAMPLE["pressure_mb"], None]


def test_bentoml_is_sent_rows():
    peer = PEERS["bentoml"]
    row = dict(zip(FEATURES, SEEN, strict=True))
    assert json.loads(peer.single(UNKNOWN)) == {"rows": [row]}
    assert json.loads(peer.batch([UNKNOWN, UNKNOWN])) == {"rows": [row, row]}


def test_mlflow_is_sent_a_frame():
    peer = PEERS["mlflow"]
    assert json.loads(peer.single(UNKNOWN)) == {"dataframe_split": {"columns": list(FEATURES), "data": [SEEN]}}
    assert json.loads(peer.batch([UNKNOWN, UNKNOWN]))["dataframe_split"]["data"] == [SEEN, SEEN]


@pytest.mark.parametrize("name", PEERS)
def test_a_value_that_is_left_out_is_null_and_nan_is_refused(name):
    left_out = {key: value for key, value in UNKNOWN.items() if key != "pressure_mb"}
    if name not in ("echo", "tutorial"):
        assert PEERS[name].single(left_out) == PEERS[name].single(UNKNOWN)
    with pytest.raises(ValueError, match="not JSON compliant"):
        PEERS[name].single({**UNKNOWN, "pressure_mb": float("nan")})


@pytest.mark.parametrize("name", ANSWERS)
def test_reads_the_probabilities_of_a_real_answer(name):
    one, many = ANSWERS[name]
    assert PEERS[name].probabilities(one) == pytest.approx([GOLDEN[1]], abs=1e-8)
    assert PEERS[name].probabilities(many) == pytest.approx(list(GOLDEN), abs=1e-8)


@pytest.mark.parametrize("name", PEERS)
def test_a_server_listens_on_the_loopback_address_only(name, tmp_path):
    arguments, environment, folder = PEERS[name].command(tmp_path / "bin" / "python", tmp_path, tmp_path, 8123)
    told = [*arguments, *environment.values()]
    if name.startswith("mlserver"):
        told.append(json.loads((HERE / "mlserver" / "settings.json").read_text())["host"])
    assert {"8123", "127.0.0.1"} <= set(told)
    assert folder.is_dir()


def test_mlserver_gets_its_settings_next_to_the_model(tmp_path):
    artifact, work = tmp_path / "artifact", tmp_path / "work"
    artifact.mkdir()
    work.mkdir()
    (artifact / "model.joblib").write_bytes(b"a model")
    peer = PEERS["mlserver"]
    peer.prepare(tmp_path / "python", artifact, work)
    (found,) = work.glob("*/model-settings.json")
    settings = json.loads(found.read_text())
    assert (found.parent / settings["parameters"]["uri"]).read_bytes() == b"a model"
    assert settings["name"] in peer.one
    assert (work / "settings.json").is_file()


def test_a_preparation_that_fails_says_why(tmp_path):
    # Here MLflow is not installed.
    with pytest.raises(RuntimeError, match="No module named 'mlflow'"):
        prepare_mlflow(Path(sys.executable), tmp_path, tmp_path)
