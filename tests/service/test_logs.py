"""What the service writes: one line of JSON per request, with the release in it, and no value that was sent."""

from __future__ import annotations

import io
import json
import logging
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr

from mlops_course.monitoring import describe_error
from mlops_course.serving import Model, Row, Score, Settings
from service.app import create_app
from service.logs import JsonFormatter
from service.observer import ServiceObserver

MARK = "hunter2"
KEY = "k7Qz9-mR2vXw8-Lp4tNb6"


def lines(stream: io.BytesIO) -> list[dict[str, Any]]:
    """Return what was written."""
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_request_is_one_line_with_its_release(settings: Settings, example: dict[str, Any]) -> None:
    stream = io.BytesIO()
    with TestClient(create_app(settings, ServiceObserver(settings, stream))) as client:
        answer = client.post("/v1/predict", json={**example, "request_id": "ab" * 16})
        about = client.get("/v1/model").json()
    loaded, request, model = lines(stream)
    assert (loaded["event"], loaded["model"], loaded["digest"]) == ("model_loaded", about["version"], about["digest"])
    assert set(loaded["ms"]) == {"verify", "open", "replay", "warm up"}
    assert request["request_id"] == answer.json()["request_id"] == "ab" * 16
    expected = {"event": "request", "level": "info", "method": "POST", "route": "/v1/predict", "status": 200, "rows": 1}
    assert expected.items() <= request.items()
    assert (request["digest"], request["config"]) == (about["digest"], about["config"])
    assert len(request["stages_us"]) == 4
    assert model["route"] == "/v1/model"


def test_nothing_that_was_sent_and_no_secret_is_written(settings: Settings, example: dict[str, Any]) -> None:
    stream = io.BytesIO()
    guarded = settings.model_copy(update={"api_key": SecretStr(KEY)})
    with TestClient(create_app(guarded, ServiceObserver(guarded, stream)), headers={"X-API-Key": KEY}) as client:
        client.post("/v1/predict", json={**example, "dest": MARK, MARK: MARK})
        client.post("/v1/predict", content=MARK, headers={"content-type": "application/json"})
        client.get(f"/{MARK}?{MARK}", headers={"X-Request-ID": MARK, "X-API-Key": MARK})
    text = stream.getvalue().decode()
    assert len(lines(stream)) == 4
    assert MARK not in text
    assert KEY not in text
    assert "UA" not in text
    assert lines(stream)[1]["mistakes"] == [["dest", "wrong_form"], ["unknown", "unknown_field"]]


def test_a_fault_is_logged_by_type_and_place(
    settings: Settings, example: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Model, row: Row) -> Score:
        raise RuntimeError(MARK)

    monkeypatch.setattr(Model, "score", broken)
    stream = io.BytesIO()
    with TestClient(create_app(settings, ServiceObserver(settings, stream))) as client:
        answer = client.post("/v1/predict", json=example)
    failed = next(line for line in lines(stream) if line["event"] == "failed")
    assert failed["request_id"] == answer.json()["request_id"]
    assert failed["exception"] == "RuntimeError"
    assert failed["where"][-1].endswith("broken")
    assert MARK not in stream.getvalue().decode()


def test_a_refused_model_is_logged(settings: Settings) -> None:
    stream = io.BytesIO()
    wrong = settings.model_copy(update={"model_digest": "sha256:" + "0" * 64})
    with TestClient(create_app(wrong, ServiceObserver(wrong, stream))):
        pass
    assert (lines(stream)[0]["event"], lines(stream)[0]["level"]) == ("model_refused", "error")


def test_the_level_is_respected(settings: Settings, example: dict[str, Any]) -> None:
    stream = io.BytesIO()
    quiet = settings.model_copy(update={"log_level": "warning"})
    with TestClient(create_app(quiet, ServiceObserver(quiet, stream))) as client:
        client.post("/v1/predict", json=example)
    assert lines(stream) == []


def test_the_servers_own_records_hide_the_text_of_exceptions() -> None:
    with pytest.raises(ValueError, match=MARK) as caught:
        raise ValueError(MARK)
    error = (ValueError, caught.value, caught.tb)
    line = JsonFormatter().format(logging.LogRecord("uvicorn.error", 40, __file__, 1, "it failed", None, error))
    assert describe_error(caught.value)["exception"] == json.loads(line)["exception"] == "ValueError"
    assert MARK not in line
