"""The contract: the committed OpenAPI document, what breaks it, and what a client may rely on.

`breaking_changes` compares two OpenAPI documents from a client's side. It is itself tested both ways.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from mlops_course.blueprint import COLUMNS, INPUTS, canonical_json
from mlops_course.serving import ERRORS, Service
from service.app import openapi_document

Json = dict[str, Any]


def resolve(document: Json, schema: Json) -> Json:
    """Follow a reference inside the document."""
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def kinds(document: Json, schema: Json) -> dict[str, Json]:
    """Return the alternatives of a schema by their type: `number | null` has two."""
    schema = resolve(document, schema)
    parts = [resolve(document, part) for part in schema.get("anyOf", [schema])]
    return {str(part.get("type", "any")): part for part in parts}


def narrower(old: Json, new: Json) -> Iterator[str]:
    """Yield what `new` no longer allows, compared with `old`, for one alternative."""
    for key, worse in (("minimum", 1), ("minItems", 1), ("minLength", 1), ("maximum", -1), ("maxItems", -1)):
        if key in new and (key not in old or (new[key] - old[key]) * worse > 0):
            yield f"{key} is narrower"
    allowed: set[Any] = set(new.get("enum", ()))
    if allowed and ("enum" not in old or set(old["enum"]) - allowed):
        yield "a value is no longer allowed"
    if new.get("pattern") not in (None, old.get("pattern")):
        yield "the pattern changed"


def schema_breaks(old_doc: Json, old: Json, new_doc: Json, new: Json, where: str, sent: bool) -> Iterator[str]:
    """Yield what breaks: for what a client sends, anything narrower; for what it receives, anything wider."""
    before, after = kinds(old_doc, old), kinds(new_doc, new)
    lost, gained = set(before) - set(after), set(after) - set(before)
    if lost if sent else gained:
        yield f"{where}: the type changed"
    for kind in set(before) & set(after):
        one, two = before[kind], after[kind]
        yield from (f"{where}: {text}" for text in (narrower(one, two) if sent else narrower(two, one)))
        if "items" in one:
            yield from schema_breaks(old_doc, one["items"], new_doc, two.get("items", {}), where + "[]", sent)
        yield from object_breaks(old_doc, one, new_doc, two, where, sent)


def object_breaks(old_doc: Json, old: Json, new_doc: Json, new: Json, where: str, sent: bool) -> Iterator[str]:
    """Yield what breaks in the fields of an object."""
    required = (set(old.get("required", ())), set(new.get("required", ())))
    for name, schema in old.get("properties", {}).items():
        if name not in new.get("properties", {}):
            yield f"{where}.{name}: removed"
        else:
            yield from schema_breaks(old_doc, schema, new_doc, new["properties"][name], f"{where}.{name}", sent)
    for name in sorted((required[1] - required[0]) if sent else (required[0] - required[1])):
        if sent or name in new.get("properties", {}):
            yield f"{where}.{name}: {'newly required' if sent else 'no longer always there'}"


def operations(document: Json) -> dict[str, Json]:
    """Return every operation by method and path."""
    return {f"{method.upper()} {path}": op for path, way in document["paths"].items() for method, op in way.items()}


def content(part: Json) -> dict[str, Json]:
    """Return the schema of each media type of a body or an answer."""
    return {media: entry["schema"] for media, entry in part.get("content", {}).items() if "schema" in entry}


def breaking_changes(old: Json, new: Json) -> list[str]:
    """Return every change from `old` to `new` that can break a client that keeps to `old`."""
    found: list[str] = []
    for name, before in operations(old).items():
        after = operations(new).get(name)
        if after is None:
            found.append(f"{name}: removed")
            continue
        needed = [p["name"] for p in after.get("parameters", []) if p.get("required")]
        known = [p["name"] for p in before.get("parameters", []) if p.get("required")]
        found += [f"{name}: parameter {p} is newly required" for p in needed if p not in known]
        if after.get("security", []) and not before.get("security", []):
            found.append(f"{name}: newly needs a key")
        for media, schema in content(before.get("requestBody", {})).items():
            wanted = content(after.get("requestBody", {})).get(media)
            found += (
                [f"{name}: no longer takes {media}"]
                if wanted is None
                else schema_breaks(old, schema, new, wanted, name, sent=True)
            )
        for status, answer in before["responses"].items():
            if status not in after["responses"]:
                found.append(f"{name}: status {status} removed")
                continue
            for media, schema in content(answer).items():
                given = content(after["responses"][status]).get(media)
                where = f"{name} {status}"
                found += (
                    [f"{where}: no longer {media}"]
                    if given is None
                    else schema_breaks(old, schema, new, given, where, sent=False)
                )
    return found


@pytest.fixture(scope="session")
def committed(root: Path) -> Json:
    """The document of the newest code, which `make publish` writes."""
    document: Json = json.loads((root / "docs" / "openapi.json").read_bytes())
    return document


@pytest.fixture(scope="session")
def promised(root: Path) -> Json:
    """What /v1 promised when it was released. Nothing writes this file; it changes by hand and with review."""
    document: Json = json.loads((root / "docs" / "contracts" / "v1.json").read_bytes())
    return document


def test_the_committed_document_is_the_one_the_code_gives(root: Path) -> None:
    built = canonical_json(openapi_document())
    assert (root / "docs" / "openapi.json").read_bytes() == built, "run `make publish`"


def test_the_code_breaks_nothing_that_is_promised(promised: Json) -> None:
    assert breaking_changes(promised, openapi_document()) == []


def test_publishing_does_not_move_the_promise(root: Path) -> None:
    assert "contracts" not in (root / "ops" / "publish.py").read_text()
    assert "contracts" not in (root / "Makefile").read_text()


def test_the_document_does_not_depend_on_the_environment(monkeypatch: pytest.MonkeyPatch, committed: Json) -> None:
    for name, value in {"APP_ENV": "prod", "MAX_BATCH": "5", "API_KEY": "changeme", "PORT": "x"}.items():
        monkeypatch.setitem(os.environ, name, value)
    assert openapi_document() == committed


# The comparer itself: what breaks, and what does not


def _fields(document: Json, name: str) -> Json:
    fields: Json = document["components"]["schemas"][name]["properties"]
    return fields


def _rename(document: Json) -> None:
    _fields(document, "PredictRequest")["airline"] = _fields(document, "PredictRequest").pop("carrier")


def _require(document: Json) -> None:
    _fields(document, "PredictRequest")["gate"] = {"type": "string"}
    document["components"]["schemas"]["PredictRequest"]["required"].append("gate")


def _require_known(document: Json) -> None:
    document["components"]["schemas"]["PredictRequest"]["required"].append("temperature_f")


def _add_answer_value(document: Json) -> None:
    _fields(document, "Prediction")["prediction"]["enum"].append("cancelled")


def _change_probability(document: Json) -> None:
    _fields(document, "Prediction")["probability"]["type"] = "string"


def _optional_answer(document: Json) -> None:
    document["components"]["schemas"]["Prediction"]["required"].remove("model_version")


def _need_header(document: Json) -> None:
    document["paths"]["/v1/predict"]["post"]["parameters"][0]["required"] = True


BREAKING: dict[str, tuple[Callable[[Json], Any], str]] = {
    "a removed path": (lambda d: d["paths"].pop("/v1/model"), "GET /v1/model: removed"),
    "a removed status": (lambda d: d["paths"]["/v1/predict"]["post"]["responses"].pop("413"), "status 413 removed"),
    "a removed field": (lambda d: _fields(d, "PredictRequest").pop("pressure_mb"), "pressure_mb: removed"),
    "a renamed field": (_rename, "carrier: removed"),
    "a new required field": (_require, "gate: newly required"),
    "a field that becomes required": (_require_known, "temperature_f: newly required"),
    "a narrower range": (
        lambda d: _fields(d, "PredictRequest")["temperature_f"]["anyOf"][0].update(maximum=100),
        "temperature_f: maximum is narrower",
    ),
    "a smaller batch": (lambda d: _fields(d, "BatchRequest")["flights"].update(maxItems=10), "maxItems is narrower"),
    "no null any more": (
        lambda d: _fields(d, "PredictRequest")["temperature_f"]["anyOf"].pop(),
        "temperature_f: the type changed",
    ),
    "an origin less": (lambda d: _fields(d, "PredictRequest")["origin"]["enum"].pop(), "no longer allowed"),
    "another pattern": (lambda d: _fields(d, "PredictRequest")["dest"].update(pattern="^K[A-Z]{3}$"), "the pattern"),
    "an answer's field removed": (lambda d: _fields(d, "Prediction").pop("threshold"), "threshold: removed"),
    "an answer's field of another type": (_change_probability, "probability: the type changed"),
    "an answer's field not always there": (_optional_answer, "model_version: no longer always there"),
    "a new value in an answer": (_add_answer_value, "prediction: a value"),
    "a header that becomes required": (_need_header, "X-Request-ID is newly required"),
    "an error in another shape": (lambda d: _fields(d, "Problem").pop("request_id"), "request_id: removed"),
    "a key where none was needed": (
        lambda d: d["paths"]["/health"]["get"].update(security=[{"ApiKey": []}]),
        "GET /health: newly needs a key",
    ),
}


@pytest.mark.parametrize(("change", "said"), BREAKING.values(), ids=BREAKING)
def test_a_breaking_change_of_the_code_is_found(promised: Json, change: Callable[[Json], Any], said: str) -> None:
    changed = copy.deepcopy(openapi_document())
    change(changed)
    assert any(said in text for text in breaking_changes(promised, changed)), breaking_changes(promised, changed)


HARMLESS: dict[str, Callable[[Json], Any]] = {
    "nothing": lambda d: None,  # noqa: ARG005 - the others need the document
    "an optional field": lambda d: _fields(d, "PredictRequest").update(gate={"type": "string"}),
    "a field in the answer": lambda d: _fields(d, "Prediction").update(region={"type": "string"}),
    "a wider range": lambda d: _fields(d, "PredictRequest")["temperature_f"]["anyOf"][0].update(maximum=140),
    "an origin more": lambda d: _fields(d, "PredictRequest")["origin"]["enum"].append("BOS"),
    "a larger batch": lambda d: _fields(d, "BatchRequest")["flights"].update(maxItems=5_000),
    "another text": lambda d: _fields(d, "PredictRequest")["dest"].update(description="the airport"),
    "a new path": lambda d: d["paths"].update({"/v2/predict": d["paths"]["/v1/predict"]}),
    "a new status": lambda d: d["paths"]["/health"]["get"]["responses"].update({"503": {"description": "no"}}),
    "a field no longer required": lambda d: d["components"]["schemas"]["PredictRequest"]["required"].remove("dest"),
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_a_harmless_change_of_the_code_is_not_called_breaking(promised: Json, change: Callable[[Json], Any]) -> None:
    changed = copy.deepcopy(openapi_document())
    change(changed)
    assert breaking_changes(promised, changed) == []


# What the document says


def test_every_field_says_what_it_is_and_every_number_its_unit_and_range(committed: Json) -> None:
    fields = _fields(committed, "PredictRequest")
    assert sorted(fields) == sorted(["request_id", *(c.name for c in INPUTS)])
    for name, field in fields.items():
        assert field["description"]
        column = COLUMNS.get(name)
        if column is not None and column.kind == "number":
            number = kinds(committed, field)["number"]
            assert (number["minimum"], number["maximum"]) == (column.low, column.high)
            assert field["x-unit"] == column.unit
            assert ("null" in kinds(committed, field)) == column.nullable
            assert ("null or left out" in field["description"]) == column.nullable


def test_every_error_is_documented_with_an_example(committed: Json) -> None:
    text = json.dumps(committed)
    for error in ERRORS:
        if error.kind not in {"not-found", "method-not-allowed"}:
            assert f"urn:flight-disruption:problem:{error.kind}" in text
    for name, operation in operations(committed).items():
        assert operation["tags"] == (["v1"] if "/v1/" in name else ["operations"])
        assert operation["summary"]
        for status, answer in operation["responses"].items():
            if status != "200":
                assert set(answer["content"]) == {"application/problem+json"}
    for status in ("400", "401", "408", "413", "415", "422", "431", "500", "503"):
        assert status in committed["paths"]["/v1/predict"]["post"]["responses"]


def test_operations_have_names_for_generated_clients(committed: Json) -> None:
    names = [operation["operationId"] for operation in operations(committed).values()]
    assert sorted(names) == ["describeModel", "health", "predict", "predictBatch", "ready"]


def test_every_answer_documents_its_id_and_every_error_is_plausible(committed: Json) -> None:
    for operation in operations(committed).values():
        for status, answer in operation["responses"].items():
            assert "X-Request-ID" in answer["headers"]
            for entry in answer["content"]["application/problem+json"]["examples"].values() if status != "200" else ():
                assert len(entry["value"]["detail"]) > 20
                assert bool(entry["value"]["errors"]) == (status == "422")


def test_the_document_holds_no_inner_detail(committed: Json) -> None:
    text = json.dumps(committed)
    for word in ("minute_of_day", "day_of_week", "MODEL_URI", "API_KEY", "onnx", "HTTPValidationError"):
        assert word not in text


def test_the_published_document_is_served(client: TestClient, app: Service) -> None:
    assert client.get("/openapi.json").json() == app.openapi()
    assert app.openapi()["components"]["schemas"].keys() == openapi_document()["components"]["schemas"].keys()
