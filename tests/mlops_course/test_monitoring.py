"""Metrics and logs of chapter 5: bins, series that cannot grow, limits of a container, and what a log line may hold."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from mlops_course.blueprint import CATEGORICAL, CRITERIA, MISSING, MODEL_NAME, NUMERIC, ORIGINS, number_shares
from mlops_course.monitoring import (
    LATENCY_EDGES,
    LOG_FIELDS,
    MISTAKE_FIELDS,
    MISTAKE_REASONS,
    STATUSES,
    TIMED,
    CategoryBins,
    ContainerMetrics,
    JsonLine,
    Load,
    Metrics,
    ModelCounts,
    NumberBins,
    Release,
    Row,
    add_batch,
    allowed,
    describe_error,
    exact_edges,
    is_sampled,
    known_mistake,
    outcome,
    present_shares,
)

RELEASE = Release("1.2.3", "abcdef0123", config="0123456789ab")
Values = dict[tuple[str, ...], float]


@pytest.fixture(scope="module")
def reference(artifacts_root: Path) -> dict[str, Any]:
    """Return the reference of the first release."""
    found: dict[str, Any] = json.loads((artifacts_root / MODEL_NAME / "1.0.0" / "reference.json").read_text())
    return found


def values(page: bytes, name: str) -> dict[frozenset[tuple[str, str]], float]:
    """Return the series of one metric by their labels."""
    samples = [s for family in text_string_to_metric_families(page.decode()) for s in family.samples]
    return {frozenset(s.labels.items()): s.value for s in samples if s.name == name}


def rows_of(flights: Any, count: int) -> list[Row]:
    """Return some flights as the service sees them."""
    table = flights.sample(count, random_state=3)
    numbers = table[list(NUMERIC)].astype(object).where(table[list(NUMERIC)].notna(), None)
    return [
        (tuple(c), tuple(n))
        for c, n in zip(table[list(CATEGORICAL)].to_numpy().tolist(), numbers.to_numpy().tolist(), strict=True)
    ]


# --- Bins ---------------------------------------------------------------------------------------------------------

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False)


@given(st.lists(NUMBERS, min_size=1, max_size=9), st.lists(NUMBERS, min_size=1, max_size=30))
def test_a_64_bit_value_falls_into_the_bin_of_its_32_bit_value(edges, seen):
    edges = sorted({float(np.float32(edge)) for edge in edges})
    bins = NumberBins(edges)
    near = [float(np.nextafter(np.float64(edge), way)) for edge in edges for way in (-np.inf, np.inf)]
    everything = [*seen, *edges, *near, *(edge + 1e-9 for edge in edges), *(edge - 1e-9 for edge in edges)]
    for value in everything:
        bins.add(value)
    expected = np.searchsorted(np.asarray(edges, np.float32), np.asarray(everything, np.float32), side="right")
    assert bins.counts == np.bincount(expected, minlength=len(edges) + 1).tolist()


def test_decimal_values_that_are_edges_are_the_trap_that_exact_edges_avoid():
    edge = float(np.float32(30.92))
    assert 30.92 < edge
    assert exact_edges([edge])[0] <= 30.92


def test_counts_of_a_real_month_are_the_shares_of_the_blueprint(splits, reference):
    month = splits["test"]
    for name in NUMERIC:
        edges = reference["features"][name]["edges"]
        bins = NumberBins(edges)
        bins.add_many(month[name].to_numpy(float))
        shares = number_shares(month[name].to_numpy(float), edges)
        assert bins.counts == [round(shares[str(i)] * len(month)) for i in range(len(edges) + 1)]
        assert bins.missing == round(shares[MISSING] * len(month))


def test_a_rare_category_is_known_and_a_new_one_is_not():
    bins = CategoryBins({"a": 0.6, "b": 0.3, "other": 0.1}, ["a", "b", "c"])
    assert [bins.add(value) for value in "abcd"] == [0, 0, 0, 1]
    assert bins.add("e", 5) == 5
    assert (dict(bins.items()), bins.unknown) == ({"a": 1, "b": 1, "other": 7}, 6)


def test_many_at_once_are_counted_as_one_by_one(splits, reference):
    rows = [*rows_of(splits["production"], 2_000), (("ZZ", "JFK", "QQQ"), (None,) * len(NUMERIC))]
    scores = [float(x) for x in np.random.default_rng(1).random(len(rows)).round(4)]
    warned = [score >= 0.34 for score in scores]
    one, many = ModelCounts(reference), ModelCounts(reference)
    told = [one.add(*flight) for flight in zip(rows, scores, warned, strict=True)]
    assert add_batch(many, rows, scores, warned) == (sum(m for m, _ in told), sum(u for _, u in told))
    assert told[-1] == (len(NUMERIC), 2)
    assert [n.counts for n in many.numbers] == [n.counts for n in one.numbers]
    assert [n.missing for n in many.numbers] == [n.missing for n in one.numbers]
    assert [c.counts for c in many.categories] == [c.counts for c in one.categories]
    assert [c.unknown for c in many.categories] == [c.unknown for c in one.categories]
    assert {o: b.counts for o, b in many.scores.items()} == {o: b.counts for o, b in one.scores.items()}
    assert many.decisions == one.decisions
    assert many.sums == pytest.approx(one.sums, abs=1e-9)
    assert sum(many.decisions.values()) == len(rows)


def test_threads_lose_no_count(splits, reference):
    counts, rows = ModelCounts(reference), rows_of(splits["test"], 200)
    scores, warned = [0.5] * len(rows), [True] * len(rows)

    def singles() -> None:
        for row in rows * 5:
            counts.add(row, 0.5, True)

    def batches() -> None:
        for _ in range(20):
            add_batch(counts, rows, scores, warned)

    work: list[Callable[[], None]] = [singles, batches, singles, batches]
    threads = [threading.Thread(target=one) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = len(rows) * (5 + 20) * 2
    assert sum(counts.decisions.values()) == expected
    assert [sum(n.counts) + n.missing for n in counts.numbers] == [expected] * len(NUMERIC)


# --- The page -----------------------------------------------------------------------------------------------------


def test_every_series_is_there_from_the_start(reference):
    metrics = Metrics(RELEASE)
    metrics.begin(RELEASE._replace(model="1.0.0", digest="sha256:1"), reference, 0.34, {"warm up": 0.1})
    page = metrics.page()
    assert len(values(page, "http_requests_total")) == len(TIMED) * len(STATUSES)
    assert len(values(page, "model_validation_failures_total")) == len(MISTAKE_FIELDS) * len(MISTAKE_REASONS)
    bins = sum(len(present_shares(part["shares"])) for part in reference["features"].values())
    assert len(values(page, "model_feature_bin_total")) == len(values(page, "model_feature_expected_share")) == bins
    assert len(values(page, "model_score_bin_total")) == len(ORIGINS) * len(reference["score"]["edges"] + [0])
    assert set(values(page, "model_feature_bin_total").values()) == {0.0}
    assert list(values(page, "model_ready").values()) == [1.0]
    assert b"_created" not in page
    (info,) = values(page, "release_info")
    assert dict(info)["release"] == "abcdef0-1.0.0-0123456789ab"
    assert dict(info)["git_sha"] == "abcdef0123"


def test_expected_shares_add_up_to_one(reference):
    metrics = Metrics(RELEASE)
    metrics.begin(RELEASE, reference)
    found = values(metrics.page(), "model_feature_expected_share")
    for name in reference["features"]:
        assert sum(x for labels, x in found.items() if ("feature", name) in labels) == pytest.approx(1)
    by_origin = values(metrics.page(), "model_score_expected_share_by_origin")
    for origin in ORIGINS:
        assert sum(x for labels, x in by_origin.items() if ("origin", origin) in labels) == pytest.approx(1)


def test_without_a_model_nothing_of_a_model_is_claimed():
    metrics = Metrics(RELEASE)
    metrics.service.load_failed()
    page = metrics.page()
    assert list(values(page, "model_ready").values()) == [0.0]
    assert values(page, "model_threshold") == values(page, "model_feature_bin_total") == {}
    assert list(values(page, "model_load_failures_total").values()) == [1.0]
    assert metrics.model.add([(("UA", "EWR", "IAH"), (None,) * len(NUMERIC))], [0.5], [True]) == (0, 0)


def test_a_new_model_starts_from_zero_and_the_old_one_is_gone(reference):
    metrics = Metrics(RELEASE)
    metrics.begin(RELEASE._replace(model="1.0.0"), reference, 0.34)
    metrics.model.add([(("UA", "EWR", "IAH"), (None,) * len(NUMERIC))], [0.5], [True])
    metrics.requests.add("/v1/predict", "POST", 200, 0.01)
    metrics.begin(RELEASE._replace(model="1.1.0"), reference, 0.3)
    page = metrics.page()
    assert sum(values(page, "model_predictions_total").values()) == sum(values(page, "http_requests_total").values()) == 0
    for name in ("http_requests_total", "model_predictions_total", "release_info", "model_threshold"):
        assert {dict(labels)["release"] for labels in values(page, name)} == {"abcdef0-1.1.0-0123456789ab"}


def test_a_request_is_counted_by_route_status_outcome_and_stage():
    metrics = Metrics(RELEASE)
    metrics.requests.add("/v1/predict", "POST", 200, 0.15, stages=(0.001, 0.002, 0.003, 0.004))
    metrics.requests.add("/v1/predict", "POST", 503, 3.0)
    metrics.requests.add("/health", "GET", 200, 0.001)
    page = metrics.page()
    assert sum(values(page, "http_requests_total").values()) == 3
    counts = {dict(k)["outcome"]: v for k, v in values(page, "http_request_duration_seconds_count").items() if v}
    assert counts == {"answered": 1.0, "failed": 1.0}
    within = {dict(k)["le"]: v for k, v in values(page, "http_request_duration_seconds_bucket").items() if ("outcome", "answered") in k and ("route", "/v1/predict") in k}
    assert (within["0.15"], within["0.125"]) == (1.0, 0.0)
    stages = {dict(k)["stage"]: v for k, v in values(page, "model_stage_duration_seconds_sum").items()}
    assert stages == {"validate": 0.001, "features": 0.002, "model": 0.003, "respond": 0.004}


def test_the_promise_about_time_is_an_edge():
    assert CRITERIA["latency_p95_ms"].limit / 1000 in LATENCY_EDGES
    ratios = np.array(LATENCY_EDGES[1:-1]) / LATENCY_EDGES[:-2]
    assert np.allclose(ratios, 1.2, rtol=1e-3)
    assert list(LATENCY_EDGES) == sorted(LATENCY_EDGES)


@pytest.mark.parametrize(("status", "expected"), [(200, "answered"), (304, "answered"), (422, "refused"), (499, "refused"), (500, "failed"), (503, "failed")])
def test_who_is_to_blame(status, expected):
    assert outcome(status) == expected


@pytest.mark.parametrize(("given", "expected"), [(("dest", "missing"), ("dest", "missing")), (("x", "missing"), ("unknown", "missing")), (("dest", "x"), ("dest", "other"))])
def test_mistakes_come_from_fixed_lists(given, expected):
    assert known_mistake(*given) == expected


def test_how_full_the_service_is_is_asked_when_somebody_looks():
    metrics, waiting = Metrics(RELEASE), [3]
    metrics.service.watch(Load(waiting=lambda: waiting[0], waiting_limit=500, batches=lambda: 1, batches_limit=4))
    waiting[0] = 7
    page = metrics.page()
    names = ("service_requests_waiting", "service_requests_waiting_limit", "service_batches_in_flight", "service_batches_in_flight_limit")
    assert [next(iter(values(page, name).values())) for name in names] == [7, 500, 1, 4]


# --- The container ------------------------------------------------------------------------------------------------


def cgroup(folder: Path, **files: str) -> bytes:
    """Return the page of a container whose kernel shows these files."""
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    registry = CollectorRegistry()
    ContainerMetrics(registry, folder)
    return generate_latest(registry)


def test_limits_of_a_container(tmp_path):
    page = cgroup(tmp_path, memory_max="268435456\n", cpu_max="150000 100000\n", cpu_stat="usage_usec 9\nnr_periods 10\nnr_throttled 4\nthrottled_usec 2500000\n")
    found = {name: next(iter(values(page, name).values())) for name in (
        "cgroup_memory_limit_bytes", "cgroup_cpu_quota_cores", "cgroup_cpu_periods_total", "cgroup_cpu_throttled_periods_total", "cgroup_cpu_throttled_seconds_total")}
    assert list(found.values()) == [268435456, 1.5, 10, 4, 2.5]


@pytest.mark.parametrize("files", [{}, {"memory_max": "max\n", "cpu_max": "max 100000\n", "cpu_stat": "usage_usec 9\n"}, {"memory_max": "", "cpu_max": ""}])
def test_no_limit_is_no_number(tmp_path, files):
    assert b"cgroup" not in cgroup(tmp_path, **files)


# --- Log lines ----------------------------------------------------------------------------------------------------


def test_what_is_not_listed_is_not_written():
    line = json.loads(JsonLine()(None, "info", {"event": "request", "status": 200, "password": "hunter2", "body": "x"}))
    assert "hunter2" not in str(line)
    assert set(line) <= set(LOG_FIELDS)
    assert line["message"] == "fields left out: 2"


def test_a_line_keeps_what_is_listed_and_what_is_common():
    line = JsonLine()
    line.add_to_all({"model": "1.0.0", "secret": "hunter2"})
    written = json.loads(line(None, "error", {"event": "failed", "route": "/v1/predict"}))
    assert written.pop("time").endswith("Z")
    assert written == {"level": "error", "event": "failed", "route": "/v1/predict", "model": "1.0.0", "message": "fields left out: 1"}


def test_an_event_within_the_policy_is_unchanged():
    event = dict.fromkeys(LOG_FIELDS, 1)
    assert allowed(event) == event


def test_an_error_is_one_line_of_type_and_place():
    try:
        raise RuntimeError("hunter2\nhunter3")
    except RuntimeError as error:
        told = describe_error(error)
    assert told["exception"] == "RuntimeError"
    assert "test_an_error_is_one_line_of_type_and_place" in told["where"][-1]
    assert "hunter" not in str(told)
    assert b"\n" not in JsonLine()(None, "error", told)


@given(st.uuids())
def test_an_id_is_sampled_or_not_whatever_its_spelling(name):
    assert len({is_sampled(text, 0.3) for text in (str(name), str(name).upper(), name.hex)}) == 1
    assert is_sampled(str(name), 1)
    assert not is_sampled(str(name), 0)


def test_the_share_is_what_was_asked_for():
    rng = np.random.default_rng(2)
    ids = [rng.bytes(16).hex() for _ in range(20_000)]
    assert np.mean([is_sampled(name, 0.25) for name in ids]) == pytest.approx(0.25, abs=0.01)
