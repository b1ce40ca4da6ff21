"""Replay, delayed labels and quality: point in time, whole or not at all, the numbers of training, rules that fit."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sklearn.metrics import brier_score_loss, roc_auc_score

from mlops_course.blueprint import INPUTS, MODEL_NAME
from mlops_course.monitoring import (
    MATURITY,
    QUALITY_RULES,
    Joined,
    LabelStore,
    Outcome,
    QualityMetrics,
    ReplayError,
    Sample,
    Scored,
    Step,
    assess_quality,
    bookmarks,
    day_draws,
    day_sums,
    duration,
    estimate,
    forget,
    joined,
    known_at,
    label_counts,
    latest_quality,
    mature_days,
    measure,
    measures,
    paced,
    play,
    record,
    reference_month,
    replay,
    replayed_to,
    scaled_window,
    sender,
    warned_within_budget,
    write_step,
)
from mlops_course.release import Reply
from mlops_course.training import as_request, calibration_error, calibration_table, recall_at_budget, warned_first

from ..conftest import clean_environment

HOUR, DAY = 3_600, 86_400
LEAD = 2 * HOUR
FIRST = 1_378_000_000  # some second in September 2013


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LabelStore]:
    with closing(LabelStore(tmp_path / "labels.sqlite")) as one:
        yield one


def scored(number: int, at: int = FIRST, day: str = "2013-09-01", score: float = 0.2, version: str = "1.0.0") -> Scored:
    """Return a prediction."""
    return Scored(f"{number:032x}", version, f"abc-{version}-def", at, day, "EWR", score, int(score >= 0.34))


def outcome(number: int, at: int, disrupted: int = 0) -> Outcome:
    """Return what became of it."""
    return Outcome(f"{number:032x}", disrupted, at)


def fake(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answer like a service: a probability that depends on the request alone."""
    return [
        {
            "request_id": one["request_id"],
            "model_version": "1.0.0",
            "release": "abc-1.0.0-def",
            "probability": int(one["request_id"][:4], 16) % 10_001 / 10_000,
            "prediction": "on_time",
        }
        for one in requests
    ]


# The recording


@pytest.mark.parametrize(
    ("first", "last", "minutes"), [("2013-11-01", "2013-11-30", 1), ("2013-09-01", "2013-09-30", 60)]
)
def test_the_recent_delay_equals_training_to_the_last_bit(flights, first, last, minutes):
    """November has the night in which the clock goes back."""
    day = flights["scheduled_departure"].dt.strftime("%Y-%m-%d")
    part = flights[(day >= first) & (day <= last)]
    ids = record(flights, first, last).ids
    expected = dict(zip(ids, part.sort_values("scheduled_utc", kind="stable")["recent_origin_delay_min"], strict=True))
    seen = {
        r["request_id"]: r["recent_origin_delay_min"]
        for s in play(record(flights, first, last), minutes)
        for r in s.requests
    }
    assert seen.keys() == expected.keys()
    wrong = [name for name, delay in expected.items() if seen[name] != (None if np.isnan(delay) else delay)]
    assert wrong == []


def test_a_request_is_the_one_of_training(flights):
    """All fields, types and the way a missing value is written."""
    day = flights[flights["scheduled_departure"].dt.strftime("%Y-%m-%d") == "2013-12-30"]
    assert day["temperature_f"].isna().any()
    recording = record(flights, "2013-12-30", "2013-12-30")
    sent = {r["request_id"]: r for s in play(recording, 60) for r in s.requests}
    for name, row in zip(recording.ids, day.to_dict("records"), strict=True):
        assert sent[name] == as_request(row) | {"request_id": name}
    assert {c.name for c in INPUTS} | {"request_id"} == next(iter(sent.values())).keys()


def test_a_flight_has_one_id_and_no_other_flight_has_it(flights):
    whole, part = record(flights, "2013-09-01", "2013-12-31"), record(flights, "2013-12-30", "2013-12-30")
    assert len(set(whole.ids)) == len(whole) == 111_866
    assert set(part.ids) < set(whole.ids)
    assert all(re.fullmatch("[0-9a-f]{32}", name) for name in whole.ids)
    assert whole.ids == sorted(whole.ids, key=lambda name: name[:8])


def test_nothing_from_the_future_reaches_a_request(flights):
    """Whatever leaves after a moment may change; what was asked until then does not."""
    part = flights[flights["scheduled_departure"].dt.strftime("%Y-%m-%d").between("2013-12-04", "2013-12-06")].copy()
    until = pd.Timestamp("2013-12-05 18:00")
    later = (part["scheduled_utc"] + pd.to_timedelta(part["dep_delay"], unit="min") > until).to_numpy()
    other = part.copy()
    other.loc[later, "dep_delay"] = 777.0 + other.loc[later, "dep_delay"]
    kept = list(play(record(part, "2013-12-05", "2013-12-05"), 30))
    changed = list(play(record(other, "2013-12-05", "2013-12-05"), 30))
    end = int(until.timestamp())
    assert [s.requests for s in kept if s.at <= end] == [s.requests for s in changed if s.at <= end]
    assert [s.requests for s in kept if s.at > end + 3 * HOUR] != [s.requests for s in changed if s.at > end + 3 * HOUR]


def test_every_flight_and_every_outcome_comes_once_and_in_time(flights):
    recording = record(flights, "2013-12-05", "2013-12-06")
    steps = list(play(recording, 10))
    ids = [r["request_id"] for s in steps for r in s.requests]
    landed = [o for s in steps for o in s.outcomes]
    assert sorted(ids) == sorted(recording.ids)
    assert len(ids) == len(set(ids)) == len(recording)
    assert sorted(o.request_id for o in landed) == sorted(ids)
    at = dict(zip(recording.ids, recording.scored_at.tolist(), strict=True))
    assert all(o.known_at > at[o.request_id] for o in landed)
    before = 0
    for step in steps:
        assert all(before < moment <= step.at for moment in step.scored_at)
        assert all(before < o.known_at <= step.at for o in step.outcomes)
        before = step.at
    assert steps[-1].at >= recording.scored_at[-1] + LEAD + MATURITY.total_seconds()


def test_when_an_outcome_is_known():
    due = pd.Timestamp("2013-09-01 12:00")
    flights = pd.DataFrame(
        {
            "scheduled_utc": [due] * 3,
            "dep_delay": [20.0, 10.0, np.nan],
            "air_time": [100.0, np.nan, np.nan],
            "arr_delay": [5.0, np.nan, np.nan],
        },
        index=["landed", "diverted", "cancelled"],
    )
    waits = {name: (at - due).total_seconds() / 60 for name, at in known_at(flights).items()}
    assert waits == {"landed": 20 + 100 + 30, "diverted": 10 + 24 * 60, "cancelled": 180}


def test_days_that_are_not_in_the_data_are_refused(flights):
    with pytest.raises(
        ValueError, match="no flights from 2014-02-01 to 2014-02-02; the data has 2013-01-01 to 2013-12-31"
    ):
        record(flights, "2014-02-01", "2014-02-02")


# Speed


def test_a_step_waits_for_its_time_and_never_longer():
    now, naps = [100.0], []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        now[0] += seconds

    played = []
    for step in paced([Step(at, [], [], []) for at in (0, 600, 660, 1_200)], 60, lambda: now[0], sleep):
        played.append((step.at, now[0]))
        now[0] += 10.5 if step.at == 600 else 0  # a slow service: the replay is late, and catches up
    assert played == [(0, 100.0), (600, 110.0), (660, 120.5), (1_200, 120.5)]
    assert naps == [0, 10, 0, 0]


def test_as_fast_as_possible_never_waits():
    def sleep(seconds: float) -> None:
        raise AssertionError(seconds)

    assert len(list(paced([Step(at, [], [], []) for at in (0, 9_999)], 0, sleep=sleep))) == 2


@pytest.mark.parametrize(
    ("window", "speed", "real"),
    [
        ("1d", 60, "24m"),
        ("6h", 60, "6m"),
        ("90m", 60, "90s"),
        ("1h30m", 1, "90m"),
        ("2w", 1, "14d"),
        ("1d", 3_600, "24s"),
    ],
)
def test_windows_shrink_with_time(window, speed, real):
    assert scaled_window(window, speed) == real


@pytest.mark.parametrize("text", ["", "1", "d", "1d2", "1 d", "1y", "-1d"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match="is not a duration"):
        duration(text)


def test_a_window_that_nobody_could_scrape_is_refused():
    with pytest.raises(ValueError, match="shorter than a second; replay more slowly"):
        scaled_window("1m", 600)


# The store


def test_the_first_of_two_rows_is_kept_and_the_second_counted(store):
    write_step(store, [scored(1), scored(1, score=0.9), scored(1, version="2.0.0")], [], at=FIRST)
    write_step(store, [scored(1, score=0.8)], [outcome(1, FIRST + HOUR, 1)], at=FIRST + HOUR)
    write_step(store, [], [outcome(1, FIRST + 2 * HOUR, 0)], at=FIRST + 2 * HOUR)
    assert store.rows("SELECT model_version, probability FROM predictions ORDER BY 1") == [
        ("1.0.0", 0.2),
        ("2.0.0", 0.2),
    ]
    assert store.rows("SELECT disrupted, known_at FROM outcomes") == [(1, FIRST + HOUR)]
    counts = label_counts(store, "1.0.0")
    assert (counts["repeated predictions"], counts["repeated outcomes"]) == (2, 1)


def test_late_missing_and_orphaned_labels_are_told_apart(store):
    end = FIRST + LEAD + int(MATURITY.total_seconds())  # from here on the day is mature
    write_step(store, [scored(n) for n in range(4)], [outcome(0, FIRST + 3 * HOUR), outcome(99, FIRST)], at=end)
    write_step(store, [], [outcome(1, end + 1)], at=end + 10)
    write_step(store, [scored(5, at=end, day="2013-09-02")], [], at=end + 10)
    counts = label_counts(store, "1.0.0")
    expected = {"predictions": 5, "mature": 4, "labelled": 2, "late": 1, "outcomes without a prediction": 1}
    assert {name: counts[name] for name in expected} == expected
    assert label_counts(store, "1.0.0", now=end)["labelled"] == 1


def test_a_day_is_mature_only_after_its_window(store):
    write_step(store, [scored(0), scored(1, at=FIRST + HOUR)], [], at=FIRST + HOUR)
    write_step(store, [scored(2, at=FIRST + DAY, day="2013-09-02")], [], at=FIRST + DAY)
    mature = FIRST + HOUR + LEAD + int(MATURITY.total_seconds())
    assert mature_days(store, "1.0.0", now=mature - 1) == []
    assert mature_days(store, "1.0.0", now=mature) == ["2013-09-01"]
    assert mature_days(store, "2.0.0", now=mature) == []


def test_the_past_is_answered_as_it_was_known_then(store):
    write_step(
        store, [scored(0), scored(1)], [outcome(0, FIRST + HOUR, 1), outcome(1, FIRST + 5 * HOUR, 1)], at=FIRST + DAY
    )
    assert np.isnan(joined(store, "1.0.0", ["2013-09-01"], now=FIRST).label).all()
    assert joined(store, "1.0.0", ["2013-09-01"], now=FIRST + 2 * HOUR).label.tolist()[0] == 1.0
    assert joined(store, "1.0.0", ["2013-09-01"]).label.tolist() == [1.0, 1.0]


def test_a_step_is_written_whole_or_not_at_all(store):
    bad: Any = Outcome("x", None, FIRST)  # type: ignore[arg-type]  # that is the mistake
    with pytest.raises(Exception, match="NOT NULL"):
        write_step(store, [scored(1)], [outcome(1, FIRST), bad], at=FIRST)
    assert store.rows("SELECT count(*) FROM predictions") == [(0,)]
    assert store.rows("SELECT count(*) FROM outcomes") == [(0,)]
    assert replayed_to(store) == 0


def test_old_days_are_deleted_whole_and_nothing_else(store):
    for number in range(10):
        at, day = FIRST + number * DAY, f"2013-09-{number + 1:02}"
        both = [scored(number, at=at, day=day), scored(100 + number, at=at + 2 * HOUR, day=day)]
        write_step(store, both, [outcome(number, at + HOUR), outcome(200 + number, at)], at=at + 2 * HOUR)
    assert forget(store, keep_days=3) == 6 * 2 + 6 + 7  # the orphan of the seventh day is older than its day
    assert store.rows("SELECT min(day), count(*) FROM predictions") == [("2013-09-07", 8)]
    assert label_counts(store, "1.0.0")["outcomes without a prediction"] == 3
    assert forget(store, keep_days=3) == 0


WRITER = """
import sys
from pathlib import Path
from mlops_course.monitoring import LabelStore, Outcome, Scored, write_step
store, n = LabelStore(Path(sys.argv[1])), 0
while True:
    ids = [f"{n:016x}{i:016x}" for i in range(50)]
    rows = [Scored(one, "1.0.0", "r", n, "2013-09-01", "EWR", 0.5, 1) for one in ids]
    write_step(store, rows, [Outcome(one, 0, n) for one in ids], at=n)
    n += 1
    print(n, flush=True)
"""


def test_a_killed_writer_leaves_whole_steps(tmp_path):
    """SIGKILL at any moment: what was reported is there, and no step is there in part."""
    for steps_seen in (3, 17, 40):
        path = tmp_path / f"{steps_seen}.sqlite"
        command = [sys.executable, "-c", WRITER, str(path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=clean_environment())
        assert process.stdout is not None
        reported = [int(process.stdout.readline()) for _ in range(steps_seen)][-1]
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        reported = max([reported, *map(int, process.stdout.read().split()[-1:])])
        process.stdout.close()
        with closing(LabelStore(path)) as store:
            steps = store.rows("SELECT count(*) FROM predictions p JOIN outcomes USING (request_id) GROUP BY scored_at")
            assert {count for (count,) in steps} == {50}
            assert len(steps) in (reported, reported + 1)
            assert replayed_to(store) == len(steps) - 1


# The replay


def content(store: LabelStore) -> list[list[tuple[Any, ...]]]:
    """Return all that matters of a store."""
    return [
        store.rows("SELECT * FROM predictions ORDER BY request_id"),
        store.rows("SELECT * FROM outcomes ORDER BY request_id"),
        store.rows("SELECT * FROM counts ORDER BY name"),
    ]


def run(store: LabelStore, steps: Iterator[Step], most: int | None = None) -> None:
    """Replay some steps."""
    for number, _ in enumerate(replay(steps, [fake], store), 1):
        if number == most:
            break


@pytest.mark.parametrize("interrupted_after", [1, 7, 13, 40])
def test_an_interrupted_replay_goes_on_where_it_was(flights, tmp_path, interrupted_after):
    recording = record(flights, "2013-12-05", "2013-12-05")
    with closing(LabelStore(tmp_path / "a")) as whole, closing(LabelStore(tmp_path / "b")) as parts:
        run(whole, play(recording, 30))
        run(parts, play(recording, 30), most=interrupted_after)
        run(parts, play(recording, 30, *bookmarks(parts)))
        assert content(parts) == content(whole)
        run(parts, play(recording, 30, *bookmarks(parts)))  # nothing is left: nothing happens
        assert content(parts) == content(whole)


def test_days_that_are_added_later_lose_no_flight(flights, tmp_path):
    """The clock has run past the first flights of the second day when it comes."""
    one, both = record(flights, "2013-12-05", "2013-12-05"), record(flights, "2013-12-05", "2013-12-06")
    with closing(LabelStore(tmp_path / "a")) as whole, closing(LabelStore(tmp_path / "b")) as parts:
        run(whole, play(both, 60))
        run(parts, play(one, 60))
        run(parts, play(both, 60, *bookmarks(parts)))
        assert content(parts)[:2] == content(whole)[:2]
        assert label_counts(parts, "1.0.0") == label_counts(whole, "1.0.0")


def test_what_was_answered_and_not_written_is_sent_again(flights, tmp_path):
    """The service answered, then the replay died: the step is asked again and counts once."""
    recording, sent = record(flights, "2013-12-05", "2013-12-05"), []

    def dies(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        sent.append(len(requests))
        if len(sent) == 5:
            raise KeyboardInterrupt
        return fake(requests)

    with closing(LabelStore(tmp_path / "a")) as store:
        with pytest.raises(KeyboardInterrupt):
            list(replay(play(recording, 60), [dies], store))
        assert store.rows("SELECT count(*) FROM predictions") == [(sum(sent[:4]),)]
        list(replay(play(recording, 60, *bookmarks(store)), [dies], store))
        assert sent[4] == sent[5]
        assert store.rows("SELECT count(*) FROM predictions") == [(len(recording),)]
        assert label_counts(store, "1.0.0")["repeated predictions"] == 0


def test_an_answer_under_another_id_stops_the_replay(flights, store):
    def renamed(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**one, "request_id": "0" * 32} for one in fake(requests)]

    with pytest.raises(ReplayError, match="another request id"):
        list(replay(play(record(flights, "2013-12-05", "2013-12-05"), 60), [renamed], store))
    assert content(store)[0] == []


ABOUT = {
    "version": "1.0.0",
    "service_version": "0.1",
    "service_git_sha": "a" * 40,
    "digest": "sha256:0",
    "config": "c0ffee",
}


def test_each_answer_gets_the_release_that_gave_it():
    """The model is exchanged while the replay runs; then the old one answers once more, from another instance."""
    versions, asked = iter(["1.0.0", "1.1.0", "1.0.0", "1.2.0"]), []

    def ask(method: str, path: str, body: Any = None) -> Reply:
        asked.append(path)
        if method == "GET":
            about = ABOUT | {"version": "1.1.0" if len(asked) > 2 else "1.0.0"}
            return Reply(200, about, "application/json", 1.0)
        return Reply(200, {**body, "model_version": next(versions)}, "application/json", 1.0)

    send = sender(ask)
    releases = [send([{"request_id": "x"}])[0]["release"] for _ in range(4)]
    assert releases == ["aaaaaaa-1.0.0-c0ffee", "aaaaaaa-1.1.0-c0ffee", "aaaaaaa-1.0.0-c0ffee", "unknown-1.2.0"]


def test_batches_are_cut_and_a_refusal_is_told():
    sizes = []

    def ask(method: str, path: str, body: Any = None) -> Reply:
        if method == "GET":
            return Reply(200, ABOUT, "application/json", 1.0)
        sizes.append(len(body["flights"]))
        if len(sizes) == 4:
            return Reply(422, {"detail": "Refused: flights[3].dest."}, "application/problem+json", 1.0)
        return Reply(200, {"predictions": [{"model_version": "1.0.0"}] * sizes[-1]}, "application/json", 1.0)

    send = sender(ask, batches=True)
    assert len(send([{}] * 1_200)) == 1_200
    assert sizes == [500, 500, 200]
    with pytest.raises(ReplayError, match=r"answered 422: Refused: flights\[3\].dest"):
        send([{}])


# Quality


@pytest.fixture(scope="module")
def december(flights, artifacts_root) -> tuple[pd.DataFrame, Joined]:
    """Return December, and what a store would say about it, with real scores."""
    from mlops_course.training import onnx_scores

    month = flights[flights["scheduled_departure"] >= "2013-12-01"].reset_index(drop=True)
    graph = (artifacts_root / MODEL_NAME / "1.0.0" / "model.onnx").read_bytes()
    score = onnx_scores(graph, month).astype(float).round(4)
    day = month["scheduled_departure"].dt.strftime("%Y-%m-%d").to_numpy(str)
    return month, Joined(day, score, month["disrupted"].to_numpy(float))


@pytest.fixture(scope="module")
def august(artifacts_root) -> Sample:
    return reference_month(artifacts_root / MODEL_NAME / "1.0.0")


def test_the_measures_are_those_of_training(december):
    month, rows = december
    found = {name: float(value[0]) for name, value in measures(day_sums(rows)).items()}
    day = np.unique(rows.day, return_inverse=True)[1]
    assert np.array_equal(warned_within_budget(day, rows.score), warned_first(month, rows.score))
    assert found["recall_at_budget"] == pytest.approx(recall_at_budget(month, rows.score), abs=1e-12)
    assert found["roc_auc"] == pytest.approx(roc_auc_score(rows.label, rows.score), abs=1e-12)
    assert found["brier"] == pytest.approx(brier_score_loss(rows.label, rows.score), abs=1e-12)
    expected = calibration_error(calibration_table(rows.label, rows.score))
    assert found["calibration_error"] == pytest.approx(expected, abs=1e-5)  # the table is rounded
    assert found["promise_gap"] == pytest.approx((rows.score - rows.label).mean(), abs=1e-12)
    false = warned_first(month, rows.score) & (rows.label == 0)
    assert found["false_warnings_per_1000"] == pytest.approx(1000 * false.mean(), abs=1e-9)


def test_a_resample_is_the_same_as_weighting_the_flights_of_its_days(december):
    _, rows = december
    days, day = np.unique(rows.day, return_inverse=True)
    weight = day_draws(len(days))[:3]
    assert weight.sum(axis=1).tolist() == [len(days)] * 3
    found = measures(day_sums(rows), weight)
    for number, one in enumerate(weight):
        each = one[day]
        assert found["roc_auc"][number] == pytest.approx(
            roc_auc_score(rows.label, rows.score, sample_weight=each), abs=1e-9
        )
        assert found["brier"][number] == pytest.approx(brier_score_loss(rows.label, rows.score, sample_weight=each))


def test_the_intervals_are_those_of_chapter_2(december, august):
    """Another way to compute, other draws: about the same width."""
    from mlops_course.training import day_bootstrap, middle_95

    month, rows = december
    ours = measure(day_sums(rows)).measured()
    theirs = middle_95(day_bootstrap(month, rows.score, base_rate=0.28, rounds=100))
    for name in ("roc_auc", "recall_at_budget"):
        low, high = theirs[name]
        assert ours[name].high - ours[name].low == pytest.approx(high - low, rel=0.3)


def test_rows_without_an_outcome_count_for_the_budget_only(december):
    _, rows = december
    gone = np.random.default_rng(0).random(len(rows.label)) < 0.3
    half = rows._replace(label=np.where(gone, np.nan, rows.label))
    day = np.unique(rows.day, return_inverse=True)[1]
    warned = warned_within_budget(day, rows.score)[~gone]
    found, label = measures(day_sums(half)), rows.label[~gone]
    assert found["recall_at_budget"][0] == pytest.approx(label[warned].sum() / label.sum())
    assert found["roc_auc"][0] == pytest.approx(roc_auc_score(label, rows.score[~gone]))


def test_the_estimate_is_right_where_the_scores_are_and_blind_where_not(december):
    """If outcomes are drawn as the scores say, it is right; whatever else happened, it says the same."""
    _, rows = december
    drawn = rows._replace(label=(np.random.default_rng(0).random(len(rows.score)) < rows.score).astype(float))
    guess = estimate(rows)
    real = {name: float(value[0]) for name, value in measures(day_sums(drawn)).items()}
    for name in ("roc_auc", "brier", "recall_at_budget", "disrupted_share"):
        assert guess[name] == pytest.approx(real[name], abs=0.01), name
    assert guess == estimate(drawn) == estimate(rows._replace(label=np.full(len(rows.label), np.nan)))
    assert guess["disrupted_share"] < rows.label.mean() - 0.05


def filled(store: LabelStore, days: Sequence[str], rows: Joined, lost: Sequence[int] = ()) -> int:
    """Put these rows into a store as if they had been replayed; returns a moment at which all are mature."""
    at = FIRST
    for number, day in enumerate(days):
        here = np.flatnonzero(rows.day == day)
        at = FIRST + number * DAY
        found = [scored(i, at, day, float(rows.score[i])) for i in here.tolist()]
        known = [outcome(i, at + 5 * HOUR, int(rows.label[i])) for i in here.tolist() if i not in lost]
        write_step(store, found, known, at=at + 6 * HOUR)
    write_step(store, [], [], at=at + LEAD + int(MATURITY.total_seconds()))
    return at


def test_quality_from_the_store_is_quality_of_the_rows(store, december, august):
    _, rows = december
    days = sorted(set(rows.day.tolist()))
    filled(store, days, rows)
    q = assess_quality(store, "1.0.0", mature_days(store, "1.0.0"), august)
    assert (q.first_day, q.last_day, q.days, q.flights, q.coverage) == (days[0], days[-1], 31, len(rows.day), 1.0)
    assert {n: m.value for n, m in q.measured.items()} == {n: float(v[0]) for n, v in measures(day_sums(rows)).items()}
    assert q.worse == ["promise_gap"]
    assert q.measured["promise_gap"].high < 0


def test_no_verdict_without_enough_days_or_outcomes(store, december, august):
    _, rows = december
    days = sorted(set(rows.day.tolist()))[:20]
    lost = set(np.flatnonzero(np.isin(rows.day, days))[::20].tolist())
    filled(store, days, rows, lost=tuple(lost))
    whole = assess_quality(store, "1.0.0", days, august)
    assert whole.worse == []
    assert whole.unjudged.startswith("95.0% have an outcome, 98% are needed")
    few = assess_quality(store, "1.0.0", days[:13], august)
    assert few.unjudged == "13 mature days, at least 14 are needed"


def days_of(rows: Joined, days: Sequence[str]) -> Joined:
    """The flights of some days, which may repeat; each time they are a day of their own."""
    found = [np.flatnonzero(rows.day == day) for day in days]
    name = np.concatenate([np.full(len(each), f"{number:03}") for number, each in enumerate(found)])
    row = np.concatenate(found)
    return Joined(name, rows.score[row], rows.label[row])


@pytest.fixture(scope="module")
def august_rows(artifacts_root) -> Joined:
    told = pd.read_parquet(artifacts_root / MODEL_NAME / "1.0.0" / "predictions.parquet")
    score = told["probability"].to_numpy(float).round(4)
    return Joined(told["identity"].str[:10].to_numpy(str), score, told["disrupted"].to_numpy(float))


def alarms(rows: Joined, windows: int, spoil: float = 0.0, shift: float = 0.0) -> list[list[str]]:
    """Draw reference and window from the same month, spoil the window's scores, and return what the rules say."""
    from mlops_course.monitoring import _change, _verdicts

    rng, days, found = np.random.default_rng(1), np.unique(rows.day), []
    for _ in range(windows):
        then = measure(day_sums(days_of(rows, rng.choice(days, 31).tolist())), seed=1)
        now = days_of(rows, rng.choice(days, 28).tolist())
        mixed = rng.random(len(now.score)) < spoil
        score = now.score.copy()
        score[mixed] = rng.permutation(score[mixed])
        score = np.clip(score + shift, 0, 1).round(4)
        sample = measure(day_sums(now._replace(score=score)))
        found.append(_verdicts(sample.measured(), _change(sample, then)))
    return found


def test_the_rules_are_quiet_when_nothing_changed(august_rows, monkeypatch):
    """About 5 % of the windows alarm by any rule (10 of 200 were measured); the limit leaves room for chance."""
    monkeypatch.setattr("mlops_course.monitoring.ROUNDS", 100)
    exact = float((august_rows.score - august_rows.label).mean())  # August itself promised too much by 0.02
    found = alarms(august_rows._replace(score=(august_rows.score - exact).clip(0, 1).round(4)), windows=80)
    assert sum(bool(one) for one in found) <= 0.08 * len(found)


def test_the_rules_speak_when_the_ranking_or_the_promises_break(august_rows, monkeypatch):
    monkeypatch.setattr("mlops_course.monitoring.ROUNDS", 100)
    ranking = alarms(august_rows, windows=12, spoil=0.5)  # costs 0.1 of ROC AUC
    assert sum("roc_auc" in one for one in ranking) >= 11
    promises = alarms(august_rows, windows=12, shift=-0.15)
    assert sum("promise_gap" in one for one in promises) >= 11


# Metrics


def numbers(latest: Any) -> dict[tuple[str, str], float]:
    """Return what Prometheus would read."""
    registry = CollectorRegistry()
    registry.register(QualityMetrics([latest]))
    text = generate_latest(registry).decode()
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    assert {s.labels["model_version"] for s in samples} == {"1.0.0"}
    return {(s.name, s.labels.get("metric", "")): s.value for s in samples}


def test_prometheus_reads_the_latest_judgement(store, december, august):
    _, rows = december
    filled(store, sorted(set(rows.day.tolist())), rows)
    latest = latest_quality(store, "1.0.0", august)
    assert latest is not None
    q, found = latest.quality, numbers(latest)
    assert (q.days, q.first_day) == (28, "2013-12-04")
    for name, m in q.measured.items():
        assert found["model_quality", name] == m.value
        assert found["model_quality_low", name] == m.low
        assert found["model_quality_high", name] == m.high
        assert found["model_quality_reference", name] == august.value[name]
        assert found["model_quality_estimate", name] == latest.estimate[name]
    verdicts = {metric: value for (name, metric), value in found.items() if name == "model_quality_regressed"}
    assert verdicts == {rule.metric: float(rule.metric in q.worse) for rule in QUALITY_RULES}
    assert found["model_label_coverage", ""] == 1.0
    assert found["model_quality_window_start_seconds", ""] == FIRST + 3 * DAY + LEAD
    assert found["model_quality_window_end_seconds", ""] == FIRST + 30 * DAY + LEAD
    assert found["model_quality_clock_seconds", ""] == replayed_to(store)


def test_without_a_verdict_there_is_no_number_that_could_pass_for_one(store, december, august):
    _, rows = december
    filled(store, sorted(set(rows.day.tolist()))[:5], rows)
    latest = latest_quality(store, "1.0.0", august)
    found = numbers(latest)
    assert not any(name == "model_quality_regressed" for name, _ in found)
    assert ("model_quality", "roc_auc") in found
    assert latest_quality(store, "9.9.9", august) is None
