"""What the running service counts and writes: bounded series, counts that are right, and nothing that was sent."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Generator, Iterable
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from starlette.types import Message, Scope

from mlops_course.blueprint import FEATURES
from mlops_course.monitoring import LOG_FIELDS, MISTAKE_FIELDS, MISTAKE_REASONS, is_sampled
from mlops_course.serving import REASONS, Model, PredictRequest, Row, Score, Service, Settings
from service.app import create_app
from service.observer import ServiceObserver

KEY = "k7Qz9-mR2vXw8-Lp4tNb6"
MARK = "hunter2"
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
Watched = tuple[Service, TestClient, io.BytesIO]


@pytest.fixture
def watched(settings: Settings) -> Generator[Watched]:
    """Return a started application as it ships, a client, and what it writes."""
    stream = io.BytesIO()
    app = create_app(settings, ServiceObserver(settings, stream))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield app, client, stream


def samples(client: TestClient) -> dict[str, dict[frozenset[tuple[str, str]], float]]:
    """Return the series of /metrics: name, then labels without the release."""
    found: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            labels = frozenset((k, v) for k, v in sample.labels.items() if k != "release")
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def value(client: TestClient, metric: str, **labels: str) -> float:
    """Return the sum of the series that have these labels."""
    wanted = set(labels.items())
    return sum(number for found, number in samples(client)[metric].items() if wanted <= found)


def lines(stream: io.BytesIO) -> list[dict[str, Any]]:
    """Return what was written."""
    return [json.loads(line) for line in stream.getvalue().splitlines()]


# --- Series cannot grow -------------------------------------------------------------------------------------------


def wild(rng: np.random.Generator, example: dict[str, Any], method: str | None = None, path: str = "") -> Scope:
    """Return a random request: known and unknown methods and paths, good and bad bodies. The body is in the scope."""

    def word() -> str:
        return str(rng.bytes(int(rng.integers(1, 7))).hex())

    def one_of(*things: Any) -> Any:
        return things[rng.integers(len(things))]

    field = one_of(*PredictRequest.model_fields, word())
    flight = {**example, field: one_of(None, True, -1e9, word(), [], {}, 1e9), one_of(word(), "dest"): "IAH"}
    body = one_of(flight, {"flights": [flight] * int(rng.integers(0, 3))}, example, word())
    headers = [(b"content-type", one_of(b"application/json", b"application/json", word().encode()))]
    headers += [(b"x-request-id", word().encode()), (word().encode(), word().encode())]
    return {
        "type": "http",
        "http_version": "1.1",
        "method": method or one_of("POST", "POST", "GET", word().upper()),
        "path": path or one_of("/v1/predict", "/v1/predict/batch", "/health", "/" + word()),
        "query_string": word().encode(),
        "headers": headers,
        "state": {"body": json.dumps(body).encode()},
    }


async def send_all(app: Service, requests: Iterable[Scope]) -> int:
    """Send requests to the application, one after the other; return how many were answered."""
    answered = 0
    for scope in requests:

        async def receive(body: bytes = scope["state"]["body"]) -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Message) -> None:
            nonlocal answered
            answered += message["type"] == "http.response.start"

        await app(scope, receive, send)
    return answered


def test_ten_thousand_random_requests_make_no_new_series(watched: Watched, example: dict[str, Any]) -> None:
    app, client, _ = watched
    assert client.portal is not None
    rng = np.random.default_rng(11)
    methods = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "BREW"]
    paths = ["/v1/predict", "/v1/predict/batch", "/v1/model", "/health", "/ready", "/metrics", "/nothing"]
    every = [wild(rng, example, method, path) for method in methods for path in paths for _ in range(20)]
    assert client.portal.call(send_all, app, every) == len(every)
    before = {name: set(found) for name, found in samples(client).items()}
    many = [wild(rng, example) for _ in range(10_000)]
    assert client.portal.call(send_all, app, many) == len(many)
    assert len({(scope["method"], scope["path"]) for scope in many}) > 3_000
    after = {name: set(found) for name, found in samples(client).items()}
    assert {name: found - before.get(name, set()) for name, found in after.items() if found != before.get(name)} == {}
    assert sum(map(len, after.values())) < 1_500


def test_the_lists_of_mistakes_are_those_of_the_service() -> None:
    assert set(MISTAKE_REASONS) == set(REASONS)
    assert set(MISTAKE_FIELDS) == {*PredictRequest.model_fields, "flights", "body", "unknown"}


@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        ({"dest": None}, "dest", "wrong_type"),
        ({"humidity_pct": 101}, "humidity_pct", "out_of_range"),
        ({"carrier": "united"}, "carrier", "wrong_form"),
        ({"scheduled_departure": "2013-02-30T10:00"}, "scheduled_departure", "wrong_form"),
        ({"windspeed": 3}, "unknown", "unknown_field"),
    ],
)
def test_a_mistake_is_counted_by_field_and_reason(
    watched: Watched, example: dict[str, Any], change: dict[str, Any], field: str, reason: str
) -> None:
    client = watched[1]
    assert client.post("/v1/predict", json=example | change).status_code == 422
    assert client.post("/v1/predict/batch", json={"flights": [example, example | change]}).status_code == 422
    assert value(client, "model_validation_failures_total", field=field, reason=reason) == 2
    assert value(client, "model_validation_failures_total") == 2


def test_an_absent_field_and_a_body_that_is_no_json(watched: Watched, example: dict[str, Any]) -> None:
    client = watched[1]
    del example["carrier"]
    client.post("/v1/predict", json=example)
    client.post("/v1/predict", content="{", headers={"content-type": "application/json"})
    client.post("/v1/predict/batch", json={"flights": []})
    found = samples(client)["model_validation_failures_total"]
    told = sorted((dict(k)["field"], dict(k)["reason"]) for k, n in found.items() if n)
    assert told == [("body", "not_json"), ("carrier", "missing"), ("flights", "wrong_length")]


# --- Counts are right ---------------------------------------------------------------------------------------------


def test_predictions_are_counted_where_they_fall(watched: Watched, example: dict[str, Any]) -> None:
    client = watched[1]
    answer = client.post("/v1/predict", json={**example, "pressure_mb": None, "dest": "QQQ"}).json()
    batch = client.post("/v1/predict/batch", json={"flights": [example] * 3}).json()["predictions"]
    assert value(client, "model_predictions_total", origin="EWR") == value(client, "model_predictions_total") == 4
    total = answer["probability"] + sum(one["probability"] for one in batch)
    assert value(client, "model_score_sum_total") == pytest.approx(total)
    assert value(client, "model_score_bin_total", origin="EWR") == 4
    assert value(client, "model_missing_values_total", feature="pressure_mb") == 1
    assert value(client, "model_unknown_categories_total", feature="dest") == 1
    assert value(client, "model_feature_bin_total", feature="dest", bin="other") == 1
    assert value(client, "model_feature_bin_total", feature="pressure_mb") == 3
    for name in set(FEATURES) - {"pressure_mb"}:
        assert value(client, "model_feature_bin_total", feature=name) == 4
    assert value(client, "http_requests_total", route="/v1/predict", status="200") == 1
    assert value(client, "http_request_duration_seconds_count", outcome="answered") == 2
    assert value(client, "model_stage_duration_seconds_count", stage="model") == 2


def test_a_refused_flight_is_no_prediction(watched: Watched, example: dict[str, Any]) -> None:
    client = watched[1]
    client.post("/v1/predict", json={**example, "humidity_pct": 101})
    assert value(client, "model_predictions_total") == value(client, "model_feature_bin_total") == 0
    assert value(client, "http_request_duration_seconds_count", outcome="refused") == 1


def test_a_fault_is_a_failure(watched: Watched, example: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Model, row: Row) -> Score:
        raise RuntimeError(MARK)

    monkeypatch.setattr(Model, "score", broken)
    client = watched[1]
    assert client.post("/v1/predict", json=example).status_code == 500
    assert value(client, "http_requests_total", status="500") == 1
    assert value(client, "http_request_duration_seconds_count", outcome="failed") == 1


def test_a_refused_model_is_counted_and_not_ready(settings: Settings) -> None:
    wrong = settings.model_copy(update={"model_digest": "sha256:" + "0" * 64})
    with TestClient(create_app(wrong, ServiceObserver(wrong, io.BytesIO()))) as client:
        assert value(client, "model_load_failures_total") == 1
        assert value(client, "model_ready") == 0
        assert client.get("/ready").status_code == 503


def test_the_release_is_the_one_that_answers(watched: Watched) -> None:
    client = watched[1]
    about = client.get("/v1/model").json()
    text = client.get("/metrics").text
    label = f"{about['service_git_sha'][:7]}-{about['version']}-{about['config']}"
    assert f'release="{label}"' in text
    (info,) = samples(client)["release_info"]
    assert dict(info) == {
        "service_version": about["service_version"],
        "git_sha": about["service_git_sha"],
        "model_version": about["version"],
        "model_digest": about["digest"],
        "config": about["config"],
    }


def test_how_full_it_is(watched: Watched) -> None:
    app, client, _ = watched
    app.runtime.waiting, app.runtime.batches = 7, 2
    assert value(client, "service_requests_waiting") == 7
    assert value(client, "service_batches_in_flight") == 2
    assert value(client, "service_requests_waiting_limit") == app.runtime.settings.max_waiting
    assert value(client, "service_batches_in_flight_limit") == app.runtime.settings.max_batches_waiting


def test_metrics_of_a_real_process(serve: Callable[..., Any], example: dict[str, Any]) -> None:
    """The page has the right type, names the process, and its series grow with requests."""
    running = serve()
    httpx.post(running.url + "/v1/predict", json=example)
    page = httpx.get(running.url + "/metrics")
    assert page.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = {s.name: s.value for f in text_string_to_metric_families(page.text) for s in f.samples}
    assert found["process_resident_memory_bytes"] > 1e7
    assert found["process_start_time_seconds"] > 1.7e9
    assert found["service_event_loop_lag_seconds_count"] > 0
    assert found["model_ready"] == 1
    again = httpx.get(running.url + "/metrics").text
    assert 'http_requests_total{method="GET",release="test-1.0.0-' in again
    assert 'route="/metrics",status="200"} 1.0' in again


# --- Checks are not traffic ---------------------------------------------------------------------------------------


def of_the_model(client: TestClient) -> dict[str, dict[frozenset[tuple[str, str]], float]]:
    """Return what is counted of predictions: inputs, scores, decisions."""
    counted = ("model_feature", "model_score", "model_missing", "model_unknown", "model_predictions")
    return {name: found for name, found in samples(client).items() if name.startswith(counted)}


def test_a_check_is_answered_and_timed_but_is_no_traffic_of_the_model(
    watched: Watched, example: dict[str, Any]
) -> None:
    _, client, stream = watched
    check = {"X-Synthetic": "true"}
    odd = {**example, "dest": "XXX", "temperature_f": None}
    before = of_the_model(client)
    assert client.post("/v1/predict", json=odd, headers=check).status_code == 200
    assert len(client.post("/v1/predict/batch", json={"flights": [odd] * 3}, headers=check).json()["predictions"]) == 3
    assert of_the_model(client) == before
    assert [line.get("synthetic") for line in lines(stream) if line["event"] == "request"][1:3] == [True, True]
    for route in ("/v1/predict", "/v1/predict/batch"):
        assert value(client, "http_requests_total", route=route, status="200") == 1
        assert value(client, "http_synthetic_requests_total", route=route) == 1


@pytest.mark.parametrize("word", ["", "1", "TRUE", "false"])
def test_whoever_does_not_say_so_clearly_is_a_client(watched: Watched, example: dict[str, Any], word: str) -> None:
    _, client, stream = watched
    client.post("/v1/predict", json=example, headers={"X-Synthetic": word})
    assert "synthetic" not in lines(stream)[-1]
    assert value(client, "model_predictions_total") == 1
    assert value(client, "http_synthetic_requests_total") == 0


def test_a_refused_check_counts_as_a_check(watched: Watched) -> None:
    _, client, _ = watched
    assert client.post("/v1/predict", json={}, headers={"X-Synthetic": "true"}).status_code == 422
    assert value(client, "http_synthetic_requests_total", route="/v1/predict") == 1


# --- Traces and events --------------------------------------------------------------------------------------------


def test_a_trace_is_passed_through_and_logged(watched: Watched, example: dict[str, Any]) -> None:
    _, client, stream = watched
    headers = {"traceparent": TRACE}
    for answer in (client.post("/v1/predict", json=example, headers=headers), client.get("/v1/model", headers=headers)):
        assert answer.headers["traceparent"] == TRACE
    assert [line.get("trace") for line in lines(stream)[1:]] == [TRACE, TRACE]


@pytest.mark.parametrize(
    "wrong",
    [
        MARK,
        TRACE.upper(),
        TRACE + "-00",
        "01" + TRACE[2:],
        "00-" + "0" * 32 + TRACE[35:],
        TRACE[:36] + "0" * 16 + "-01",
    ],
)
def test_a_wrong_trace_is_ignored(watched: Watched, example: dict[str, Any], wrong: str) -> None:
    _, client, stream = watched
    answer = client.post("/v1/predict", json=example, headers={"traceparent": wrong})
    assert answer.status_code == 200
    assert "traceparent" not in answer.headers
    assert "trace" not in lines(stream)[-1]


def test_prediction_events_are_off_unless_asked_for(watched: Watched, example: dict[str, Any]) -> None:
    _, client, stream = watched
    client.post("/v1/predict", json=example)
    assert [line["event"] for line in lines(stream)] == ["model_loaded", "request"]


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_a_share_of_the_predictions_is_written_one_by_one(
    settings: Settings, example: dict[str, Any], share: float
) -> None:
    rng = np.random.default_rng(5)
    stream, ids = io.BytesIO(), [rng.bytes(16).hex() for _ in range(60)]
    own = settings.model_copy(update={"event_share": share})
    with TestClient(create_app(own, ServiceObserver(own, stream))) as client:
        batch = {"flights": [{**example, "request_id": name} for name in ids[:50]]}
        answers = client.post("/v1/predict/batch", json=batch).json()["predictions"]
        answers += [client.post("/v1/predict", json={**example, "request_id": name}).json() for name in ids[50:]]
    events = [line for line in lines(stream) if line["event"] == "prediction"]
    assert [e["request_id"] for e in events] == [name for name in ids if is_sampled(name, share)]
    by_id = {answer["request_id"]: answer for answer in answers}
    for event in events:
        answer = by_id[event["request_id"]]
        assert event["probability"] == answer["probability"]
        assert event["disrupted"] == (answer["prediction"] == "disrupted")
        assert event["origin"] == "EWR"
        assert event["model"] == answer["model_version"]


# --- Nothing that was sent ----------------------------------------------------------------------------------------


def test_no_planted_secret_is_written_or_exposed(
    settings: Settings, example: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text of a client in every place where it can be, through every kind of error; then search all output."""
    stream = io.BytesIO()
    own = settings.model_copy(update={"api_key": SecretStr(KEY), "event_share": 1.0})
    good, json_type = {"X-API-Key": KEY}, {"content-type": "application/json"}
    with TestClient(create_app(own, ServiceObserver(own, stream)), raise_server_exceptions=False) as client:
        statuses = set()

        def send(method: str, path: str, **more: Any) -> None:
            more["headers"] = {**good, **more.get("headers", {})}
            statuses.add(client.request(method, path, **more).status_code)

        for field in PredictRequest.model_fields:
            for wrong in (MARK, [MARK], {MARK: MARK}):
                send("POST", "/v1/predict", json={**example, field: wrong})
                send("POST", "/v1/predict/batch", json={"flights": [{**example, field: wrong}]})
        send("POST", "/v1/predict", json={**example, MARK: MARK})
        send("POST", f"/v1/predict?{MARK}={MARK}", json=example, headers={"X-Request-ID": MARK, "traceparent": MARK})
        send("POST", "/v1/predict", content=MARK, headers=json_type)
        send("POST", "/v1/predict", content=json.dumps(MARK * 9_000), headers=json_type)
        send("POST", "/v1/predict", content="{}", headers={"content-type": MARK})
        send("POST", "/v1/predict", json=example, headers={"X-API-Key": MARK})
        send("POST", "/v1/predict", json=example, headers={"cookie": MARK, "authorization": MARK, "user-agent": MARK})
        send("GET", f"/{MARK}/{KEY}?{MARK}")
        send("PUT", "/v1/predict", content=MARK)
        send(MARK, "/v1/predict")

        def broken(self: Model, row: Row) -> Score:
            raise KeyError(f"{MARK} {KEY} {row}")

        monkeypatch.setattr(Model, "score", broken)
        send("POST", "/v1/predict", json=example)
        page = client.get("/metrics").text
    assert statuses >= {200, 401, 404, 405, 413, 415, 422, 500}
    text = stream.getvalue().decode() + page
    for planted in (MARK, KEY):
        assert planted not in text
    assert str(example["temperature_f"]) not in stream.getvalue().decode()
    written = lines(stream)
    assert {name for line in written for name in line} <= set(LOG_FIELDS)
    assert "failed" in {line["event"] for line in written}


def test_the_search_would_find_a_secret(settings: Settings) -> None:
    """The same search, over a log that leaks: it has to be able to fail."""
    stream = io.BytesIO()
    observer = ServiceObserver(settings, stream)
    observer._log.info("request", message=MARK)
    assert MARK in stream.getvalue().decode()
