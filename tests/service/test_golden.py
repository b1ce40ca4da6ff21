"""Golden tests: what clients of an approved release were told, they are told still.

The expected values are committed under ops/releases. When a test fails here, the question is whether the change was
meant: then the release's record is approved anew, with review. Only what matters is compared: the decision and the
probability, within what another processor may round differently; not the order of keys or the last digits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from mlops_course.blueprint import CRITERIA, MODEL_NAME, project_root, read_registry
from mlops_course.serving import Settings, build_app

APPROVED = sorted((project_root() / "ops" / "releases").glob("*/golden.json"))
TOLERANCE = CRITERIA["reproducibility"].limit


@pytest.fixture(params=APPROVED, ids=lambda path: path.parent.name)
def told(request: pytest.FixtureRequest, artifacts_root: Path) -> list[tuple[dict[str, Any], float, dict[str, Any]]]:
    """Each golden request of an approved release, the committed probability, and what the service answers now."""
    golden: Path = request.param
    version, shelf = golden.parent.name, artifacts_root / MODEL_NAME
    settings = Settings.model_construct(
        model_uri=str(shelf / version), model_digest=read_registry(shelf).versions[version]
    )
    cases = json.loads(golden.read_bytes())["cases"]
    with TestClient(build_app(settings)) as client:
        answers = [client.post("/v1/predict", json=case["request"]) for case in cases]
    assert {answer.status_code for answer in answers} == {200}
    return [(c["request"], c["probability"], a.json()) for c, a in zip(cases, answers, strict=True)]


def test_there_is_an_approved_release() -> None:
    assert APPROVED


def test_the_answers_of_an_approved_release_do_not_change(
    told: list[tuple[dict[str, Any], float, dict[str, Any]]],
) -> None:
    assert len(told) >= 10
    for flight, expected, answer in told:
        assert answer["probability"] == pytest.approx(expected, abs=TOLERANCE), flight
        if abs(expected - answer["threshold"]) > TOLERANCE:
            assert answer["prediction"] == ("disrupted" if expected >= answer["threshold"] else "on_time"), flight


def test_the_golden_requests_say_yes_and_no(told: list[tuple[dict[str, Any], float, dict[str, Any]]]) -> None:
    assert {answer["prediction"] for _, _, answer in told} == {"disrupted", "on_time"}
