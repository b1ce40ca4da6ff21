"""`python -m ops drift` and `calibrate-drift`: windows, reports, exit codes, and that Evidently is quoted rightly."""

from __future__ import annotations

import json
import warnings
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result

from mlops_course.blueprint import CATEGORICAL
from mlops_course.monitoring import KEY_FEATURES, DriftReport
from ops import drift
from ops.__main__ import cli


def run(*arguments: str | Path) -> Result:
    """Run a command."""
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("last", "windows"),
    [
        (date(2013, 10, 3), [(1, 3)]),
        (date(2013, 10, 7), [(1, 7)]),
        (date(2013, 10, 13), [(1, 13)]),
        (date(2013, 10, 14), [(1, 7), (8, 14)]),
        (date(2013, 10, 31), [(1, 7), (8, 14), (15, 21), (22, 31)]),
    ],
)
def test_a_period_is_cut_into_weeks_without_a_rest(last, windows):
    found = drift.cut(date(2013, 10, 1), last, 7)
    assert [(first.day, end.day) for first, end in found] == windows


def test_wilsons_interval():
    # Values of a textbook: 15 of 30, and none of 100.
    assert drift.interval(15, 30) == [0.3315, 0.6685]
    assert drift.interval(0, 100) == [0.0, 0.037]


def test_two_weeks_of_december_against_the_weeks_before(artifacts_root, tmp_path):
    """What one week says waits; what two weeks say alarms. Both exit with 0."""
    period = ("--from", "2013-12-01", "--to", "2013-12-14")
    result = run("drift", *period, "--output", tmp_path, "--artifacts", artifacts_root)
    assert result.exit_code == 0, result.output
    first, second = (json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json")))
    assert (first["first"], second["last"], first["baseline"]) == ("2013-12-01", "2013-12-14", "golden")
    assert first["severity"] == "critical"
    assert "critical, with the windows before: none" in result.output
    assert "warning, with the windows before: warning" in result.output
    assert "wait   input recent_origin_delay_min" in result.output
    assert "alarm  input recent_origin_delay_min" in result.output
    assert "to do  input: Open the diagnosis" in result.output
    assert "new    dest: ILM (6), SBN (1)" in result.output
    for stored in (first, second):
        for finding in stored["findings"]:
            assert (tmp_path / finding["diagnosis"]).stat().st_size > 100_000
            assert finding["remedy"]


def test_a_quiet_week_against_training_needs_no_page(artifacts_root, tmp_path):
    period = ("--from", "2013-03-04", "--to", "2013-03-10", "--baseline", "training")
    result = run("drift", *period, "--output", tmp_path, "--artifacts", artifacts_root)
    assert result.exit_code == 0, result.output
    assert "6,546 flights against training: none, with the windows before: none" in result.output
    (path,) = tmp_path.iterdir()
    assert DriftReport.model_validate_json(path.read_bytes()).findings == []


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--from", "2013-10-31", "--to", "2013-10-01"), 2, "2013-10-01 is before 2013-10-31"),
        (("--from", "2014-02-01", "--to", "2014-02-07", "--baseline", "training"), 1, "there are no flights"),
        (("--from", "2013-01-10", "--to", "2013-01-16"), 1, "baseline 'golden' has 9 days; give it at least 28"),
        (("--from", "2013-10-01", "--to", "2013-10-07", "--causes", "no-such.toml"), 1, "no-such.toml"),
        (
            ("--from", "2013-10-01", "--to", "2013-10-07", "--artifacts", "no-such"),
            1,
            "channel 'prod' points to nothing",
        ),
    ],
)
def test_what_cannot_be_done_is_named(artifacts_root, tmp_path, arguments, code, says):
    result = run("drift", "--artifacts", artifacts_root, "--output", tmp_path / "out", *arguments)
    assert result.exit_code == code
    assert says in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", drift.REFERENCES.values())
def test_evidentlys_rules_are_those_of_its_report(flights, size):
    """The benchmark calls Evidently's tests one by one; a whole report must say the same of every column."""
    training = flights[flights["scheduled_departure"] < "2013-07-01"]
    columns, sample = list(KEY_FEATURES), training.sample(size, random_state=5)
    window = training.iloc[np.random.default_rng(3).integers(0, len(training), 500)]
    window = window.assign(humidity_pct=training["humidity_pct"].sample(500, random_state=4).to_numpy())
    flags = drift.evidently_flags(window, sample, columns)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from evidently import DataDefinition, Dataset, Report
        from evidently.presets import DataDriftPreset

        numbers = [name for name in columns if name not in CATEGORICAL]
        texts = [name for name in columns if name in CATEGORICAL]
        kinds = DataDefinition(numerical_columns=numbers, categorical_columns=texts)
        data = [Dataset.from_pandas(part[columns], data_definition=kinds) for part in (window, sample)]
        seen = Report([DataDriftPreset(columns=columns)], include_tests=True).run(*data).dict()
    verdicts = {one["name"]: str(one["status"]).endswith("FAIL") for one in seen["tests"]}
    assert {name: verdicts[f"Value Drift for column {name}"] for name in columns} == flags
    assert len(set(flags.values())) == 2


def test_calibration_measures_what_it_says(artifacts_root, tmp_path, monkeypatch):
    monkeypatch.setattr(drift, "SIZES", (200,))
    monkeypatch.setattr("mlops_course.monitoring.KEY_FEATURES", {"minute_of_day": "", "wind_speed_mph": ""})
    path = tmp_path / "new" / "calibration.json"
    sizes = ("--windows", "12", "--planted", "10")
    result = run("calibrate-drift", *sizes, "--output", path, "--artifacts", artifacts_root)
    assert result.exit_code == 0, result.output
    seen = json.loads(path.read_text())
    assert [(one["design"], one["rows"]) for one in seen["false_alarms"]] == [("rows", 200), ("days", 200)]
    for one in seen["false_alarms"]:
        assert {rule: counts["windows"] for rule, counts in one["rules"].items()} == {
            "ours": 12,
            "Evidently, 1,000": 3,
            "Evidently, 1,000, half": 3,
            "Evidently, 20,000": 3,
            "Evidently, 20,000, half": 3,
        }
    found = {(one["design"], one["feature"]): one["rules"]["ours"]["hits"] for one in seen["detection"]}
    assert [found[key] for key in (("rows", "minute_of_day"), ("rows", "wind_speed_mph"))] == [10, 10]
    # Of one or two days the timetable says something, and the weather does not.
    assert found["days", "minute_of_day"] == 10
    assert found["days", "wind_speed_mph"] < 5


def test_the_committed_calibration_keeps_the_promise(root):
    seen = json.loads((root / "docs" / "reports" / "drift_calibration.json").read_text())
    alarms = {(one["design"], one["rows"]): one["rules"]["ours"] for one in seen["false_alarms"]}
    assert alarms.keys() == {(design, rows) for design in ("rows", "days") for rows in drift.SIZES}
    assert all(one["windows"] >= 400 and one["share"] <= 0.05 for one in alarms.values())
    found = {one["feature"]: one["rules"]["ours"] for one in seen["detection"] if one["design"] == "rows"}
    assert found.keys() == KEY_FEATURES.keys()
    assert all(one["windows"] >= 200 and one["share"] >= 0.95 for one in found.values())


def test_days_of_a_window_include_both_ends():
    times = pd.to_datetime(["2013-10-01 00:00", "2013-10-02 23:59", "2013-10-03 00:00"])
    frame = pd.DataFrame({"scheduled_departure": times})
    assert len(drift.between(frame, date(2013, 10, 1), date(2013, 10, 2))) == 2
