"""The application, in this process: what it answers to good requests, to bad ones, and to hostile ones."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from fastapi.testclient import TestClient

from mlops_course.blueprint import INPUTS
from mlops_course.serving import (
    DIRECT,
    Call,
    FieldError,
    InvalidInput,
    Model,
    NullObserver,
    Prediction,
    Problem,
    Row,
    Runtime,
    Score,
    Service,
    Settings,
    bounded,
    build_app,
    reason_of,
    translated,
    turned_away,
)

JSON = {"content-type": "application/json"}
MARK = "hunter2"  # stands for something that must never be repeated
KEY = "k7Qz9-mR2vXw8-Lp4tNb6"


def body(example: dict[str, Any], **changes: Any) -> bytes:
    """Return the example as JSON, with changes. Python's writer lets NaN and Infinity through."""
    return json.dumps({**example, **changes}).encode()


def check_problem(response: Any, status: int, kind: str) -> dict[str, Any]:
    """Assert the shape that every error has, and return it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    found = Problem.model_validate_json(response.content).model_dump()
    assert found["type"] == f"urn:flight-disruption:problem:{kind}"
    assert found["status"] == status
    assert found["request_id"] == response.headers["x-request-id"]
    assert MARK not in response.text
    return found


def test_an_answer_has_the_documented_fields_and_native_types(client: TestClient, example: dict[str, Any]) -> None:
    response = client.post("/v1/predict", json=example)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    answer = response.json()
    assert list(answer) == ["request_id", "prediction", "probability", "threshold", "model_version"]
    Prediction.model_validate_json(response.content, strict=True)
    assert type(answer["probability"]) is float
    assert answer["probability"] == round(answer["probability"], 4)
    assert answer["prediction"] == ("disrupted" if answer["probability"] >= answer["threshold"] else "on_time")
    assert answer["request_id"] == response.headers["x-request-id"]


REQUIRED = ["carrier", "origin", "dest", "scheduled_departure", "distance_miles"]


@pytest.mark.parametrize("name", REQUIRED)
def test_a_required_field_is_required(client: TestClient, example: dict[str, Any], name: str) -> None:
    del example[name]
    found = check_problem(client.post("/v1/predict", json=example), 422, "invalid-input")
    assert [(e["field"], e["problem"]) for e in found["errors"]] == [(name, "is missing")]


@pytest.mark.parametrize("name", [c.name for c in INPUTS if c.nullable])
def test_a_nullable_field_may_be_null_or_left_out(client: TestClient, example: dict[str, Any], name: str) -> None:
    example[name] = None
    null = client.post("/v1/predict", json=example).json()["probability"]
    del example[name]
    assert client.post("/v1/predict", json=example).json()["probability"] == null


@pytest.mark.parametrize("column", [c for c in INPUTS if c.kind == "number"], ids=lambda c: c.name)
def test_the_range_of_a_number_is_the_contracts(client: TestClient, example: dict[str, Any], column: Any) -> None:
    for value in (column.low, column.high):
        assert client.post("/v1/predict", json={**example, column.name: value}).status_code == 200
    for value in (column.low - 0.001, column.high + 0.001):
        found = check_problem(client.post("/v1/predict", json={**example, column.name: value}), 422, "invalid-input")
        assert found["errors"][0]["field"] == column.name
        assert f"from {column.low:g} to {column.high:g}" in found["errors"][0]["fix"]


NO_TIME = "is not an existing local time without offset"
BAD_VALUES = {
    "nan": ("temperature_f", float("nan"), "is not a finite number"),
    "infinity": ("temperature_f", float("inf"), "is not a finite number"),
    "minus infinity": ("distance_miles", float("-inf"), "is not a finite number"),
    "a number of 400 digits": ("distance_miles", 10**400, "is not a finite number"),
    "true": ("humidity_pct", True, "is not a number"),
    "text": ("humidity_pct", MARK, "is not a number"),
    "digits as text": ("humidity_pct", "76", "is not a number"),
    "a list": ("humidity_pct", [MARK, float("nan")], "is not a number"),
    "an object": ("humidity_pct", {MARK: MARK}, "is not a number"),
    "null where it is required": ("distance_miles", None, "is not a number"),
    "a number for a carrier": ("carrier", 11, "is not text"),
    "a small carrier": ("carrier", "ua", "has the wrong form"),
    "a carrier with a line break": ("carrier", "UA\n", "has the wrong form"),
    "a long destination": ("dest", MARK, "has the wrong form"),
    "a destination in other digits": ("dest", "١٢٣", "has the wrong form"),
    "another origin": ("origin", "BOS", "is not one of the allowed values"),
    "an offset": ("scheduled_departure", "2013-09-12T17:29+02:00", NO_TIME),
    "UTC": ("scheduled_departure", "2013-09-12T17:29Z", NO_TIME),
    "a timestamp": ("scheduled_departure", 1379000000, NO_TIME),
    "a day that is not": ("scheduled_departure", "2013-02-29T10:00", NO_TIME),
    "the year 9999": ("scheduled_departure", "9999-12-31T23:59", NO_TIME),
    "a date alone": ("scheduled_departure", "2013-09-12", NO_TIME),
    "a line break at the end": ("scheduled_departure", "2013-09-12T17:29\n", NO_TIME),
    "other digits": ("scheduled_departure", "٢٠١٣-09-12T17:29", NO_TIME),
    "an id that is a number": ("request_id", 7, "is not text"),
}


@pytest.mark.parametrize(("name", "value", "problem"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_a_bad_value_is_refused_with_its_field(
    client: TestClient, example: dict[str, Any], name: str, value: Any, problem: str
) -> None:
    response = client.post("/v1/predict", content=body(example, **{name: value}), headers=JSON)
    found = check_problem(response, 422, "invalid-input")
    assert [(e["field"], e["problem"]) for e in found["errors"]] == [(name, problem)]
    assert found["errors"][0]["fix"].startswith("send ")


BAD_BODIES = {
    "empty": b"",
    "half": b'{"carrier": "UA"',
    "two objects": b"{}{}",
    "a list": b"[]",
    "null": b"null",
    "text": b'"hunter2"',
    "invalid UTF-8": b'{"carrier": "\xff\xfe"}',
    "half a surrogate": b'{"carrier": "\\ud800"}',
    "deep nesting": b"[" * 8_000,
    "deep nesting in a field": b'{"carrier": ' + b'{"a":' * 2_000 + b"1" + b"}" * 2_000 + b"}",
    "1e999": b'{"distance_miles": 1e999}',
    "nested NaN": b'{"x": {"y": [NaN, {"z": Infinity}]}}',
    "a null byte": b'\x00{"carrier": "UA"}',
}


@pytest.mark.parametrize("content", BAD_BODIES.values(), ids=BAD_BODIES)
@pytest.mark.parametrize("path", ["/v1/predict", "/v1/predict/batch"])
def test_a_body_that_is_no_request_is_refused(client: TestClient, path: str, content: bytes) -> None:
    found = check_problem(client.post(path, content=content, headers=JSON), 422, "invalid-input")
    assert found["errors"]


def test_an_empty_body_is_called_empty(client: TestClient) -> None:
    found = check_problem(client.post("/v1/predict", content=b"", headers=JSON), 422, "invalid-input")
    assert [(e["field"], e["problem"]) for e in found["errors"]] == [("body", "is empty, so it is not JSON")]
    assert reason_of(FieldError.model_validate(found["errors"][0])) == "not_json"


def test_advice_does_not_name_what_the_door_hides(client: TestClient, example: dict[str, Any]) -> None:
    """/openapi.json is 404 behind Envoy, so no answer may send a client there."""
    unknown = client.post("/v1/predict", json={**example, "surprise": 1})
    for answer in (unknown, client.post("/v1/predict", content=b"{", headers=JSON), client.get("/v1/nothing")):
        assert "docs/api.md" in answer.text
        assert "openapi.json" not in answer.text


def test_an_unknown_field_is_refused_but_not_repeated(client: TestClient, example: dict[str, Any]) -> None:
    found = check_problem(client.post("/v1/predict", json={**example, MARK: MARK}), 422, "invalid-input")
    assert [e["field"] for e in found["errors"]] == ["(unknown)"]
    typo = client.post("/v1/predict", json={**example, "humidty_pct": 5})
    assert typo.json()["errors"][0]["fix"] == "did you mean humidity_pct?"


def test_twenty_mistakes_are_listed(client: TestClient, example: dict[str, Any]) -> None:
    twenty = {f"{MARK}{number}": 1 for number in range(20)}
    found = check_problem(client.post("/v1/predict", json={**example, **twenty}), 422, "invalid-input")
    assert len(found["errors"]) == 20


@pytest.mark.parametrize("count", [21, 90_000])
def test_more_mistakes_are_not_even_described(
    client: TestClient, example: dict[str, Any], monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    described: list[object] = []
    monkeypatch.setattr("mlops_course.serving.field_errors", described.append)
    flight = {**example, **{f"k{number}": 1 for number in range(count)}}
    path, sent = ("/v1/predict", flight) if count < 100 else ("/v1/predict/batch", {"flights": [flight]})
    found = check_problem(
        client.post(path, content=json.dumps(sent, separators=(",", ":")), headers=JSON), 422, "invalid-input"
    )
    assert [(e["field"], e["problem"]) for e in found["errors"]] == [("body", "has more than 20 mistakes")]
    assert described == []


def test_an_unknown_carrier_and_destination_are_answered(client: TestClient, example: dict[str, Any]) -> None:
    assert client.post("/v1/predict", json={**example, "carrier": "Z9", "dest": "QQQ"}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/v1/predict", 405, "method-not-allowed"),
        ("PUT", "/v1/predict/batch", 405, "method-not-allowed"),
        ("POST", "/health", 405, "method-not-allowed"),
        ("POST", "/v1/predict/", 404, "not-found"),
        ("GET", "/v2/predict", 404, "not-found"),
        ("GET", "/metrics", 404, "not-found"),
        ("GET", "/hunter2", 404, "not-found"),
        ("GET", "/v1/predict/%2e%2e/hunter2", 404, "not-found"),
    ],
)
def test_wrong_paths_and_methods(client: TestClient, method: str, path: str, status: int, kind: str) -> None:
    response = client.request(method, path)
    check_problem(response, status, kind)
    assert (status == 405) == ("allow" in response.headers)


@pytest.mark.parametrize("media", ["text/plain", "application/x-www-form-urlencoded", "application/jsonp", ""])
def test_a_body_must_say_that_it_is_json(client: TestClient, example: dict[str, Any], media: str) -> None:
    response = client.post("/v1/predict", content=body(example), headers={"content-type": media} if media else {})
    check_problem(response, 415, "unsupported-media-type")


def test_a_compressed_body_is_refused(client: TestClient, example: dict[str, Any]) -> None:
    response = client.post("/v1/predict", content=body(example), headers={**JSON, "content-encoding": "gzip"})
    check_problem(response, 415, "unsupported-media-type")


@pytest.mark.parametrize("length", ["-1", "+5", "ten", "1.5"])
def test_a_length_that_is_no_number_is_refused(client: TestClient, example: dict[str, Any], length: str) -> None:
    response = client.post("/v1/predict", content=body(example), headers={**JSON, "content-length": length})
    check_problem(response, 400, "not-http")


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_probes_may_ask_for_the_head_only(client: TestClient, path: str) -> None:
    assert client.head(path).status_code == 200


@pytest.mark.parametrize("path", ["/redoc", "/docs/oauth2-redirect"])
def test_there_is_one_page_of_documentation(client: TestClient, path: str) -> None:
    assert client.get("/docs").status_code == 200
    check_problem(client.get(path), 404, "not-found")


def test_fastapis_own_refusal_is_invalid_input() -> None:
    assert isinstance(translated(RequestValidationError([])), InvalidInput)


def test_json_may_name_its_charset(client: TestClient, example: dict[str, Any]) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert client.post("/v1/predict", content=body(example), headers=headers).status_code == 200


def test_a_body_above_the_limit_is_refused_declared_or_not(client: TestClient, example: dict[str, Any]) -> None:
    large = body(example, request_id=MARK * 4_000)

    def chunks() -> Any:
        yield large[:9_000]
        yield large[9_000:]

    check_problem(client.post("/v1/predict", content=large, headers=JSON), 413, "too-large")
    check_problem(client.post("/v1/predict", content=chunks(), headers=JSON), 413, "too-large")
    odd = {**JSON, "content-length": "9" * 5_000}
    check_problem(client.post("/v1/predict", content=large, headers=odd), 413, "too-large")


# Request ids

HEX, DASHED = "0123456789abcdef" * 2, "6F1C2A9E-8a44-4c55-9d0e-1f2a3b4c5d6e"


@pytest.mark.parametrize("good", [HEX, DASHED])
def test_a_good_id_is_kept_and_the_header_wins(client: TestClient, example: dict[str, Any], good: str) -> None:
    in_body = client.post("/v1/predict", json={**example, "request_id": good})
    assert (in_body.json()["request_id"], in_body.headers["x-request-id"]) == (good, good)
    both = client.post("/v1/predict", json={**example, "request_id": "0" * 32}, headers={"X-Request-ID": good})
    assert (both.json()["request_id"], both.headers["x-request-id"]) == (good, good)


@pytest.mark.parametrize("bad", ["42", "x" * 32, HEX + "0", HEX + "\t", "\x00" * 32, "<script>", "../../etc", "é" * 32])
def test_any_other_id_is_replaced(client: TestClient, example: dict[str, Any], bad: str) -> None:
    answer = client.post("/v1/predict", json={**example, "request_id": bad})
    assert answer.status_code == 200
    assert len(answer.json()["request_id"]) == 32
    header = client.post("/v1/predict", json=example, headers={b"X-Request-ID": bad.encode()})
    assert header.json()["request_id"] != bad


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/model", "/nothing", "/openapi.json"])
def test_every_answer_carries_an_id(client: TestClient, path: str) -> None:
    assert client.get(path, headers={"X-Request-ID": HEX}).headers["x-request-id"] == HEX
    assert client.get(path).headers["x-request-id"] != client.get(path).headers["x-request-id"]


# Batches


def test_a_batch_is_answered_in_order_like_single_requests(client: TestClient, example: dict[str, Any]) -> None:
    flights = [{**example, "recent_origin_delay_min": m, "request_id": f"{m:032x}"} for m in range(40)]
    answer = client.post("/v1/predict/batch", json={"flights": flights}, headers={"X-Request-ID": HEX}).json()
    assert answer["request_id"] == HEX
    assert answer["predictions"] == [client.post("/v1/predict", json=flight).json() for flight in flights]


def test_a_batch_names_the_place_of_a_mistake(client: TestClient, example: dict[str, Any]) -> None:
    flights = [example, example, {**example, "dest": MARK}]
    found = check_problem(client.post("/v1/predict/batch", json={"flights": flights}), 422, "invalid-input")
    assert [e["field"] for e in found["errors"]] == ["flights[2].dest"]
    odd = check_problem(client.post("/v1/predict/batch", json={"flights": [example, MARK]}), 422, "invalid-input")
    assert [e["field"] for e in odd["errors"]] == ["flights[1]"]


@pytest.mark.parametrize("count", [0, 1_001])
def test_a_batch_has_at_least_one_flight_and_at_most_a_thousand(
    client: TestClient, example: dict[str, Any], count: int
) -> None:
    found = check_problem(client.post("/v1/predict/batch", json={"flights": [example] * count}), 422, "invalid-input")
    assert [e["field"] for e in found["errors"]] == ["flights"]


def test_a_batch_of_a_thousand_is_answered(client: TestClient, example: dict[str, Any]) -> None:
    answer = client.post("/v1/predict/batch", json={"flights": [example] * 1_000})
    assert answer.status_code == 200
    assert len(answer.json()["predictions"]) == 1_000


def test_a_deployment_may_allow_smaller_batches(settings: Settings, example: dict[str, Any]) -> None:
    app = build_app(settings.model_copy(update={"max_batch": 2}))
    assert app.openapi()["components"]["schemas"]["BatchRequest"]["properties"]["flights"]["maxItems"] == 2
    with TestClient(app) as client:
        found = check_problem(client.post("/v1/predict/batch", json={"flights": [example] * 3}), 422, "invalid-input")
    assert found["errors"][0]["fix"] == "send at most 2 flights"


def test_batches_beyond_the_queue_are_refused(client: TestClient, app: Service, example: dict[str, Any]) -> None:
    app.runtime.batches = app.runtime.settings.max_batches_waiting
    response = client.post("/v1/predict/batch", json={"flights": [example]})
    check_problem(response, 503, "overloaded")
    assert response.headers["retry-after"] == "1"
    app.runtime.batches = 0
    assert client.post("/v1/predict/batch", json={"flights": [example]}).status_code == 200
    assert app.runtime.batches == 0


# The key


@pytest.mark.parametrize(("method", "path"), [*DIRECT, ("GET", "/v1/model"), ("GET", "/v1/nothing")])
@pytest.mark.parametrize("key", [None, "", "wrong", KEY[:-1], KEY + "x", KEY.lower()])
def test_v1_is_closed_without_the_key(settings: Settings, method: str, path: str, key: str | None) -> None:
    from pydantic import SecretStr

    app = build_app(settings.model_copy(update={"api_key": SecretStr(KEY)}))
    with TestClient(app) as client:
        headers = {} if key is None else {"X-API-Key": key}
        response = client.request(method, path, headers=headers)
        check_problem(response, 401, "unauthorised")
        assert response.headers["www-authenticate"]
        assert KEY not in response.text


def test_the_key_opens_v1_and_probes_need_none(settings: Settings, example: dict[str, Any]) -> None:
    from pydantic import SecretStr

    app = build_app(settings.model_copy(update={"api_key": SecretStr(KEY)}))
    with TestClient(app, headers={"X-API-Key": KEY}) as client:
        assert client.post("/v1/predict", json=example).status_code == 200
        assert client.get("/v1/model").status_code == 200
    with TestClient(app) as client:
        assert [client.get(path).status_code for path in ("/health", "/ready", "/openapi.json")] == [200] * 3


# The model, readiness, overload


def test_the_served_model_says_who_it_is(client: TestClient, release: tuple[Any, str]) -> None:
    about = client.get("/v1/model").json()
    assert about["digest"] == release[1]
    assert about["version"] == release[0].name
    assert about["inputs"] == [column.name for column in INPUTS]
    assert "minute_of_day" not in about["inputs"]
    assert about["config"]


def test_without_a_model_the_service_is_alive_and_not_ready(settings: Settings, example: dict[str, Any]) -> None:
    app = build_app(settings.model_copy(update={"model_digest": "sha256:" + "0" * 64}))
    with TestClient(app) as client:
        assert client.get("/health").status_code == 200
        reason = check_problem(client.get("/ready"), 503, "not-ready")["detail"]
        assert "expected sha256:0000" in reason
        for answer in (client.post("/v1/predict", json=example), client.get("/v1/model")):
            check_problem(answer, 503, "not-ready")
            assert answer.headers["retry-after"] == "5"


@pytest.mark.parametrize("path", ["/v1/predict", "/v1/predict/batch", "/v1/model", "/openapi.json", "/nothing"])
def test_when_enough_wait_the_next_is_turned_away(app: Service, path: str) -> None:
    scope = {"type": "http", "method": "POST", "path": path, "headers": [(b"x-request-id", HEX.encode())]}
    app.runtime.waiting = app.runtime.settings.max_waiting - 1
    assert turned_away(app.runtime, scope) is None
    app.runtime.waiting += 1
    refusal = turned_away(app.runtime, scope)
    assert refusal is not None
    call, answer = refusal
    assert (answer.status, dict(answer.headers)[b"retry-after"]) == (503, b"1")
    assert json.loads(answer.body)["request_id"] == call.request_id == HEX
    assert (call.problem, call.route) == ("overloaded", "unmatched" if path == "/nothing" else path)


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics"])
def test_probes_are_never_turned_away(app: Service, path: str) -> None:
    app.runtime.waiting = 10**9
    assert turned_away(app.runtime, {"type": "http", "method": "GET", "path": path, "headers": []}) is None


def test_while_draining_the_service_answers_and_asks_to_go(
    client: TestClient, app: Service, example: dict[str, Any]
) -> None:
    app.runtime.draining = True
    check_problem(client.get("/ready"), 503, "not-ready")
    for response in (client.post("/v1/predict", json=example), client.get("/health")):
        assert (response.status_code, response.headers["connection"]) == (200, "close")


# Both doors, faults, observers


def test_the_direct_way_and_fastapi_give_the_same_answers(settings: Settings, example: dict[str, Any]) -> None:
    corpus = [*BAD_BODIES.values(), body(example), body(example, dest=MARK), b"9" * 20_000]
    found: list[list[tuple[int, str, Any]]] = []
    for direct in (True, False):
        app = build_app(settings)
        app.direct = direct
        with TestClient(app) as client:
            answers = [client.post("/v1/predict", content=c, headers=JSON | {"X-Request-ID": HEX}) for c in corpus]
        found.append([(a.status_code, a.headers["content-type"], a.json()) for a in answers])
    assert found[0] == found[1]


class Recorder(NullObserver):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.errors: list[Exception] = []
        self.scores: list[Score] = []
        self.lags = 0

    def scored(self, call: Call, ids: Any, rows: Any, scores: Any) -> None:  # noqa: ARG002 - the protocol
        self.scores += scores

    def answered(self, call: Call) -> None:
        self.calls.append(call)

    def failed(self, call: Call, error: Exception) -> None:  # noqa: ARG002 - the protocol
        self.errors.append(error)

    def lag(self, seconds: float) -> None:  # noqa: ARG002 - the protocol
        self.lags += 1

    def exposition(self) -> tuple[bytes, str] | None:
        return b"one 1\n", "text/plain; version=0.0.4"


def test_a_fault_of_the_service_is_a_problem_with_an_id_and_no_text(
    settings: Settings, example: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Model, row: Row) -> Score:
        raise RuntimeError(f"{MARK} {row}")

    monkeypatch.setattr(Model, "score", broken)
    observer = Recorder()
    for direct in (True, False):
        app = build_app(settings, observer)
        app.direct = direct
        with TestClient(app) as client:
            found = check_problem(client.post("/v1/predict", json=example), 500, "internal")
    assert "report the request id" in found["detail"]
    assert [type(error) for error in observer.errors] == [RuntimeError, RuntimeError]


def test_a_fault_in_another_route_is_a_problem_too(settings: Settings) -> None:
    observer = Recorder()
    app = build_app(settings, observer)

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError(MARK)

    with TestClient(app) as client:
        check_problem(client.get("/broken"), 500, "internal")
    assert len(observer.errors) == 1


def test_the_observer_hears_of_every_request_and_of_no_value(settings: Settings, example: dict[str, Any]) -> None:
    observer = Recorder()
    with TestClient(build_app(settings, observer)) as client:
        client.post("/v1/predict", json={**example, "request_id": HEX})
        client.post("/v1/predict", json={**example, "dest": MARK})
        client.get(f"/{MARK}")
        client.request(MARK, "/health")
        client.post("/v1/predict/batch", json={"flights": [example] * 3})
        assert client.get("/metrics").text == "one 1\n"
    told = [(c.method, c.route, c.status, c.problem, c.rows) for c in observer.calls]
    assert told == [
        ("POST", "/v1/predict", 200, "", 1),
        ("POST", "/v1/predict", 422, "invalid-input", 0),
        ("GET", "unmatched", 404, "not-found", 0),
        ("OTHER", "/health", 405, "method-not-allowed", 0),
        ("POST", "/v1/predict/batch", 200, "", 3),
        ("GET", "/metrics", 200, "", 0),
    ]
    assert MARK not in repr(observer.calls)
    assert observer.calls[0].request_id == HEX
    assert observer.calls[1].mistakes == (("dest", "wrong_form"),)
    assert all(stage >= 0 for stage in observer.calls[0].stages or ())
    assert len(observer.scores) == 4


def test_every_route_has_a_name_for_logs_and_metrics(app: Service) -> None:
    for path in (*app.openapi()["paths"], "/metrics"):
        assert bounded("GET", path) == ("GET", path)
    assert bounded(MARK, f"/{MARK}") == ("OTHER", "unmatched")


def drive(app: Service, messages: list[dict[str, Any]], wait: float = 0.0) -> list[dict[str, Any]]:
    """Send a request's messages to the application as a server would; return what it sends."""
    sent: list[dict[str, Any]] = []

    async def stream() -> AsyncIterator[dict[str, Any]]:
        for message in messages:
            yield message
        await asyncio.sleep(wait)
        yield {"type": "http.disconnect"}

    async def run() -> None:
        source = stream()

        async def receive() -> Any:
            return await anext(source)

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/predict", "headers": headers, "state": {}}
        async with app.router.lifespan_context(app):
            await app(scope, receive, send)

    asyncio.run(run())
    return sent


def test_a_slow_body_is_answered_with_408(settings: Settings) -> None:
    app = build_app(settings.model_copy(update={"body_timeout_s": 0.05}))
    sent = drive(app, [{"type": "http.request", "body": b"{", "more_body": True}], wait=5)
    assert sent[0]["status"] == 408
    assert json.loads(sent[1]["body"])["type"].endswith("slow-body")


def test_a_client_that_leaves_gets_no_answer_and_is_counted(settings: Settings) -> None:
    observer = Recorder()
    assert drive(build_app(settings, observer), [{"type": "http.request", "body": b"{", "more_body": True}]) == []
    assert [(c.status, c.problem) for c in observer.calls] == [(499, "client-gone")]


def test_slow_batches_hold_no_place(settings: Settings, example: dict[str, Any]) -> None:
    """Four clients that never finish their bodies, and a fifth that is answered meanwhile."""

    async def live() -> list[Any]:
        app = build_app(settings)
        head = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/predict/batch", "headers": head, "state": {}}
        sent: list[Any] = []

        async def slow() -> Any:
            await asyncio.sleep(30)

        async def whole() -> Any:
            return {"type": "http.request", "body": json.dumps({"flights": [example]}).encode()}

        async def send(message: Any) -> None:
            sent.append(message)

        async with app.router.lifespan_context(app):
            stuck = [asyncio.create_task(app(dict(scope), slow, send)) for _ in range(settings.max_batches_waiting)]
            await asyncio.sleep(0)
            await app(dict(scope), whole, send)
            for task in stuck:
                task.cancel()
            await asyncio.gather(*stuck, return_exceptions=True)
        return sent

    assert asyncio.run(live())[0]["status"] == 200


def test_the_event_loop_is_watched(settings: Settings) -> None:
    observer = Recorder()

    async def live() -> None:
        app = build_app(settings, observer)
        async with app.router.lifespan_context(app):
            await asyncio.sleep(0.1)

    asyncio.run(live())
    assert observer.lags > 0


def test_a_runtime_starts_without_a_model(settings: Settings) -> None:
    assert Runtime(settings, NullObserver()).model is None


# Each field, and what it must not be

WRONG: dict[str, list[Any]] = {
    "number": [True, False, MARK, "1", [], [1], {}, {MARK: 1}, float("nan"), float("inf"), -(10**30), 10**30],
    "category": [True, 1, 1.5, [], ["UA"], {}, {MARK: 1}, None, "", " ", MARK, "UA IAH", "\x00", "\u202e", "x" * 9_000],
    "datetime": [
        *(
            True,
            1,
            [],
            {},
            None,
            "",
            MARK,
            "now",
            "2013-09-12T17:29+00:00",
            "2013-09-12T17:29-0400",
            "0001-01-01T00:00",
        ),
        *("2013-13-01T10:00", "2013-09-12T24:00", "2013-09-12T17:60", "2013-06-30T23:59:60", "-2013-09-12T17:29"),
    ],
}


@pytest.mark.parametrize("column", INPUTS, ids=lambda column: column.name)
def test_every_field_refuses_what_it_must_not_be(client: TestClient, example: dict[str, Any], column: Any) -> None:
    name = column.name
    for value in WRONG[column.kind]:
        response = client.post("/v1/predict", content=body(example, **{name: value}), headers=JSON)
        found = check_problem(response, 422, "invalid-input")
        assert {error["field"] for error in found["errors"]} == {name}, value
        many = {"flights": [example, {**example, name: value}]}
        response = client.post("/v1/predict/batch", content=json.dumps(many).encode(), headers=JSON)
        found = check_problem(response, 422, "invalid-input")
        assert {error["field"] for error in found["errors"]} == {f"flights[1].{name}"}, value


@pytest.mark.parametrize("flights", [None, True, 1, MARK, {}, [None], [[]], [MARK], [[{}]]])
def test_a_batch_that_is_no_list_of_flights_is_refused(client: TestClient, flights: Any) -> None:
    found = check_problem(client.post("/v1/predict/batch", json={"flights": flights}), 422, "invalid-input")
    assert found["errors"][0]["field"] in ("flights", "flights[0]")


def test_a_batch_of_the_largest_size_may_be_wrong_in_its_last_place(
    client: TestClient, example: dict[str, Any]
) -> None:
    flights = [example] * 999 + [{**example, "humidity_pct": True}]
    found = check_problem(client.post("/v1/predict/batch", json={"flights": flights}), 422, "invalid-input")
    assert [error["field"] for error in found["errors"]] == ["flights[999].humidity_pct"]


def test_the_observer_hears_of_an_unknown_carrier_and_destination(settings: Settings, example: dict[str, Any]) -> None:
    told: list[Row] = []

    class Listener(NullObserver):
        def scored(self, call: Call, ids: Any, rows: Any, scores: Any) -> None:  # noqa: ARG002 - the protocol
            told.extend(rows)

    odd = {**example, "carrier": "Z9", "dest": "QQQ"}
    with TestClient(build_app(settings, Listener())) as client:
        assert client.post("/v1/predict", json=odd).status_code == 200
        assert client.post("/v1/predict/batch", json={"flights": [example, odd]}).status_code == 200
    assert [row[0] for row in told] == [("Z9", "EWR", "QQQ"), ("UA", "EWR", "IAH"), ("Z9", "EWR", "QQQ")]
