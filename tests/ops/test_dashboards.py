"""The operator dashboard: it is what the code generates, it can be read, and every query has an answer.

The live tests run the service, its door and a Prometheus with the project's rules, and send real flights. Grafana itself is
not run: what is verified is what it would ask and how it would draw, not the drawing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from ops import ROOT
from ops.grafana.dashboard import SUMMARY_URL, TARGET, render
from tests.ops.live import Prometheus

BOARD: dict[str, Any] = json.loads(TARGET.read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
TARGETS = [
    pytest.param(panel, target, id=f"{panel['id']}{target['refId']}") for panel in PANELS for target in panel["targets"]
]
# Only a container has these files; what they would say is verified with `promtool test rules` below.
ONLY_IN_CONTAINERS = "cgroup_"
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
        ("Are the labels there?", [0.8]),
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


def metrics_of(exprs: Iterator[str]) -> set[str]:
    """Return the names in some expressions that look like metrics."""
    words = {word for expr in exprs for word in re.findall(r"\b[a-z]\w*_\w+\b", re.sub(r'"[^"]*"', "", expr))}
    return words - {"histogram_quantile", "group_left", "clamp_min", "sort_desc"} - LABELS


LABELS = {"model_version", "service_version", "envoy_response_code_class", "envoy_http_conn_manager_prefix"}


@pytest.mark.parametrize(("panel", "target"), TARGETS)
def test_every_query_has_an_answer(panel: dict[str, Any], target: dict[str, Any], watched: Prometheus) -> None:
    if ONLY_IN_CONTAINERS in target["expr"]:
        return  # see below
    expr = fill(target["expr"])
    series = watched.over_time(expr, 8) if target.get("range") else watched.now(expr)
    assert series, f"{panel['title']}: no data for {expr}"
    values = [value for one in series for _, value in one.get("values", [one.get("value")])]
    assert any(value not in ("NaN", "+Inf", "-Inf") for value in values), f"{panel['title']}: {values[:5]}"
    # Each name in the legend is a label that the series have.
    for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
        assert all(one["metric"].get(label) for one in series)
