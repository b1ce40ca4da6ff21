"""Chapter 1: criteria, contract, data, splits, artifacts, bins. Each section protects one promise of the blueprint."""

from __future__ import annotations

import json
import math
import re
import stat
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mlops_course import blueprint
from mlops_course.blueprint import (
    AT_SCORING,
    BINS,
    COLUMNS,
    CRITERIA,
    DERIVED,
    FEATURES,
    INPUTS,
    LABEL,
    MANIFEST,
    MISSING,
    NUMERIC,
    CATEGORICAL,
    ORIGINS,
    OTHER,
    OUTCOMES,
    RECENT_WINDOW,
    SCORING_LEAD,
    SPLITS,
    ArtifactError,
    ContractError,
    Criterion,
    DataError,
    Headline,
    Manifest,
    Provenance,
    VersionError,
    add_derived,
    approved_versions,
    artifact_digest,
    bin_edges,
    canonical_json,
    category_shares,
    check_bounds,
    check_features,
    check_frame,
    data_folder,
    dataset_sha256,
    derive,
    features_sha256,
    holds,
    load_flights,
    load_weather,
    make_reference,
    model_input,
    number_shares,
    parse_version,
    point_channel,
    practice,
    project_root,
    read_registry,
    recent_origin_delay,
    register,
    resolve_channel,
    sha256_text,
    split_by_time,
    split_ledger,
    verify_artifact,
    weather_hour,
    write_artifact,
)

# --- Where things are -------------------------------------------------------------------------------------------


def test_the_project_is_found_from_any_folder_below_it(root, tmp_path):
    assert project_root(root / "chapters" / "data") == root
    with pytest.raises(FileNotFoundError, match="run this inside your copy of the course"):
        project_root(tmp_path)


# --- Acceptance criteria: numbers with reasons, in one place ----------------------------------------------------


def criterion(rule: str) -> Criterion:
    """Return a criterion with the limit 0.5."""
    return Criterion.model_validate(
        {"name": "n", "metric": "m", "rule": rule, "limit": 0.5, "unit": "", "reason": "r", "checked_by": "c"}
    )


def test_every_criterion_has_its_own_name_and_says_why_and_who_checks():
    groups = [value for value in vars(blueprint).values() if isinstance(value, tuple)]
    listed = [one for group in groups for one in group if isinstance(one, Criterion)]
    assert len({one.name for one in listed}) == len(listed) == len(CRITERIA)
    assert [name for name, one in CRITERIA.items() if name != one.name] == []
    # A reason is a sentence, not a word.
    assert [one.name for one in listed if len(one.reason.split()) < 5 or not one.checked_by.strip()] == []


def test_the_limits_the_project_promised():
    limits = {name: (one.rule, one.limit) for name, one in CRITERIA.items()}
    assert limits["roc_auc_drop"] == ("at most", 0.01)
    assert limits["latency_p95_ms"] == ("at most", 150.0)
    assert limits["onnx_parity"] == ("at most", 1e-5)


@pytest.mark.parametrize(
    ("rule", "value", "expected"),
    [
        ("at least", 0.5, True),
        ("at least", 0.6, True),
        ("at least", 0.4999, False),
        ("at least", math.nan, False),
        ("at least", math.inf, True),
        ("at most", 0.5, True),
        ("at most", 0.4, True),
        ("at most", 0.5001, False),
        ("at most", math.nan, False),
        ("at most", math.inf, False),
    ],
)
def test_a_criterion_holds_on_its_limit_and_never_for_a_missing_value(rule, value, expected):
    assert holds(criterion(rule), value) is expected


def test_a_criterion_cannot_be_changed_or_extended():
    with pytest.raises(ValidationError, match="frozen"):
        CRITERIA["test_roc_auc"].limit = 0.0
    with pytest.raises(ValidationError, match="extra_forbidden"):
        Criterion.model_validate({**criterion("at most").model_dump(), "severity": "low"})


# --- The feature contract: what is known in time, in which unit and range ---------------------------------------


def test_every_number_of_the_contract_has_a_unit_and_a_range():
    numbers = [c for c in (*INPUTS, *DERIVED) if c.kind == "number"]
    assert numbers != []
    assert [c.name for c in numbers if not c.unit or c.low is None or c.high is None or c.low >= c.high] == []
    assert [c.name for c in COLUMNS.values() if not c.text] == []


def test_no_name_stands_for_two_columns_and_no_feature_is_listed_twice():
    assert len(COLUMNS) == len(INPUTS) + len(DERIVED) + len(OUTCOMES)
    assert len(set(FEATURES)) == len(FEATURES)


def test_every_feature_and_every_input_is_known_when_a_flight_is_scored():
    assert [name for name in FEATURES if COLUMNS[name].known not in AT_SCORING] == []
    assert [c.name for c in INPUTS if c.known not in AT_SCORING] == []
    check_features(FEATURES)


@pytest.mark.parametrize("outcome", OUTCOMES, ids=lambda c: c.name)
def test_a_column_known_only_later_is_refused_as_a_leak(outcome):
    text = f"feature '{outcome.name}' is a leak: it is known at {outcome.known}, after the flight is scored; remove it"
    with pytest.raises(ContractError, match=re.escape(text)):
        check_features([*FEATURES, outcome.name])


def test_a_column_that_the_contract_does_not_know_is_refused():
    with pytest.raises(ContractError, match="feature 'tailnum' is not in the contract; add it to INPUTS or DERIVED"):
        check_features(["carrier", "tailnum"])


# --- Loading: a broken row is refused with row, column and fix --------------------------------------------------


@pytest.fixture
def rows(flights):
    """Return a few real flights that a test may damage. Their labels are row numbers that do not start at 0."""
    return flights.iloc[1000:1020].copy()


def test_real_rows_are_accepted_and_left_unchanged(rows):
    before = rows.copy(deep=True)
    check_frame(rows)
    pd.testing.assert_frame_equal(rows, before)


@pytest.mark.parametrize("column", INPUTS, ids=lambda c: c.name)
def test_a_missing_column_is_named(rows, column):
    text = rf"^column '{column.name}' is missing; rebuild the data \(chapters/data/README.md\)$"
    with pytest.raises(DataError, match=text):
        check_frame(rows.drop(columns=column.name))


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("carrier", None, "None is missing"),
        ("scheduled_departure", pd.NaT, "NaT is missing"),
        ("distance_miles", np.nan, "nan is missing"),
        ("distance_miles", 0.0, "0.0 is outside 1 to 6000 miles"),
        ("temperature_f", 130.5, "130.5 is outside -60 to 130 °F"),
        ("humidity_pct", -0.5, "-0.5 is outside 0 to 100 %"),
        ("wind_speed_mph", 1048.4, "1048.4 is outside 0 to 150 mph"),
        ("recent_origin_delay_min", np.inf, "inf is outside -120 to 1500 min"),
    ],
)
def test_a_broken_value_is_refused_with_row_column_value_and_fix(rows, column, value, problem):
    if not isinstance(value, float):
        rows[column] = rows[column].astype(object)
    elif rows[column].dtype.kind == "i":
        rows[column] = rows[column].astype(float)
    rows.loc[1007, column] = value
    before = rows.copy(deep=True)
    text = f"row 1007, column '{column}': {problem} (1 such rows); correct the row or its source, then load again"
    with pytest.raises(DataError) as refusal:
        check_frame(rows)
    assert str(refusal.value) == text
    pd.testing.assert_frame_equal(rows, before)


def test_the_first_broken_row_is_named_and_all_are_counted(rows):
    rows.loc[[1003, 1005, 1011], "visibility_miles"] = 101.0
    with pytest.raises(DataError, match=r"^row 1003, column 'visibility_miles': 101.0 .* \(3 such rows\)"):
        check_frame(rows)


def test_a_missing_value_is_accepted_where_the_contract_allows_it_and_nowhere_else(rows):
    nullable = [c.name for c in INPUTS if c.nullable]
    check_frame(rows.assign(**dict.fromkeys(nullable, np.nan)))
    for name in sorted({c.name for c in INPUTS} - set(nullable)):
        with pytest.raises(DataError, match=f"row 1000, column '{name}': .* is missing"):
            check_frame(rows.assign(**{name: None}))


def test_the_range_is_inclusive(rows):
    for column in (c for c in INPUTS if c.kind == "number"):
        check_frame(rows.assign(**{column.name: column.low}))
        check_frame(rows.assign(**{column.name: column.high}))


def test_numbers_stored_as_text_are_refused(rows):
    rows["distance_miles"] = rows["distance_miles"].astype(str)
    value = rows.loc[1000, "distance_miles"]
    text = rf"row 1000, column 'distance_miles': {value} is .*\bnumbers?\b.* \(20 such rows\); correct the row"
    with pytest.raises(DataError, match=text):
        check_frame(rows)


def test_the_one_text_among_numbers_is_the_row_that_is_named(rows):
    rows["temperature_f"] = rows["temperature_f"].astype(object)
    rows.loc[1007, "temperature_f"] = "warm"
    with pytest.raises(DataError, match=r"row 1007, column 'temperature_f': warm is .*\bnumbers?\b.*; correct the row"):
        check_frame(rows)


def test_a_value_out_of_range_does_not_hide_in_a_column_of_objects(rows):
    rows["temperature_f"] = rows["temperature_f"].astype(object)
    rows.loc[1007, "temperature_f"] = 200.0
    with pytest.raises(DataError, match="column 'temperature_f'"):
        check_frame(rows)


@pytest.mark.parametrize("value", ["JFQ", ""])
def test_an_origin_that_is_none_of_the_three_airports_is_refused(rows, value):
    rows.loc[1007, "origin"] = value
    with pytest.raises(DataError, match=f"row 1007, column 'origin': {value} is not EWR, JFK or LGA"):
        check_frame(rows)


def test_a_category_that_is_no_text_is_refused(rows):
    rows.loc[1007, "carrier"] = 5
    with pytest.raises(DataError, match="row 1007, column 'carrier': 5 "):
        check_frame(rows)


def test_a_departure_stored_as_text_is_refused(rows):
    rows["scheduled_departure"] = rows["scheduled_departure"].astype(str)
    with pytest.raises(DataError, match="row 1000, column 'scheduled_departure': "):
        check_frame(rows)


def test_the_value_is_named_even_where_row_labels_repeat(rows):
    twice = pd.concat([rows, rows.assign(temperature_f=200.0)])
    with pytest.raises(DataError) as refusal:
        check_frame(twice)
    assert "column 'temperature_f': 200.0 is outside -60 to 130 °F (20 such rows)" in str(refusal.value)


def test_an_impossible_wind_in_the_source_is_removed_and_counted():
    weather, removed = load_weather()
    # The one known fault of chapters/data/README.md; nothing else is touched.
    assert {name: count for name, count in removed.items() if count} == {"wind_speed_mph": 1}
    assert weather["wind_speed_mph"].max() < 50
    assert not weather.duplicated(["origin", "time_hour"]).any()


def test_a_weather_file_in_another_unit_is_refused(tmp_path):
    """One faulty reading is removed; a column of them is no fault of a sensor."""
    raw = pd.read_parquet(data_folder() / "weather.parquet")
    raw.assign(wind_speed=raw["wind_speed"] * 10).to_parquet(tmp_path / "weather.parquet")
    with pytest.raises(DataError, match=r"weather.parquet holds impossible values: .*'wind_speed_mph': \d{3,}.*unit"):
        load_weather(tmp_path)


# --- Point in time: weather and recent delay use nothing from after the moment of scoring -----------------------

MOMENTS = st.datetimes(datetime.fromisoformat("2013-01-01"), datetime.fromisoformat("2013-12-31"))


@given(st.lists(MOMENTS, min_size=1, max_size=20))
def test_the_weather_row_is_the_last_one_complete_before_scoring(moments):
    scheduled = pd.Series(pd.to_datetime(moments))
    scored, stamp = scheduled - SCORING_LEAD, weather_hour(scheduled)
    hour = pd.Timedelta(hours=1)
    assert (stamp == stamp.dt.floor("h")).all()
    # A row stamped 9:00 tells about the hour that begins then, so it is complete at 10:00.
    assert (stamp + hour <= scored).all()
    # The next one was not complete yet.
    assert (stamp + 2 * hour > scored).all()


def test_real_flights_carry_the_weather_of_that_hour(flights):
    raw = pd.read_parquet(data_folder() / "weather.parquet")
    at = {(o, t): v for o, t, v in zip(raw["origin"], raw["time_hour"], raw["temp"], strict=True)}
    sample = flights.sample(200, random_state=1)
    scored = (sample["scheduled_utc"] - SCORING_LEAD).dt.tz_localize("UTC")
    stamps = scored.dt.floor("h") - pd.Timedelta(hours=1)
    expected = [at.get(key, np.nan) for key in zip(sample["origin"], stamps, strict=True)]
    np.testing.assert_array_equal(sample["temperature_f"].to_numpy(), np.array(expected, dtype=float))
    assert sample["temperature_f"].nunique() > 50


def minutes(values: list[int]) -> np.ndarray:
    """Return moments, given in minutes since the year began."""
    return np.datetime64("2013-01-01T00:00:00", "ns") + np.array(values, dtype="timedelta64[m]")


def slow_recent_delay(left_at: np.ndarray, delay: np.ndarray, scored_at: np.ndarray) -> list[float]:
    """Return what recent_origin_delay promises, by looking at every flight for every moment."""
    window = np.timedelta64(RECENT_WINDOW)
    means = []
    for moment in scored_at:
        seen = [d for at, d in zip(left_at, delay, strict=True) if moment - window < at <= moment]
        means.append(float(np.mean(seen)) if seen else math.nan)
    return means


# Few distinct minutes, so that ties and hits of the window's borders are common.
DEPARTURES = st.lists(st.tuples(st.integers(0, 400), st.integers(-30, 600)), max_size=40)
MOMENTS_MIN = st.lists(st.integers(0, 400), min_size=1, max_size=20)


@given(DEPARTURES, MOMENTS_MIN)
def test_recent_delay_agrees_with_a_slow_and_plain_computation(departures, moments):
    ordered = sorted(departures)
    left_at, scored_at = minutes([at for at, _ in ordered]), minutes(moments)
    delay = np.array([d for _, d in ordered], dtype=float)
    found = recent_origin_delay(left_at, delay, scored_at)
    np.testing.assert_allclose(found, slow_recent_delay(left_at, delay, scored_at), rtol=0, atol=1e-9)


def test_recent_delay_at_the_borders_of_its_window():
    # Scored at minute 300: the window is (180, 300].
    moment = minutes([300])
    cases = {(180, 10): math.nan, (181, 10): 10.0, (300, 10): 10.0, (301, 10): math.nan}
    for (at, delay), expected in cases.items():
        found = recent_origin_delay(minutes([at]), np.array([float(delay)]), moment)
        np.testing.assert_array_equal(found, [expected])
    # Flights that left in the same minute all count.
    np.testing.assert_array_equal(
        recent_origin_delay(minutes([200, 200, 200]), np.array([1.0, 2.0, 6.0]), moment), [3.0]
    )


@given(DEPARTURES, MOMENTS_MIN, st.integers(-30, 600))
def test_changing_what_left_after_scoring_changes_nothing(departures, moments, other):
    ordered = sorted(departures)
    left_at, delay = minutes([at for at, _ in ordered]), np.array([d for _, d in ordered], dtype=float)
    for moment in minutes(moments):
        changed = np.where(left_at > moment, other, delay)
        before, after = (recent_origin_delay(left_at, d, np.array([moment])) for d in (delay, changed))
        np.testing.assert_array_equal(before, after)


def test_recent_delay_of_200_real_flights(flights):
    departed = load_flights().dropna(subset="dep_delay")
    departed["left_at"] = departed["scheduled_utc"] + pd.to_timedelta(departed["dep_delay"], unit="min")
    by_origin = dict(tuple(departed.groupby("origin")))
    sample = flights.sample(200, random_state=2)
    expected = []
    for origin, scheduled in zip(sample["origin"], sample["scheduled_utc"], strict=True):
        others, scored = by_origin[origin], scheduled - SCORING_LEAD
        seen = others[(others["left_at"] > scored - RECENT_WINDOW) & (others["left_at"] <= scored)]
        expected.append(seen["dep_delay"].mean())
    np.testing.assert_allclose(sample["recent_origin_delay_min"], expected, rtol=0, atol=1e-9)
    # The sample has both: flights early in the morning with nothing before them, and busy hours.
    assert 5 < sample["recent_origin_delay_min"].isna().sum() < 100


def test_real_inputs_do_not_depend_on_what_happened_after_scoring():
    """Delay every departure from one moment on by ten hours: what was scored before that moment keeps its inputs."""
    table = load_flights().head(3000)
    moment = table["scheduled_utc"].iloc[1500]
    left_at = table["scheduled_utc"] + pd.to_timedelta(table["dep_delay"].fillna(0), unit="min")
    later = table.assign(dep_delay=table["dep_delay"].where(left_at <= moment, table["dep_delay"] + 600))
    scored_before = table["scheduled_utc"] - SCORING_LEAD <= moment
    before, after = (blueprint._add_recent_delay(t)["recent_origin_delay_min"] for t in (table, later))
    pd.testing.assert_series_equal(before[scored_before], after[scored_before])
    assert not before[~scored_before].equals(after[~scored_before])


# --- The data set and its label ---------------------------------------------------------------------------------


def test_every_flight_of_the_year_is_there_once_in_time_order(flights):
    assert len(flights) == 336_776
    assert not flights["identity"].duplicated().any()
    assert flights["scheduled_utc"].is_monotonic_increasing
    assert set(flights["origin"]) == set(ORIGINS)


def test_the_label_is_late_by_15_minutes_or_never_arrived(flights):
    arrived = flights["arr_delay"]
    assert flights[LABEL].isin([0, 1]).all()
    labels = flights.groupby(arrived, dropna=False)[LABEL].agg(["min", "max", "size"])
    for delay, expected in ((14.0, 0), (15.0, 1), (16.0, 1)):
        assert labels.loc[delay, ["min", "max"]].tolist() == [expected, expected]
        assert labels.loc[delay, "size"] > 1000
    never = flights[arrived.isna()]
    assert len(never) == 9430
    assert (never[LABEL] == 1).all()
    # Cancelled flights, which never left, are among them.
    assert never["dep_delay"].isna().sum() == 8255
    assert (flights.loc[arrived < 15, LABEL] == 0).all()


@given(MOMENTS)
def test_the_service_derives_what_training_derives(moment):
    table = add_derived(pd.DataFrame({"scheduled_departure": pd.to_datetime([moment])}))
    derived = (int(table["minute_of_day"].iloc[0]), int(table["day_of_week"].iloc[0]))
    assert derive(moment) == derived
    assert 0 <= derived[0] <= 1439
    assert 0 <= derived[1] <= 6


def test_derive_on_a_day_everyone_can_check():
    assert derive(datetime.fromisoformat("2013-01-01T05:15")) == (315, 1)  # a Tuesday


# --- Splits by time and their ledger ----------------------------------------------------------------------------


def test_splits_hold_every_row_once_and_follow_each_other(flights, splits):
    assert list(splits) == ["train", "validation", "test", "production"]
    assert pd.concat(splits.values())["identity"].tolist() == flights["identity"].tolist()
    for name, (first, after) in SPLITS.items():
        when = splits[name]["scheduled_departure"]
        assert when.min() >= pd.Timestamp(first)
        assert when.max() < pd.Timestamp(after)


def test_bounds_that_touch_or_leave_a_gap_are_fine():
    check_bounds({"a": ("2013-01-01", "2013-02-01"), "b": ("2013-02-01", "2013-03-01")})
    check_bounds({"a": ("2013-01-01", "2013-02-01"), "b": ("2013-05-01", "2013-06-01")})


@pytest.mark.parametrize(
    "bounds",
    [
        {"a": ("2013-01-01", "2013-02-02"), "b": ("2013-02-01", "2013-03-01")},
        {"a": ("2013-05-01", "2013-06-01"), "b": ("2013-02-01", "2013-03-01")},
    ],
    ids=["overlap", "wrong order"],
)
def test_splits_that_overlap_in_time_are_refused(flights, bounds):
    end = bounds["a"][1]
    text = (
        rf"^split 'b' starts on 2013-02-01, before split 'a' ends \({end}\): they overlap in time; move its first day$"
    )
    with pytest.raises(DataError, match=text):
        split_by_time(flights, bounds)


@pytest.mark.parametrize("last", ["2013-01-01", "2012-12-01"], ids=["empty", "reversed"])
def test_a_split_that_ends_before_it_begins_is_refused_for_that_reason(last):
    with pytest.raises(DataError, match=f"split 'a' .*{last}") as refusal:
        check_bounds({"a": ("2013-01-01", last)})
    # There is only one split, so it cannot overlap with another.
    assert "overlap" not in str(refusal.value)


def test_the_ledger_is_the_committed_one(splits):
    assert canonical_json(split_ledger(splits)) == (data_folder() / "split_ledger.json").read_bytes()


def test_the_ledger_notices_one_row_on_the_wrong_side_but_not_the_order_of_rows(splits):
    ledger = split_ledger(splits)
    shuffled = {name: part.sample(frac=1, random_state=3) for name, part in splits.items()}
    assert split_ledger(shuffled) == ledger
    moved = {
        **splits,
        "train": splits["train"].iloc[:-1],
        "validation": pd.concat([splits["train"].iloc[-1:], splits["validation"]]),
    }
    changed = split_ledger(moved)
    assert {name for name in ledger if changed[name]["rows_sha256"] != ledger[name]["rows_sha256"]} == {
        "train",
        "validation",
    }
    # The same number of rows, but one of them is another flight.
    swapped = {"test": pd.concat([splits["test"].iloc[1:], splits["train"].iloc[:1]])}
    assert split_ledger(swapped)["test"]["rows_sha256"] != ledger["test"]["rows_sha256"]


def test_sha256_text_is_the_usual_one():
    # What `printf 'a\nb' | sha256sum` prints.
    assert sha256_text(["a", "b"]) == "7e18f737311b2dc3b2f269dd78396b0351f14fb66efa879f768cb23181883c78"


def test_the_readme_of_the_data_states_the_hashes_of_the_files():
    readme = (data_folder() / "README.md").read_text(encoding="utf-8")
    stated = dict(re.findall(r"^\| `(\w+\.parquet)` \|.*\| `([0-9a-f]{64})` \|$", readme, re.MULTILINE))
    assert dataset_sha256() == stated


# --- Fingerprint of the feature engineering ---------------------------------------------------------------------


def test_the_fingerprint_of_the_features_repeats_and_ignores_what_is_no_feature(rows):
    fingerprint = features_sha256(rows)
    assert re.fullmatch("[0-9a-f]{64}", fingerprint)
    assert features_sha256(rows.copy()) == fingerprint
    assert features_sha256(rows.assign(**{LABEL: 1, "arr_delay": 0.0, "identity": "x"})) == fingerprint


@pytest.mark.parametrize("name", FEATURES)
def test_the_fingerprint_notices_one_changed_value_of_any_feature(rows, name):
    other = rows.copy()
    if name in NUMERIC:
        other[name] = other[name].astype(float)
        other.loc[1003, name] = 77.0
    else:
        other.loc[1003, name] = "ZZ"
    assert features_sha256(other) != features_sha256(rows)


def test_the_fingerprint_of_the_committed_release_belongs_to_these_features(root, splits):
    manifest = json.loads((root / "ops" / "releases" / "1.0.0" / "manifest.json").read_text())
    assert features_sha256(splits["train"]) == manifest["features_sha256"]


def test_the_model_sees_its_columns_in_order_as_text_and_32_bit_floats(rows):
    table = model_input(rows[rows.columns[::-1]])
    assert list(table) == list(FEATURES)
    assert {str(table[name].dtype) for name in NUMERIC} == {"float32"}


# --- JSON and versions ------------------------------------------------------------------------------------------


def test_canonical_json_has_one_form_and_no_nan():
    assert canonical_json({"b": 1, "a": "°F"}) == b'{\n  "a": "\xc2\xb0F",\n  "b": 1\n}\n'
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not JSON compliant"):
            canonical_json({"a": value})


def test_versions_sort_by_number_and_candidates_before_the_final_one():
    ordered = ["0.9.0", "1.0.0-rc.1", "1.0.0-rc.2", "1.0.0-rc.10", "1.0.0", "1.0.1", "1.2.0", "1.10.0", "2.0.0-rc.1"]
    as_text = sorted(ordered)
    assert as_text != ordered
    assert sorted(as_text, key=parse_version) == ordered


@pytest.mark.parametrize(
    "text",
    ["", "1", "1.0", "v1.0.0", "1.0.0.0", "01.0.0", "1.0.0-rc", "1.0.0-rc.0", "1.0.0-beta.1", "1.0.0 ", "1.0.0\n"],
)
def test_anything_else_is_no_version(text):
    with pytest.raises(VersionError, match=r"is not MAJOR.MINOR.PATCH or MAJOR.MINOR.PATCH-rc.N; write for example"):
        parse_version(text)


# --- Artifacts: whole or not at all, never overwritten, verified byte by byte -----------------------------------

FILES = {"model.onnx": b"graph", "metrics.json": b"{}\n", "notes.md": b"fine\n"}


def manifest_for(hashes: dict[str, str], version: str = "1.0.0", **changes: object) -> Manifest:
    """Return a small but valid manifest."""
    born = Provenance(git_sha="abc", trained_at="2013-01-01", lock_sha256="0", dependencies={}, platform="any")
    return Manifest.model_validate(
        {
            "name": "tiny",
            "version": version,
            "label": "late",
            "features": [],
            "inputs": [],
            "preprocessing": [],
            "threshold": 0.5,
            "metrics": {},
            "dataset_sha256": {},
            "ledger_sha256": "0",
            "features_sha256": "0",
            "provenance": born,
            "files": hashes,
            **changes,
        }
    )


@pytest.fixture
def shelf(tmp_path):
    """Return a folder that holds one registered version, 1.0.0."""
    _, digest = write_artifact(tmp_path, FILES, manifest_for)
    register(tmp_path, "1.0.0", digest)
    return tmp_path


def everything(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder with its bytes; a folder ends in a slash and has none."""
    return {
        path.relative_to(folder).as_posix() + ("/" if path.is_dir() else ""): b""
        if path.is_dir()
        else path.read_bytes()
        for path in folder.rglob("*")
    }


def test_what_is_written_verifies_and_its_digest_is_that_of_the_manifest(shelf):
    folder = shelf / "1.0.0"
    assert {p.name for p in folder.iterdir()} == {*FILES, MANIFEST}
    digest = artifact_digest((folder / MANIFEST).read_bytes())
    assert read_registry(shelf).versions == {"1.0.0": digest}
    assert verify_artifact(folder, digest).version == "1.0.0"
    assert [p.name for p in shelf.iterdir() if p.name.startswith(".")] == []


def test_the_same_content_again_is_no_change_even_from_another_commit(shelf):
    before = everything(shelf)
    digest = read_registry(shelf).versions["1.0.0"]
    later = Provenance(git_sha="def", trained_at="2014-01-01", lock_sha256="1", dependencies={}, platform="other")
    assert write_artifact(shelf, FILES, lambda h: manifest_for(h, provenance=later)) == (shelf / "1.0.0", digest)
    assert everything(shelf) == before


def test_other_content_under_a_used_version_is_refused_with_the_files_that_differ(shelf):
    before = everything(shelf)
    other = {"model.onnx": b"other graph", "metrics.json": FILES["metrics.json"], "new.txt": b"new"}
    text = r"version 1.0.0 exists with other content \(model.onnx, new.txt, notes.md\); raise the version"
    with pytest.raises(VersionError, match=text):
        write_artifact(shelf, other, manifest_for)
    with pytest.raises(VersionError, match=r"exists with other content \(manifest fields\); raise the version"):
        write_artifact(shelf, FILES, lambda h: manifest_for(h, threshold=0.4))
    assert everything(shelf) == before


@pytest.mark.parametrize("fatal", [OSError("disk full"), KeyboardInterrupt()], ids=["disk full", "interrupted"])
def test_a_write_that_dies_in_the_middle_leaves_nothing_and_touches_nothing(shelf, monkeypatch, fatal):
    before, really_write = everything(shelf), Path.write_bytes
    written: list[str] = []

    def dies_at_the_second_file(path, data):
        if written:
            raise fatal
        written.append(path.name)
        return really_write(path, data)

    monkeypatch.setattr(Path, "write_bytes", dies_at_the_second_file)
    with pytest.raises(type(fatal)):
        write_artifact(shelf, FILES, lambda h: manifest_for(h, "1.1.0"))
    assert written == ["model.onnx"]
    assert everything(shelf) == before
    monkeypatch.undo()
    folder, _ = write_artifact(shelf, FILES, lambda h: manifest_for(h, "1.1.0"))
    assert verify_artifact(folder).version == "1.1.0"


def test_no_version_is_visible_before_its_last_file_is_written(shelf, monkeypatch):
    seen, really_write = [], Path.write_bytes

    def look_around(path, data):
        seen.append((shelf / "1.1.0").exists())
        return really_write(path, data)

    monkeypatch.setattr(Path, "write_bytes", look_around)
    write_artifact(shelf, FILES, lambda h: manifest_for(h, "1.1.0"))
    assert seen == [False] * (len(FILES) + 1)


def tamper(folder: Path, how: str) -> None:
    """Change an artifact in one of the ways that must be noticed."""
    model = folder / "model.onnx"
    if how == "flipped byte":
        model.write_bytes(bytes([model.read_bytes()[0] ^ 1]) + model.read_bytes()[1:])
    elif how == "missing":
        model.unlink()
    elif how == "extra":
        (folder / "extra.txt").write_text("hello")
    elif how == "hidden extra":
        (folder / ".extra").write_text("hello")
    elif how == "symlink":
        model.rename(folder.parent / "elsewhere")
        model.symlink_to(folder.parent / "elsewhere")
    elif how == "folder":
        model.unlink()
        model.mkdir()


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("flipped byte", "1.0.0/model.onnx was changed: its SHA-256 is not the manifest's"),
        ("missing", "1.0.0/model.onnx is missing or not a plain file; fetch the artifact again"),
        ("extra", "1.0.0/extra.txt is not listed in the manifest; remove it"),
        ("hidden extra", "1.0.0/.extra is not listed in the manifest; remove it"),
        ("symlink", "1.0.0/model.onnx is missing or not a plain file; fetch the artifact again"),
        ("folder", "1.0.0/model.onnx is missing or not a plain file; fetch the artifact again"),
    ],
)
def test_a_changed_artifact_is_refused_and_the_file_named(shelf, how, problem):
    tamper(shelf / "1.0.0", how)
    for digest in (None, read_registry(shelf).versions["1.0.0"]):
        with pytest.raises(ArtifactError, match=re.escape(problem)):
            verify_artifact(shelf / "1.0.0", digest)


def test_an_edited_threshold_is_refused_like_an_edited_model(shelf):
    path, digest = shelf / "1.0.0" / MANIFEST, read_registry(shelf).versions["1.0.0"]
    path.write_bytes(path.read_bytes().replace(b'"threshold": 0.5', b'"threshold": 0.9'))
    # The folder still agrees with itself; only the digest kept outside it tells.
    assert verify_artifact(path.parent).threshold == 0.9
    now = artifact_digest(path.read_bytes())
    with pytest.raises(ArtifactError) as refusal:
        verify_artifact(path.parent, digest)
    expected = f"1.0.0/manifest.json has digest {now}, expected {digest}; it was changed after it was registered"
    assert str(refusal.value) == expected


def test_a_folder_without_a_manifest_says_how_to_get_one(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for folder in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(
            ArtifactError, match=r"cannot read .*manifest.json: .*; run `make train`, or point MODEL_URI"
        ):
            verify_artifact(folder)


@pytest.mark.parametrize("content", [b'{"name": "tiny"}', b"{half", b""], ids=["fields lost", "cut off", "empty"])
def test_a_manifest_that_is_no_manifest_is_an_artifact_error(shelf, content):
    (shelf / "1.0.0" / MANIFEST).write_bytes(content)
    with pytest.raises(ArtifactError, match=MANIFEST):
        verify_artifact(shelf / "1.0.0")


def test_a_manifest_with_a_field_that_nobody_knows_is_an_artifact_error(shelf):
    path = shelf / "1.0.0" / MANIFEST
    path.write_bytes(canonical_json({**json.loads(path.read_bytes()), "surprise": 1}))
    with pytest.raises(ArtifactError, match="surprise"):
        verify_artifact(path.parent, artifact_digest(path.read_bytes()))


@pytest.mark.parametrize("call", ["iterdir", "open"])
def test_a_folder_or_file_that_may_not_be_read_is_an_artifact_error(shelf, monkeypatch, call):
    really_open = Path.open

    def refused(path, *arguments, **options):
        if call == "open" and path.name != "model.onnx":
            return really_open(path, *arguments, **options)
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, call, refused)
    with pytest.raises(ArtifactError, match="Permission denied"):
        verify_artifact(shelf / "1.0.0")


@pytest.mark.parametrize("version", ["1.0", "../1.0.0", "latest"])
def test_what_is_no_version_is_not_written(tmp_path, version):
    with pytest.raises(VersionError, match=r"is not MAJOR.MINOR.PATCH"):
        write_artifact(tmp_path / "shelf", FILES, lambda h: manifest_for(h, version))
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_cannot_name_a_file_outside_its_folder(shelf):
    (shelf / "elsewhere").write_bytes(b"x")
    path = shelf / "1.0.0" / MANIFEST
    content = json.loads(path.read_bytes())
    content["files"]["../elsewhere"] = sha256_text(["x"])
    path.write_bytes(canonical_json(content))
    with pytest.raises(ArtifactError, match=r"manifest.json lists '../elsewhere', which is not a plain file name"):
        verify_artifact(path.parent)


# --- The registry: digests outside the folders, channels that point to verified versions ------------------------


def test_a_version_keeps_the_digest_it_was_given_first(shelf):
    digest = read_registry(shelf).versions["1.0.0"]
    register(shelf, "1.0.0", digest)
    with pytest.raises(VersionError, match=f"version 1.0.0 is registered as {digest}, not sha256:other; raise"):
        register(shelf, "1.0.0", "sha256:other")
    assert read_registry(shelf).versions == {"1.0.0": digest}


def test_a_channel_points_to_a_registered_and_verified_version_only(shelf):
    with pytest.raises(ArtifactError, match=r"channel 'staging' points to nothing; run `make train` first"):
        resolve_channel(shelf, "staging")
    point_channel(shelf, "staging", "1.0.0")
    assert resolve_channel(shelf, "staging") == (shelf / "1.0.0", read_registry(shelf).versions["1.0.0"])
    with pytest.raises(VersionError, match=r"version 2.0.0 is not registered; known: 1.0.0"):
        point_channel(shelf, "staging", "2.0.0")
    assert read_registry(shelf).channels == {"staging": "1.0.0"}


def test_prod_takes_approved_versions_only(shelf, monkeypatch):
    releases = shelf / "releases"
    releases.mkdir()
    monkeypatch.setattr(blueprint, "releases_folder", lambda: releases)
    with pytest.raises(VersionError, match=r"version 1.0.0 is not approved, so it cannot go to prod; approved: none"):
        point_channel(shelf, "prod", "1.0.0")
    point_channel(shelf, "staging", "1.0.0")
    (releases / "1.0.0").mkdir()
    (releases / "1.0.0" / "approval.json").write_text("{}")
    point_channel(shelf, "prod", "1.0.0")
    assert read_registry(shelf).channels == {"staging": "1.0.0", "prod": "1.0.0"}


def test_approved_versions_are_listed_from_old_to_new_and_nothing_else_is(tmp_path):
    for name in ("1.10.0", "1.9.0", "1.10.0-rc.1", ".1.11.0.writing"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "approval.json").write_text("{}")
    (tmp_path / "2.0.0").mkdir()
    (tmp_path / "README.md").write_text("about releases")
    assert approved_versions(tmp_path) == ["1.9.0", "1.10.0-rc.1", "1.10.0"]
    assert approved_versions(tmp_path / "nowhere") == []


def test_a_channel_is_not_moved_to_a_tampered_version(shelf):
    tamper(shelf / "1.0.0", "flipped byte")
    with pytest.raises(ArtifactError, match=r"model.onnx was changed"):
        point_channel(shelf, "staging", "1.0.0")
    assert read_registry(shelf).channels == {}


def test_an_empty_folder_has_an_empty_registry(tmp_path):
    assert read_registry(tmp_path).model_dump() == {"versions": {}, "channels": {}}
    with pytest.raises(VersionError, match=r"version 1.0.0 is not registered; known: none"):
        point_channel(tmp_path, "staging", "1.0.0")


def test_the_registry_is_replaced_in_one_step(shelf, monkeypatch):
    """Whatever happens while it is written, a reader finds the old registry or the new one."""
    before = (shelf / "registry.json").read_bytes()

    def dies(path, target):
        assert json.loads(path.read_bytes())["channels"] == {"staging": "1.0.0"}
        assert (shelf / "registry.json").read_bytes() == before
        raise OSError("power cut")

    monkeypatch.setattr(Path, "replace", dies)
    with pytest.raises(OSError, match="power cut"):
        point_channel(shelf, "staging", "1.0.0")
    assert (shelf / "registry.json").read_bytes() == before


def test_whoever_may_read_an_artifact_may_read_the_registry(shelf):
    """A service runs under another user than the training: both need the same permissions."""
    registry, manifest = (stat.S_IMODE(p.stat().st_mode) for p in (shelf / "registry.json", shelf / "1.0.0" / MANIFEST))
    assert oct(registry) == oct(manifest)


# --- Bins: the expected shares that drift is measured against ---------------------------------------------------

NUMBERS = st.lists(st.one_of(st.floats(-100, 100, width=32), st.just(math.nan)), min_size=1, max_size=60).filter(
    lambda values: any(not math.isnan(v) for v in values)
)


@given(NUMBERS)
def test_shares_of_numbers_add_up_to_one_and_missing_is_counted(values):
    array = np.array(values)
    edges = bin_edges(array)
    shares = number_shares(array, edges)
    assert edges == sorted(set(edges))
    assert len(edges) <= BINS - 1
    assert list(shares) == [*(str(i) for i in range(len(edges) + 1)), MISSING]
    assert sum(shares.values()) == pytest.approx(1, abs=1e-12)
    assert shares[MISSING] == pytest.approx(np.isnan(array).mean(), abs=1e-12)


def test_a_value_on_an_edge_lies_above_it():
    assert number_shares(np.array([0.0, 1.0, 1.5, 2.0]), [1.0, 2.0]) == {"0": 0.25, "1": 0.5, "2": 0.25, MISSING: 0.0}


@pytest.mark.parametrize("value", [0.1, 11.5078, 39.02])
def test_a_repeated_value_lies_above_its_own_edge_in_32_and_in_64_bits(value):
    """Half of the rows have one value, so it becomes an edge; not all decimals survive 32 bits."""
    values = np.array([-5.0] * 25 + [value] * 50 + [90.0] * 25)
    edges = bin_edges(values)
    above = number_shares(values, edges)
    assert above == number_shares(values.astype(np.float32), edges)
    position = int(np.argmin(np.abs(np.array(edges) - value)))
    assert above[str(position + 1)] >= 0.5


@pytest.mark.parametrize("name", NUMERIC)
def test_expected_shares_are_those_of_what_the_model_sees(splits, name):
    """The service sees 32-bit numbers: without drift its bins must fill like the reference's."""
    train = splits["train"]
    reference = make_reference(train.head(20_000), np.linspace(0, 1, 20_000))["features"][name]
    seen = model_input(train.head(20_000))[name].to_numpy()
    assert number_shares(seen, reference["edges"]) == reference["shares"]


def test_a_constant_column_has_one_edge():
    edges = bin_edges(np.full(50, 3.0))
    assert edges == [3.0]
    assert number_shares(np.full(50, 3.0), edges) == {"0": 0.0, "1": 1.0, MISSING: 0.0}


def test_common_categories_have_bins_and_the_rest_share_one():
    values = ["b"] * 3 + ["a"] * 3 + ["c"] * 2 + ["d", "e"]
    assert category_shares(values, common=3) == {"a": 0.3, "b": 0.3, "c": 0.2, OTHER: pytest.approx(0.2)}
    assert category_shares(["a", "b"]) == {"a": 0.5, "b": 0.5, OTHER: 0.0}


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=50), st.integers(1, 10))
def test_shares_of_categories_add_up_to_one(values, common):
    shares = category_shares(values, common)
    assert sum(shares.values()) == pytest.approx(1, abs=1e-12)
    assert len(shares) <= common + 1
    assert min(shares.values()) >= 0


def test_the_reference_covers_every_feature_and_the_score(rows):
    reference = make_reference(rows, np.linspace(0, 1, len(rows)))
    assert reference["rows"] == len(rows)
    assert set(reference["features"]) == set(FEATURES)
    for part in (*reference["features"].values(), reference["score"]):
        assert sum(part["shares"].values()) == pytest.approx(1, abs=1e-9)
    for name in CATEGORICAL:
        assert reference["features"][name]["known"] == sorted(set(rows[name]))
    parts = [(reference["score"]["by_origin"][o][b] * (rows.origin == o).mean()) for o in ORIGINS for b in ("0", "9")]
    assert sum(parts) == pytest.approx(reference["score"]["shares"]["0"] + reference["score"]["shares"]["9"])
    assert json.loads(canonical_json(reference)) == reference


# --- The practice log and the headline --------------------------------------------------------------------------


def write_entry(check: Any, log: Path | None = None, objective: str = "try", **who: str) -> dict[str, Any]:
    """Return the practice entry with this success check."""
    return practice("1", objective, check=check, changed="nothing", next_test="more", log=log, **who)


def test_a_practice_entry_is_written_only_when_its_check_holds(tmp_path):
    log = tmp_path / "deep" / "log.jsonl"
    with pytest.raises(AssertionError, match="'1': the success check did not hold; the entry is not written"):
        write_entry(lambda: 1 > 2, log)
    assert list(tmp_path.iterdir()) == []
    written = write_entry(lambda: 2 > 1, log)
    assert [json.loads(line) for line in log.read_text().splitlines()] == [written]
    assert (written["milestone"], written["objective"], written["by"]) == ("1", "try", "book")


def test_a_practice_entry_replaces_the_authors_own_earlier_one_and_no_other(tmp_path):
    log = tmp_path / "log.jsonl"
    for objective, by in (("first", "book"), ("mine", "Ann"), ("second", "book")):
        write_entry(lambda: True, log, objective, by=by)
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted((entry["by"], entry["objective"]) for entry in entries) == [("Ann", "mine"), ("book", "second")]


def test_a_practice_check_that_raises_writes_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write_entry(lambda: 1 / 0 > 1, tmp_path / "log.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_a_practice_check_may_compare_numbers_from_numpy():
    """Metrics are often numpy numbers, and what comparing them gives is not Python's own True."""
    assert write_entry(lambda: np.float64(0.7) > 0.6)["milestone"] == "1"
    with pytest.raises(AssertionError, match="did not hold"):
        write_entry(lambda: np.float64(0.5) > 0.6)


def test_a_headline_reads_well_for_people_and_for_tools():
    headline = Headline("a thing", roc_auc="0.7")
    assert repr(headline) == "a thing: roc auc 0.7"
    bundle = headline._repr_mimebundle_()
    assert bundle["application/json"] == {"built": "a thing", "numbers": {"roc auc": "0.7"}}
