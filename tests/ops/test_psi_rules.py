"""PSI as Prometheus computes it, and the limits that alerts compare it with, against the real flights."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Generator
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pytest
import yaml

from mlops_course.blueprint import CATEGORICAL, MODEL_NAME, NUMERIC, resolve_channel
from mlops_course.monitoring import Metrics, Release
from ops.alert_rules import PROMETHEUS


def psi(counts: np.ndarray, expected: np.ndarray) -> float:
    """Return the index for counts and expected shares of the same bins, with the floor of the rules."""
    share, known = np.maximum(counts / counts.sum(), 1e-4), np.maximum(expected, 1e-4)
    return float(((share - known) * np.log(share / known)).sum())


def bins_of(values: pd.Series, part: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return the bin of each value (-1 for missing), the expected shares among what is there, and the bins' names."""
    shares = {name: share for name, share in part["shares"].items() if name != "missing"}
    names = list(shares)
    expected = np.array(list(shares.values())) / sum(shares.values())
    if "edges" not in part:
        place = {name: at for at, name in enumerate(names)}
        return values.map(place).fillna(place["other"]).to_numpy(int), expected, names
    numbers = values.to_numpy(np.float32)
    return np.where(np.isnan(numbers), -1, np.searchsorted(part["edges"], numbers, side="right")), expected, names


def daily(flights: pd.DataFrame, reference: dict[str, Any], scores: np.ndarray) -> dict[str, tuple[Any, ...]]:
    """Return, for each monitored thing, counts by day and bin, and the expected shares."""
    days = flights["scheduled_departure"].dt.dayofyear.to_numpy()
    parts = {**reference["features"], "score": reference["score"]}
    found = {}
    for name, part in parts.items():
        values = pd.Series(scores) if name == "score" else flights[name]
        place, expected, _ = bins_of(values, part)
        counts = np.zeros((days.max() + 1, len(expected)))
        np.add.at(counts, (days[place >= 0], place[place >= 0]), 1)
        found[name] = counts[days.min() :], expected
    return found


@pytest.fixture(scope="module")
def scored(splits, artifacts_root) -> tuple[pd.DataFrame, dict[str, Any], np.ndarray]:
    """Return the flights of the training months, the reference made of them, and their scores."""
    import joblib

    from mlops_course.blueprint import FEATURES

    folder, _ = resolve_channel(artifacts_root / MODEL_NAME, "prod")
    train = splits["train"]
    scores = joblib.load(folder / "model.joblib").predict_proba(train[list(FEATURES)])[:, 1]
    return train, json.loads((folder / "reference.json").read_text()), scores


TIMETABLE = ("carrier", "origin", "dest", "distance_miles", "minute_of_day")


def test_the_limits_of_drift_are_above_every_window_of_training(scored):
    """The numbers that drift.yml gives as its reasons."""
    counts = daily(*scored)
    day = {name: [psi(row, known) for row in rows if row.sum()] for name, (rows, known) in counts.items()}
    week = {
        name: [psi(rows[at : at + 7].sum(0), known) for at in range(len(rows) - 6)]
        for name, (rows, known) in counts.items()
    }
    assert max(max(day[name]) for name in TIMETABLE) == pytest.approx(0.043, abs=5e-4)
    assert max(week["recent_origin_delay_min"]) == pytest.approx(0.56, abs=5e-3)
    assert max(week["score"]) == pytest.approx(0.77, abs=5e-3)
    assert max(day["score"]) == pytest.approx(4.6, abs=0.05)
    weather = ("temperature_f", "dew_point_f", "humidity_pct", "wind_speed_mph", "pressure_mb", "visibility_miles")
    assert all(1 < np.median(day[name]) < 8 for name in weather)
    limits = [
        float(found)
        for found in re.findall(r"psi:1d\{[^}]*\} > ([\d.]+)", (PROMETHEUS / "rules" / "drift.yml").read_text())
    ]
    assert sorted(limits) == [0.1, 0.25]


def test_missing_values_of_training_stay_below_the_limits(splits):
    train = splits["train"]
    share = train.isna().groupby(train["scheduled_departure"].dt.date).mean()
    assert share["pressure_mb"].max() == pytest.approx(0.81, abs=5e-3)
    assert share["recent_origin_delay_min"].max() == pytest.approx(0.54, abs=5e-3)
    others = share[["temperature_f", "humidity_pct", "wind_speed_mph", "visibility_miles"]]
    assert float((others - train[list(others)].isna().mean()).max().max()) < 0.1


def test_chance_alone_stays_below_the_first_limit():
    """With 500 values in 21 bins, the fewest that are judged in the most bins."""
    random = np.random.default_rng(0)
    expected = np.full(21, 1 / 21)
    drawn = [psi(counts, expected) for counts in random.multinomial(500, expected, size=2000)]
    assert np.mean(drawn) == pytest.approx(0.04, abs=2e-3)
    assert np.quantile(drawn, 0.999) == pytest.approx(0.09, abs=5e-3)


# --- The rules, on a month that the service counted ----------------------------------------------------------------

STEP_S = 1800


@pytest.fixture(scope="module")
def september(splits, artifacts_root) -> tuple[pd.DataFrame, dict[str, Any], np.ndarray]:
    """Return the flights of September in the order of their departure, the reference, and their scores."""
    import joblib

    from mlops_course.blueprint import FEATURES

    folder, _ = resolve_channel(artifacts_root / MODEL_NAME, "prod")
    rows = splits["production"].sort_values("scheduled_departure")
    rows = rows[rows["scheduled_departure"].dt.month == 9].reset_index(drop=True)
    scores = joblib.load(folder / "model.joblib").predict_proba(rows[list(FEATURES)])[:, 1]
    return rows, json.loads((folder / "reference.json").read_text()), scores.round(6)


def scrapes(rows: pd.DataFrame, reference: dict[str, Any], scores: np.ndarray) -> Generator[str]:
    """Let the metrics of the service count a month, and return each of its pages as lines with a time."""
    metrics = Metrics(Release("1", "abc", model="1.0.0"))
    metrics.begin(metrics.release, reference, 0.3)
    times = rows["scheduled_departure"].astype("datetime64[s]").astype("int64").to_numpy()
    numbers = rows[list(NUMERIC)].to_numpy(float)
    texts = list(map(tuple, rows[list(CATEGORICAL)].to_numpy(str)))
    start = int(pd.Timestamp("2013-09-01").timestamp())
    series: dict[str, dict[str, list[str]]] = {}  # header -> name and labels -> value and time
    for at in range(start, start + 30 * 86_400 + 1, STEP_S):
        first, last = np.searchsorted(times, [at - STEP_S, at])  # departures before this moment
        batch = [
            (texts[i], tuple(None if np.isnan(x) else x for x in numbers[i])) for i in range(int(first), int(last))
        ]
        if batch and at > start:
            metrics.model.add(batch, scores[first:last].tolist(), (scores[first:last] > 0.3).tolist())
        for family in metrics.model.collect():
            here = series.setdefault(f"# TYPE {family.name} {family.type}", {})
            for one in family.samples:
                labels = ",".join(f'{name}="{text}"' for name, text in one.labels.items())
                here.setdefault(f"{one.name}{{{labels}}}", []).append(f"{one.value} {at}")
    for header, found in series.items():
        yield header
        for name, values in found.items():
            yield from (f"{name} {value}" for value in values)
    yield "# EOF"


@pytest.fixture(scope="module")
def query(
    september: tuple[pd.DataFrame, dict[str, Any], np.ndarray],
    tmp_path_factory: pytest.TempPathFactory,
    unused_port: Callable[[], int],
) -> Generator[Callable[[str, str], dict[str, float]]]:
    """Return a function that asks a real Prometheus, which holds that month: expression, moment -> feature -> value."""
    if shutil.which("prometheus") is None:
        pytest.skip("needs prometheus, which is not on PyPI: `make tools` installs it on Debian and Ubuntu")
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "month.txt").write_text("\n".join(scrapes(*september)) + "\n")
    backfill = [
        "promtool",
        "tsdb",
        "create-blocks-from",
        "--max-block-duration=1000h",
        "openmetrics",
        f"{folder}/month.txt",
        f"{folder}/samples",
    ]
    subprocess.run(backfill, check=True, capture_output=True)
    (folder / "prometheus.yml").write_text("")
    port = unused_port()
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/samples"]
    command += ["--storage.tsdb.retention.time=100y", f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
    process = subprocess.Popen(command)

    def ask(expression: str, moment: str) -> dict[str, float]:
        given = {"query": expression, "time": f"{moment}Z"}
        answer = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params=given, timeout=60).json()
        assert answer["status"] == "success", answer
        return {one["metric"].get("feature", "score"): float(one["value"][1]) for one in answer["data"]["result"]}

    try:
        end = time.monotonic() + 30
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/-/ready").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert time.monotonic() < end
            time.sleep(0.2)
        yield ask
    finally:
        process.kill()
        process.wait(10)


def expanded(name: str) -> str:
    """Return the expression of a recording rule in terms of what the service exports."""
    groups = yaml.safe_load((PROMETHEUS / "rules" / "drift.yml").read_text())["groups"]
    known = {rule["record"]: rule["expr"] for group in groups for rule in group["rules"] if "record" in rule}
    text: str = known[name]
    while names := [one for one in re.findall(r"model:[\w:]+", text) if one in known]:
        text = re.sub(rf"{names[0]}(?![\w:])", lambda _: f"({known[names[0]]})", text)
    return text


def offline(month: tuple[pd.DataFrame, dict[str, Any], np.ndarray], first: str, last: str) -> dict[str, float]:
    """Return the index of everything that is monitored, of the flights that depart between two moments."""
    rows, reference, scores = month
    here = rows["scheduled_departure"].between(pd.Timestamp(first), pd.Timestamp(last), inclusive="left").to_numpy()
    parts = {**reference["features"], "score": reference["score"]}
    found = {}
    for name, part in parts.items():
        values = pd.Series(scores[here]) if name == "score" else rows.loc[here, name]
        place, expected, _ = bins_of(values, part)
        found[name] = psi(np.bincount(place[place >= 0], minlength=len(expected)).astype(float), expected)
    return found


def test_from_raw_counters_it_is_the_same_to_nine_digits(query, september):
    """At the end of the month each counter is the count of the month."""
    moment = "2013-10-01T00:00:00"
    found: dict[str, float] = {}
    for name in ("model:feature_psi:1d", "model:score_psi:1d"):
        found |= query(re.sub(r"increase\((\w+)\[1d\]\)", r"\1", expanded(name)), moment)
    expected = offline(september, "2013-09-01", "2013-10-01")
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("window", ["1d", "7d"])
def test_over_a_window_it_is_the_same_within_two_percent(query, september, window):
    """A window begins between two scrapes; what came in between is extrapolated."""
    days = int(window[:-1])
    for last in pd.date_range("2013-09-08", "2013-10-01", freq="5D"):
        found: dict[str, float] = {}
        for name in (f"model:feature_psi:{window}", f"model:score_psi:{window}"):
            found |= query(expanded(name), last.isoformat())
        expected = offline(september, (last - pd.Timedelta(days=days)).isoformat(), last.isoformat())
        assert found == pytest.approx(expected, rel=0.02, abs=1e-4), last
