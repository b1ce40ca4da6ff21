"""Drift: the index, the bins, limits that hold for windows of days that are alike, findings, and what explains them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest

from mlops_course import monitoring
from mlops_course.blueprint import (
    CATEGORICAL,
    FEATURES,
    MISSING,
    MODEL_NAME,
    NUMERIC,
    ORIGINS,
    category_shares,
    number_shares,
)
from mlops_course.monitoring import (
    DRIFT_CHECKS,
    KEY_FEATURES,
    SCORE,
    SEGMENTS,
    Baseline,
    BinTable,
    DriftReport,
    Finding,
    KnownCause,
    check_window,
    compare,
    count_days,
    draw_window,
    flights_in,
    joint_limits,
    judge,
    limits_for,
    load_causes,
    plant,
    psi,
    rest_share,
    sentence,
    severity,
    write_report,
)

if TYPE_CHECKING:
    import pandas as pd


@pytest.fixture(scope="module")
def artifact(artifacts_root: Path) -> Path:
    """Return the folder of release 1.0.0."""
    return artifacts_root / MODEL_NAME / "1.0.0"


@pytest.fixture(scope="module")
def reference(artifact: Path) -> dict[str, Any]:
    """Return the reference of release 1.0.0."""
    return dict(json.loads((artifact / "reference.json").read_text()))


@pytest.fixture(scope="module")
def scored(artifact: Path, flights: pd.DataFrame) -> pd.DataFrame:
    """Return all flights with the scores of release 1.0.0."""
    from mlops_course.training import onnx_scores

    return flights.assign(**{SCORE: onnx_scores((artifact / "model.onnx").read_bytes(), flights)})


@pytest.fixture(scope="module")
def training(scored: pd.DataFrame) -> pd.DataFrame:
    return scored[scored["scheduled_departure"] < "2013-07-01"]


@pytest.fixture(scope="module")
def normal(training: pd.DataFrame, reference: dict[str, Any]) -> Baseline:
    return Baseline("training", training, reference)


def days(scored: pd.DataFrame, first: str, after: str) -> pd.DataFrame:
    """Return the flights of these days, the last one left out."""
    return scored[(scored["scheduled_departure"] >= first) & (scored["scheduled_departure"] < after)]


@pytest.fixture(scope="module")
def week(scored: pd.DataFrame) -> pd.DataFrame:
    """Return a week of training without findings."""
    return days(scored, "2013-03-04", "2013-03-11")


# The index


def test_psi_is_the_sum_over_bins():
    share, base = [0.2, 0.3, 0.5], [0.25, 0.25, 0.5]
    by_hand = -0.05 * math.log(0.2 / 0.25) + 0.05 * math.log(0.3 / 0.25)
    assert psi(np.array(share), np.array(base)) == pytest.approx(by_hand, rel=1e-12)
    assert psi(np.array([20, 30, 50]), np.array([1000, 1000, 2000])) == pytest.approx(by_hand, rel=1e-12)


def test_both_sides_are_floored():
    by_hand = (1 - 1e-4) * math.log(1 / 1e-4) * 2
    assert psi(np.array([0, 7]), np.array([3, 0])) == pytest.approx(by_hand, rel=1e-12)


def test_psi_of_nothing_is_not_zero():
    assert np.isnan(psi(np.array([[0, 0], [1, 1]]), np.array([1, 1]))).tolist() == [True, False]


# Counting


def test_counts_are_the_shares_of_the_reference(normal, training, reference):
    """The bins are those of blueprint: the counts of the training months give back the reference itself."""
    for name, place in normal.bins.places.items():
        part, counts = normal.bins.parts[name], normal.counts[0]
        found = dict(zip(normal.bins.labels[name], counts[place] / len(training), strict=True))
        if name not in CATEGORICAL:
            found[MISSING] = counts[place.stop] / len(training)
        assert found == pytest.approx(part["shares"], abs=1e-12), name
    for origin, shares in reference["score"]["by_origin"].items():
        at, place = SEGMENTS.index(origin), normal.bins.places[SCORE]
        here = normal.counts[at, place] / flights_in(normal.counts, normal.bins)[at]
        assert here.tolist() == pytest.approx([shares[b] for b in normal.bins.labels[SCORE]], abs=1e-12)


def test_segments_add_up_and_days_are_apart(reference, week):
    bins = BinTable(reference)
    found, table = count_days(week, bins)
    assert [day.item() for day in found] == [date(2013, 3, d) for d in range(4, 11)]
    assert (table[:, 0] == table[:, 1:].sum(axis=1)).all()
    assert flights_in(table, bins)[:, 0].tolist() == week.groupby(week["scheduled_departure"].dt.date).size().tolist()


def test_a_window_has_the_shares_of_blueprint(reference, week):
    bins = BinTable(reference)
    counts = count_days(week, bins)[1].sum(axis=0)[0]
    dest = category_shares(week["dest"].tolist(), common=10**6)
    for label, count in zip(bins.labels["dest"][:-1], counts[bins.places["dest"]], strict=False):
        assert count / len(week) == pytest.approx(dest.get(label, 0), abs=1e-12)
    pressure = number_shares(week["pressure_mb"].to_numpy(float), bins.parts["pressure_mb"]["edges"])
    assert rest_share("pressure_mb", counts, bins) == pytest.approx(pressure[MISSING], abs=1e-12)


def test_unknown_categories_are_in_other_and_apart(reference, week):
    bins = BinTable(reference)
    strange = week.assign(carrier=["ZZ"] * 40 + week["carrier"].tolist()[40:])
    counts = count_days(strange, bins)[1].sum(axis=0)[0]
    assert counts[bins.places["carrier"]].sum() == len(week)
    assert rest_share("carrier", counts, bins) == pytest.approx(40 / len(week))


def test_the_index_is_that_of_the_services_counters(reference, normal, scored):
    """A whole month through the counters that Prometheus scrapes, and the formula of the recording rule."""
    november = days(scored, "2013-11-01", "2013-12-01")
    texts = november[list(CATEGORICAL)].itertuples(index=False, name=None)
    numbers = november[list(NUMERIC)].itertuples(index=False, name=None)
    counts = monitoring.ModelCounts(reference)
    rows, no = list(zip(texts, numbers, strict=True)), [False] * len(november)
    monitoring.add_batch(counts, rows, november[SCORE].tolist(), no)
    counters = {name: series for name, *_, series in monitoring.counted(counts)}
    gauges = {name: series for name, *_, series in monitoring.expected(reference)}
    window = count_days(november, normal.bins)[1].sum(axis=0)

    def in_promql(increase: dict[str, float], share: dict[str, float]) -> float:
        total = sum(increase.values())
        pairs = [(max(increase[b] / total, 1e-4), max(share[b], 1e-4)) for b in share]
        return sum((a - b) * math.log(a / b) for a, b in pairs)

    for name in FEATURES:
        increase = {b: n for (feature, b), n in counters["model_feature_bin"].items() if feature == name}
        share = {b: x for (feature, b), x in gauges["model_feature_expected_share"].items() if feature == name}
        place = normal.bins.places[name]
        assert psi(window[0, place], normal.counts[0, place]) == pytest.approx(in_promql(increase, share), abs=1e-9), (
            name
        )
    place = normal.bins.places[SCORE]
    for at, origin in enumerate(ORIGINS, start=1):
        increase = {b: n for (o, b), n in counters["model_score_bin"].items() if o == origin}
        share = {b: x for (o, b), x in gauges["model_score_expected_share_by_origin"].items() if o == origin}
        assert psi(window[at, place], normal.counts[at, place]) == pytest.approx(in_promql(increase, share), abs=1e-9)


# Limits


def test_joint_limits_keep_all_checks_together_within_the_share():
    rng = np.random.default_rng(1)
    # Scales and tails differ, as those of the checks do.
    known, new = (rng.exponential([0.01, 1, 100], (20_000, 3)) ** [1, 2, 1] for _ in range(2))
    limits = joint_limits(known, np.zeros(3), share=0.04)
    assert (known > limits).any(axis=1).mean() <= 0.04
    assert (new > limits).any(axis=1).mean() == pytest.approx(0.04, abs=0.006)
    assert (new > limits).mean(axis=0) == pytest.approx([0.0135] * 3, abs=0.004)


def test_what_is_below_its_floor_costs_the_others_nothing():
    rng = np.random.default_rng(2)
    known = rng.exponential([0.001, 1], (5_000, 2))
    alone, beside = joint_limits(known[:, 1:], np.zeros(1)), joint_limits(known, np.array([0.1, 0.0]))
    assert beside[0] == 0.1
    assert beside[1] == alone[0]


def test_limits_repeat_and_a_longer_window_has_lower_ones(training, reference, normal):
    rows = flights_in(normal.counts, normal.bins) / len(normal.days)
    again = Baseline("training", training, reference)
    assert (limits_for(again, 7, rows * 7) == limits_for(normal, 7, rows * 7)).all()
    by_chance = [
        k for k, check in enumerate(DRIFT_CHECKS) if check.feature in ("humidity_pct", "wind_speed_mph", SCORE)
    ]
    short, middle, long_ = (limits_for(normal, n, rows * n)[by_chance] for n in (1, 7, 28))
    assert (short >= middle).all()
    assert (middle >= long_).all()
    assert short.max() > 5


def test_a_segment_with_few_flights_is_not_judged(normal):
    limits = limits_for(normal, 2, np.array([700.0, 400.0, 199.0, 101.0]))
    judged = {check.segment for check, limit in zip(DRIFT_CHECKS, limits, strict=True) if np.isfinite(limit)}
    assert judged == {"all", "EWR"}


@pytest.mark.parametrize("design", ["rows", "days"])
@pytest.mark.parametrize("rows", [200, 1_000, 20_000])
def test_false_alarms_stay_within_five_percent(training, normal, rows: int, design: Literal["rows", "days"]):
    """The promise: windows drawn from the baseline, flight by flight or as consecutive days."""
    rng, windows = np.random.default_rng(rows), 100
    seen = [compare(count_days(draw_window(training, rows, design, rng), normal.bins)[1], normal) for _ in range(windows)]
    alarms = sum(any(one.effects[c] > one.limits[c] for c in DRIFT_CHECKS) for one in seen)
    assert alarms <= 0.05 * windows


@pytest.mark.parametrize("feature", KEY_FEATURES)
def test_a_planted_shift_is_found(training, normal, feature):
    """1,000 flights, one key feature moved: found, and named, in at least 95 % of the windows."""
    rng, windows = np.random.default_rng(5), 40
    found = 0
    for _ in range(windows):
        window = plant(draw_window(training, 1_000, "rows", rng), feature, training, rng)
        seen = compare(count_days(window, normal.bins)[1], normal)
        found += any(seen.effects[c] > seen.limits[c] for c in DRIFT_CHECKS if c.feature == feature)
    assert found >= 0.95 * windows


def test_no_week_of_training_has_a_finding(normal, scored):
    firsts = np.arange(np.datetime64("2013-01-01"), np.datetime64("2013-06-25"), 7)
    severities = [check_window(days(scored, str(day), str(day + 7)), normal).severity for day in firsts]
    assert severities == ["none"] * 25


# Findings


def test_a_change_at_one_airport_is_found_there_and_described(normal, scored):
    report = check_window(days(scored, "2013-09-01", "2013-10-01"), normal)
    assert (report.first, report.last, report.days, report.rows["all"]) == (
        date(2013, 9, 1),
        date(2013, 9, 30),
        30,
        27574,
    )
    assert report.new_values == {"dest": {"ILM": 21, "SBN": 5}}
    (carrier,) = (finding for finding in report.findings if finding.feature == "carrier")
    assert (carrier.strongest, carrier.most_affected, list(carrier.effects)) == ("LGA", "LGA", ["LGA"])
    assert report.measured["input"]["carrier"]["all"] < 0.01 < 0.1 < carrier.effects["LGA"]
    assert [change.label for change in carrier.grew[:2]] == ["EV", "9E"]
    assert carrier.shrank[0].label == "DL"
    assert "carrier: PSI 0.13 (limit 0.10) at LGA; more EV (6% -> 13%)" in sentence(carrier)
    strengths = [finding.strength for finding in report.findings]
    assert strengths == sorted(strengths, reverse=True)


def test_unknown_categories_are_a_finding_with_their_names(normal, week):
    carriers = week["carrier"].where(np.arange(len(week)) % 70 > 0, "ZZ")
    report = check_window(week.assign(carrier=carriers), normal)
    (unknown,) = (one for one in report.findings if one.kind == "unknown")
    assert (unknown.feature, unknown.new_values) == ("carrier", {"ZZ": 94})
    assert {one.feature for one in report.findings} == {"carrier"}
    assert judge([report]).alarms == [unknown]


def test_missing_values_are_a_finding(normal, week):
    at_jfk = week["origin"] == "JFK"
    report = check_window(week.assign(visibility_miles=week["visibility_miles"].mask(at_jfk)), normal)
    (finding,) = report.findings
    assert (finding.kind, finding.feature, finding.most_affected) == ("missing", "visibility_miles", "JFK")
    assert finding.effects["all"] == pytest.approx(at_jfk.mean(), abs=0.01)


def test_a_stuck_sensor_is_found_in_a_week(normal, week):
    report = check_window(week.assign(humidity_pct=100.0), normal)
    assert [finding.feature for finding in report.findings] == ["humidity_pct"]
    assert report.findings[0].grew[0].label == "from 89.7"


def test_few_flights_are_no_verdict(normal, week):
    report = check_window(week.head(199).assign(carrier="ZZ", humidity_pct=100.0), normal)
    assert (report.severity, report.findings) == ("too few flights", [])


def test_a_window_without_scores_is_checked_as_far_as_it_goes(normal, week):
    report = check_window(week.drop(columns=SCORE), normal)
    assert report.severity == "none"
    assert SCORE not in report.measured
    assert report.measured["input"].keys() == KEY_FEATURES.keys()


def test_bad_windows_are_refused_by_name(normal, week, training, reference):
    with pytest.raises(ValueError, match="no column 'wind_speed_mph'"):
        check_window(week.drop(columns="wind_speed_mph"), normal)
    with pytest.raises(ValueError, match="no flights in this window"):
        check_window(week.head(0), normal)
    with pytest.raises(ValueError, match="baseline 'golden' has 7 days; give it at least 28"):
        Baseline("golden", week, reference)


def test_the_report_survives_json(normal, scored):
    report = check_window(days(scored, "2013-09-01", "2013-10-01"), normal)
    assert DriftReport.model_validate_json(report.model_dump_json()) == report


# The autumn


def test_december_looks_normal_to_training_and_not_to_the_weeks_before(normal, scored, reference):
    december = days(scored, "2013-12-01", "2014-01-01")
    golden = Baseline("golden", days(scored, "2013-10-06", "2013-12-01"), reference)
    then, before = check_window(december, normal), check_window(december, golden)
    assert then.measured["score"][SCORE]["all"] < 0.01 < 0.05 < before.measured["score"][SCORE]["all"]
    assert then.measured["input"]["recent_origin_delay_min"]["all"] < 0.15
    assert before.measured["input"]["recent_origin_delay_min"]["all"] > 0.6
    assert before.findings[0].feature == "recent_origin_delay_min"


def test_october_differs_from_training_and_not_from_september(normal, scored, reference):
    october = days(scored, "2013-10-01", "2013-11-01")
    golden = Baseline("golden", days(scored, "2013-08-06", "2013-10-01"), reference)
    assert "recent_origin_delay_min" in [finding.feature for finding in check_window(october, normal).findings]
    assert check_window(october, golden).severity == "none"


# Known causes


def cause(**changes: Any) -> KnownCause:
    """Return a known cause about carriers in the first half of September."""
    values = {"name": "timetable", "first": "2013-09-01", "last": "2013-09-15", "features": ["carrier"]}
    return KnownCause.model_validate({**values, "reason": "new timetable", "by": "schedule", **changes})


def test_a_known_cause_keeps_the_finding_and_takes_the_alarm(normal, scored):
    window = days(scored, "2013-09-09", "2013-09-16")
    plain, known = (check_window(window, normal, causes) for causes in ([], [cause()]))
    assert (plain.severity, known.severity) == ("warning", "none")
    assert [finding.feature for finding in known.findings] == ["carrier"]
    assert known.findings[0].cause == "timetable"
    assert known.findings[0].effects == plain.findings[0].effects
    assert sentence(known.findings[0]).endswith("known cause: timetable")
    assert (judge([plain, plain]).severity, judge([plain, known]).severity) == ("warning", "none")
    assert judge([plain, known]).explained == known.findings


@pytest.mark.parametrize(("first", "covered"), [("2013-09-10", True), ("2013-09-12", True), ("2013-09-13", False)])
def test_a_known_cause_covers_at_least_half_of_the_days(first, covered):
    window = [date(2013, 9, d) for d in range(9, 16)]
    assert cause(first=first).covers("carrier", window) is covered
    assert not cause(first=first).covers("dest", window)


def test_the_narrower_of_two_causes_is_named(normal, scored):
    window = days(scored, "2013-09-09", "2013-09-16")
    report = check_window(window, normal, [cause(name="year", first="2013-01-01", last="2013-12-31"), cause()])
    assert report.findings[0].cause == "timetable"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[cause]\n", "causes.toml: "),
        ('[[cause]]\nname="x"\n', "Field required"),
        ("{}features=['wind']\n", "'wind' is neither a feature nor 'score'"),
        ("{}features=['dest']\nwhen='now'\n", "Extra inputs are not permitted"),
    ],
)
def test_a_wrong_file_of_causes_is_refused(tmp_path, text: str, says: str):
    path = tmp_path / "causes.toml"
    start = "[[cause]]\nname='x'\nfirst=2013-09-01\nlast=2013-09-02\nreason='r'\nby='b'\n"
    path.write_text(text.format(start))
    with pytest.raises(ValueError, match=r"causes\.toml") as caught:
        load_causes(path)
    assert says in str(caught.value)


def test_a_cause_that_ends_before_it_begins_is_refused():
    with pytest.raises(ValueError, match="it ends on 2013-08-01, before it begins"):
        cause(last="2013-08-01")


def test_the_committed_causes_can_be_read(root):
    causes = load_causes(root / "ops" / "known_causes.toml")
    assert len({one.name for one in causes}) == len(causes) >= 3
    assert all(one.reason and one.by for one in causes)


# Severity, and several windows


def finding(kind: str, feature: str, cause: str | None = None, **effects: float) -> Finding:
    """Return a finding with these effects by segment."""
    where = effects or {"all": 0.15}
    content = {"effects": where, "limits": dict.fromkeys(where, 0.1), "strongest": next(iter(where)), "cause": cause}
    more: dict[str, Any] = {"most_affected": "LGA", "grew": [], "shrank": [], "new_values": {}, "remedy": "look"}
    return Finding.model_validate({"kind": kind, "feature": feature, **content, **more})


def report(*findings: Finding, few: bool = False) -> DriftReport:
    """Return a report with these findings."""
    level = "too few flights" if few else severity(findings)
    content = {"baseline": "golden", "first": "2013-09-01", "last": "2013-09-07", "days": 7, "rows": {"all": 6000}}
    more: dict[str, Any] = {"severity": level, "findings": findings, "measured": {}, "new_values": {}}
    return DriftReport.model_validate({**content, **more})


WIND, CARRIER, DEST = (finding("input", name) for name in ("wind_speed_mph", "carrier", "dest"))


@pytest.mark.parametrize(
    ("findings", "expected"),
    [
        ([], "none"),
        ([WIND, CARRIER], "warning"),
        ([WIND, CARRIER, DEST], "critical"),
        ([WIND, CARRIER, finding("input", "dest", cause="holiday")], "warning"),
        ([finding("input", "dest", cause="holiday")], "none"),
        ([finding("score", SCORE, all=0.24)], "warning"),
        ([finding("score", SCORE, all=0.25)], "critical"),
        ([finding("score", SCORE, LGA=0.9)], "warning"),
        ([finding("missing", name) for name in NUMERIC[:4]], "warning"),
    ],
)
def test_severity(findings, expected):
    assert severity(findings) == expected


def test_inputs_alarm_in_two_of_three_windows():
    assert judge([report(WIND)]).severity == "none"
    assert judge([report(WIND)]).waiting == [WIND]
    assert judge([report(WIND), report(WIND)]).alarms == [WIND]
    assert judge([report(WIND), report(), report(WIND)]).severity == "warning"
    assert judge([report(WIND), report(), report(), report(WIND)]).severity == "none"
    assert judge([report(WIND), report(CARRIER)]).severity == "none"
    assert judge([report(WIND), report(WIND), report()]).severity == "none"
    assert judge([report(WIND), report(WIND)], times=3).severity == "none"


def test_what_a_known_cause_explained_does_not_count_as_seen():
    explained = report(finding("input", "wind_speed_mph", cause="storm"))
    assert judge([explained, report(WIND)]).severity == "none"


def test_missing_and_unknown_values_alarm_at_once():
    for kind in ("missing", "unknown"):
        assert judge([report(finding(kind, "carrier"))]).severity == "warning"


def test_windows_with_few_flights_are_passed_over():
    assert judge([report(WIND), report(few=True), report(few=True), report(WIND)]).severity == "warning"
    assert judge([report(WIND), report(WIND), report(few=True)]).severity == "too few flights"


# The page


def test_a_report_with_findings_has_a_page(normal, scored, tmp_path):
    window = days(scored, "2013-09-09", "2013-09-16")
    seen = check_window(window, normal)
    path = write_report(seen, window, normal, tmp_path / "new")
    assert path.name == "drift-training-2013-09-09-2013-09-15.json"
    stored = DriftReport.model_validate_json(path.read_bytes())
    assert stored.findings[0].diagnosis == "drift-training-2013-09-09-2013-09-15.html"
    page = (path.parent / stored.findings[0].diagnosis).read_text()
    assert all(name in page for name in ("carrier", "recent_origin_delay_min", SCORE))


def test_a_report_without_findings_has_none(normal, week, tmp_path):
    path = write_report(check_window(week, normal), week, normal, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_importing_the_module_loads_nothing_heavy():
    """The service imports it; what draws and compares is loaded by the functions that need it."""
    code = (
        "import sys, mlops_course.monitoring; print({'pandas', 'evidently', 'scipy', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
