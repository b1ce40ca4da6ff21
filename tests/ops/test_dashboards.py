"""The operator dashboard: it is what the code generates, it can be read, and every query has an answer.

The live tests run the service, its door and a Prometheus with the project's rules, and send real flights. Grafana
itself is not run: what is verified is what it would ask and what it would be told to draw, not the drawing.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from ops import ROOT
from ops.grafana.dashboard import SUMMARY_URL, TARGET, render
from tests.ops.live import Prometheus

BOARD: dict[str, Any] = json.loads(TARGET.read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
ALL = [(panel, target) for panel in PANELS for target in panel["targets"]]
# Read from files that only a container has; these queries are verified with `promtool test rules` below.
IN_CONTAINERS = "cgroup_"
LIVE = [
    pytest.param(panel, target, id=f"{panel['title']} {target['refId']}")
    for panel, target in ALL
    if IN_CONTAINERS not in target["expr"]
]
# What Grafana would put in: everything is chosen, and time runs faster.
CHOSEN = {
    "offset $window": "offset 6s",
    "$__rate_interval": "5s",
    "$__range": "1m",
    "$window": "1h",
    "$compare": "3s",
    "$release": ".*",
    "$origin": ".*",
    "$feature": "carrier",
    "$baseline": "0",
}


def fill(expr: str, **other: str) -> str:
    """Replace the variables of the dashboard."""
    for name, value in (CHOSEN | {f"${key}": value for key, value in other.items()}).items():
        expr = expr.replace(name, value)
    assert "$" not in expr
    return expr


def test_the_committed_dashboard_is_the_generated_one() -> None:
    assert TARGET.read_text() == render(), "run `python -m ops dashboards`"


def test_nobody_edits_it_in_the_browser() -> None:
    assert BOARD["editable"] is False
    (provider,) = yaml.safe_load((ROOT / "ops/grafana/provisioning/dashboards/dashboards.yml").read_text())["providers"]
    assert provider["allowUiUpdates"] is False
    (source,) = yaml.safe_load((ROOT / "ops/grafana/provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert (source["editable"], source["type"], source["url"]) == (False, "prometheus", "http://prometheus:9090")


def test_it_tells_the_story_from_users_to_the_model() -> None:
    rows = [panel["title"].partition(":")[0] for panel in BOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Users", "Speed", "Traffic", "Capacity", "Inference", "Inputs", "Predictions", "Quality"]


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_can_be_read_by_somebody_else(panel: dict[str, Any]) -> None:
    assert panel["title"].endswith("?") or "?" not in panel["title"], "the title is the question"
    assert len(panel["description"]) > 40
    defaults = panel["fieldConfig"]["defaults"]
    assert defaults["unit"]
    assert panel["datasource"]["uid"] == "${datasource}"
    assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
    assert all(target["legendFormat"] for target in panel["targets"])
    assert defaults["noValue"]
    assert defaults["thresholds"]["steps"][0].get("value") is None, "the first step begins at the bottom"
    if panel["type"] == "timeseries":
        assert defaults["custom"]["axisLabel"]
        drawn = defaults["custom"].get("thresholdsStyle", {}).get("mode", "off") != "off"
        assert drawn == (len(defaults["thresholds"]["steps"]) > 1), "limits are drawn, and only where there are some"
    assert [target["refId"] for target in panel["targets"]] == list("ABCDEF"[: len(panel["targets"])])


# What is promised or alerted on has its limit in the picture.
@pytest.mark.parametrize(
    ("title", "limits"),
    [
        ("Do predictions fail?", [0.001, 0.02]),
        ("How long does one prediction take?", [0.15]),
        ("How fast is the error budget spent?", [1, 6, 14.4]),
        ("Did what a timetable decides change?", [0.1, 0.25]),
        ("How many flights are warned?", [0.25]),
        ("Are the labels there?", [0.98]),
        ("Do the probabilities keep their word?", [-0.06, 0.06]),
    ],
)
def test_promises_are_drawn(title: str, limits: list[float]) -> None:
    (panel,) = (panel for panel in PANELS if panel["title"] == title)
    steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
    assert [step["value"] for step in steps[1:]] == pytest.approx(limits)


def test_ids_are_unique_and_nothing_overlaps() -> None:
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: dict[tuple[int, int], str] = {}
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies on {taken[x, y]}"
                taken[x, y] = panel["title"]


def test_every_title_is_there_once() -> None:
    titles = [panel["title"] for panel in BOARD["panels"]]
    assert len(set(titles)) == len(titles)


def test_variables_are_used_and_known() -> None:
    known = {variable["name"] for variable in BOARD["templating"]["list"]}
    text = json.dumps(BOARD["panels"])
    used = {name for name in re.findall(r"\$\{?(\w+)", text) if not name.startswith("__")}
    assert used == known


def test_the_summary_is_one_click_away() -> None:
    (link,) = BOARD["links"]
    assert link["url"] == SUMMARY_URL


@pytest.mark.parametrize(("panel", "target"), LIVE)
def test_every_query_has_an_answer(panel: dict[str, Any], target: dict[str, Any], watched: Prometheus) -> None:
    expr = fill(target["expr"])
    series = watched.over_time(expr, 8) if target.get("range") else watched.now(expr)
    assert series, f"{panel['title']}: no data for {expr}"
    values = [value for one in series for _, value in one.get("values", [one.get("value")])]
    assert any(value not in ("NaN", "+Inf", "-Inf") for value in values), f"{panel['title']}: {values[:5]}"
    # Each name in the legend is a label that the series have.
    for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
        assert all(one["metric"].get(label) for one in series)


def expr_of(title: str, ref: str = "A") -> str:
    """Return the expression of a panel."""
    (found,) = (target["expr"] for panel, target in ALL if (panel["title"], target["refId"]) == (title, ref))
    return str(found)


def values(series: list[dict[str, Any]], label: str) -> dict[str, float]:
    """Return the values of an instant query by one label."""
    return {one["metric"][label]: float(one["value"][1]) for one in series}


def test_the_baseline_can_be_the_window_before(watched: Prometheus) -> None:
    """One service, one kind of traffic: both baselines give an answer, and they differ."""
    expr = expr_of("Did what a timetable decides change?")
    training, before = (values(watched.now(fill(expr, baseline=choice)), "feature") for choice in "01")
    assert training.keys() == before.keys() == {"carrier", "origin", "dest", "distance_miles", "minute_of_day"}
    assert training != before
    neither = watched.now(fill(expr, baseline="2"))
    assert neither == []


def test_the_dashboard_and_the_rules_agree_about_drift(watched: Prometheus) -> None:
    """The query builds PSI from shares, so that the baseline can be chosen; against training it is the rules'."""
    expr = expr_of("Which inputs differ most, weather included?")
    # Both are asked at one moment that the rules have already written about.
    at = time.time() - 3
    shown, told = (
        values(watched.get("query", query=query, time=at)["result"], "feature")
        for query in (fill(expr), "max by (feature) (model:feature_psi:1h)")
    )
    assert len(shown) == 8
    assert shown == pytest.approx({name: told[name] for name in shown}, rel=0.02)


def test_a_new_release_leaves_a_mark(watched: Prometheus) -> None:
    (mark,) = BOARD["annotations"]["list"]
    (series,) = watched.over_time(mark["expr"], 900, step=5)
    names = set(re.findall(r"{{(\w+)}}", mark["titleFormat"] + mark["textFormat"]))
    assert names <= series["metric"].keys()
    assert series["metric"]["release"].startswith("0123456-1.0.0-")
    # An hour later it would be no news: with another release_info an hour ago, there is no mark.
    assert watched.now(mark["expr"].replace("offset 1m", "offset 2s")) == []


def test_releases_can_be_chosen(watched: Prometheus) -> None:
    (variable,) = (one for one in BOARD["templating"]["list"] if one["name"] == "release")
    label, metric = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()[::-1]  # type: ignore[union-attr]
    found = watched.get(f"label/{label}/values", **{"match[]": metric})
    assert len(found) == 1
    only = fill(expr_of("How long does one prediction take?"), release=found[0])
    assert watched.over_time(only, 8)
    assert watched.over_time(fill(expr_of("How long does one prediction take?"), release="other"), 8) == []


# Expression, what is told, and what has to come out after ten minutes.
TOLD: dict[tuple[str, str], tuple[dict[str, str], dict[str, float]]] = {
    ("Is the processor busy?", "B"): ({'cgroup_cpu_quota_cores{job="service"}': "1x40"}, {"{}": 1}),
    ("Is there enough memory?", "B"): ({'cgroup_memory_limit_bytes{job="service"}': "268435456x40"}, {"{}": 268435456}),
    ("Does the system hold the processor back?", "A"): (
        {
            'cgroup_cpu_throttled_periods_total{job="service",instance="a"}': "0+30x40",
            'cgroup_cpu_periods_total{job="service",instance="a"}': "0+150x40",
        },
        {'{instance="a"}': 0.2},
    ),
}


def test_queries_about_what_only_a_container_measures(prometheus_tools: None, tmp_path: Path) -> None:
    asked = {(panel["title"], target["refId"]) for panel, target in ALL if IN_CONTAINERS in target["expr"]}
    assert asked == TOLD.keys()
    cases = [
        {
            "interval": "15s",
            "input_series": [{"series": name, "values": told} for name, told in series.items()],
            "promql_expr_test": [
                {
                    "expr": fill(expr_of(*key)).replace("[5s]", "[1m]"),
                    "eval_time": "10m",
                    "exp_samples": [{"labels": labels, "value": number} for labels, number in expected.items()],
                }
            ],
        }
        for key, (series, expected) in TOLD.items()
    ]
    (tmp_path / "cases.json").write_text(json.dumps({"tests": cases}))
    done = subprocess.run(
        ["promtool", "test", "rules", tmp_path / "cases.json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
