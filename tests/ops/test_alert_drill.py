"""The drill: it finds the fault it made, notices an alert that should not be there, and says what it needs."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
from click.testing import CliRunner

from mlops_course.blueprint import MODEL_NAME, resolve_channel
from ops import alert_drill
from ops.__main__ import cli
from ops.alert_drill import FAULTS, ordinary_flights
from ops.publish import DRILL


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait less than in a real drill; skip where there is no Prometheus."""
    if shutil.which("prometheus") is None:
        pytest.skip("needs prometheus, which is not on PyPI: `make tools` installs it on Debian and Ubuntu")
    monkeypatch.setattr(alert_drill, "CALM_S", 5.0)
    monkeypatch.setattr(alert_drill, "AFTER_S", 2.0)
    monkeypatch.setattr(alert_drill, "ordinary_flights", lambda: ordinary_flights(500))


def test_a_killed_service_and_a_forgotten_field_are_found(fast, artifacts_root, tmp_path):
    output = tmp_path / "drill.json"
    line = ["alert-drill", "--fault", "kill", "--fault", "bad payloads", "--output", str(output)]
    done = CliRunner().invoke(cli, [*line, "--artifacts", str(artifacts_root)])
    assert done.exit_code == 0, done.output
    report = json.loads(output.read_text())
    assert [one["fault"] for one in report["faults"]] == ["bad payloads", "kill"]
    for one in report["faults"]:
        assert one["passed"]
        assert (one["wrong"], one["missed"]) == ([], [])
        assert all(seconds > 0 for seconds in one["expected_s"].values())
    assert "1/2  bad payloads: every other request lacks `carrier`" in done.output


def test_an_alert_too_many_and_one_too_few_fail_it(fast, artifacts_root, monkeypatch):
    """The right alert is declared wrong, and one that cannot come is expected."""
    monkeypatch.setattr(alert_drill, "LIMIT_S", 15.0)
    artifact, _ = resolve_channel(artifacts_root / MODEL_NAME, "prod")
    (spoiled,) = (one for one in FAULTS if one.name == "bad payloads")
    mistaken = dataclasses.replace(spoiled, expected=frozenset({"ModelNotReady"}))
    result = alert_drill.drill(mistaken, artifact, ordinary_flights(500))
    assert result["wrong"] == ["ValidationFailuresSurge"]
    assert result["missed"] == ["ModelNotReady"]
    assert not result["passed"]
    told = alert_drill.describe(result)
    assert "did not fire: ModelNotReady" in told
    assert "fired and should not: ValidationFailuresSurge" in told


def test_without_prometheus_it_says_what_to_do(monkeypatch, artifacts_root):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    done = CliRunner().invoke(cli, ["alert-drill", "--artifacts", str(artifacts_root)])
    assert done.exit_code == 1
    assert "there is no `prometheus` on the PATH; `make tools` installs it on Debian and Ubuntu" in done.output


def test_the_committed_report_is_of_all_faults_and_passed():
    report = json.loads(DRILL.read_text())
    assert [one["fault"] for one in report["faults"]] == [one.name for one in FAULTS]
    assert all(one["passed"] for one in report["faults"])
    for one, fault in zip(report["faults"], FAULTS, strict=True):
        assert one["how"] == fault.how
        assert set(one["expected_s"]) == fault.expected
