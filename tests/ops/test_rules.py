"""The alert rules: they are valid, tested, explained, and read nothing that nobody exports.

`promtool test rules` runs ops/prometheus/tests/, which holds each alert to both sides of its limit. Here is the rest.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from mlops_course.blueprint import CRITERIA, MODEL_NAME, resolve_channel
from mlops_course.monitoring import MIN_COVERAGE, Metrics, Release
from ops.alert_drill import BUDGET, DEAD, FAULTS, SLOW, Lab, laboratory, ordinary_flights
from ops.alert_rules import DURATION, PROMETHEUS, shorten

RULES = sorted((PROMETHEUS / "rules").glob("*.yml"))
TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))

# Exported by what runs only at times, `python -m ops quality --serve` and the controller of a rollout, and not here.
PROMISED = {
    *("model_quality", "model_quality_regressed", "model_quality_reference", "model_label_coverage"),
    *("model_quality_low", "model_quality_high"),
    *("rollout_step_started_timestamp_seconds", "rollout_in_progress"),
}
# These do not exist before something happened, or outside a container; each is looked for in another way below.
NOT_ALWAYS = {"cgroup_memory_limit_bytes", "cgroup_cpu_periods_total", "cgroup_cpu_throttled_periods_total"}
CHECKS = {"synthetic_check_passed", "synthetic_round_finished_timestamp_seconds"}


def groups() -> Iterator[dict[str, Any]]:
    """Return every group of every file."""
    for file in RULES:
        yield from yaml.safe_load(file.read_text())["groups"]


def rules(kind: str) -> list[dict[str, Any]]:
    """Return all rules of a kind: `alert` or `record`."""
    return [rule for group in groups() for rule in group["rules"] if kind in rule]


ALERTS = {rule["alert"] for rule in rules("alert")}
RECORDED = {rule["record"] for rule in rules("record")}


@pytest.fixture(scope="session")
def promtool() -> str:
    """Return where promtool is."""
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("needs promtool, which is not on PyPI: `make tools` installs it on Debian and Ubuntu")
    return found


def run(*command: str | Path) -> str:
    """Run a program that has to end well, and return what it said."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_prometheus_accepts_rules_and_configuration(promtool):
    run(promtool, "check", "rules", "--lint=all", "--lint-fatal", *RULES)
    assert "is valid prometheus config" in run(promtool, "check", "config", PROMETHEUS / "prometheus.yml")


def test_alertmanager_accepts_its_configuration(root):
    amtool = shutil.which("amtool")
    if amtool is None:
        pytest.skip("needs amtool, which comes with Alertmanager")
    assert "2 inhibit rules" in run(amtool, "check-config", root / "ops" / "alertmanager" / "alertmanager.yml")


@pytest.fixture(scope="module")
def verdicts(promtool: str) -> Generator[dict[Path, Future[str]]]:
    """Run all files at once, as many as there are processors, and return what each will say."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {file: pool.submit(run, promtool, "test", "rules", file) for file in TESTS}


@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.stem)
def test_rules_do_what_their_tests_say(verdicts, file):
    assert "SUCCESS" in verdicts[file].result()


def test_promtool_notices_a_changed_limit(promtool, tmp_path):
    """The tests can fail: with one limit a little higher, or one window shorter, they do."""
    shutil.copytree(PROMETHEUS, tmp_path / "prometheus")
    rule_file, test_file = (tmp_path / "prometheus" / name / "platform.yml" for name in ("rules", "tests"))
    tests, text = yaml.safe_load(test_file.read_text()), rule_file.read_text()
    tests["tests"] = [one for one in tests["tests"] if one["name"].startswith(("MemoryNear", "ServiceRest"))]
    test_file.write_text(yaml.safe_dump(tests))
    run(promtool, "test", "rules", test_file)
    for old, new in (
        ("instance:process_memory:ratio > 0.9", "instance:process_memory:ratio > 0.92"),
        ('process_start_time_seconds{job="service"}[30m]', 'process_start_time_seconds{job="service"}[5m]'),
    ):
        assert old in text
        rule_file.write_text(text.replace(old, new))
        line = [promtool, "test", "rules", test_file]
        assert subprocess.run(line, capture_output=True, check=False).returncode != 0, new


@functools.cache
def cases() -> list[dict[str, Any]]:
    """Return every case of every file of tests."""
    return [case for file in TESTS for case in yaml.safe_load(file.read_text())["tests"]]


def test_every_alert_is_seen_firing_with_its_words_and_silent():
    written = {
        one["exp_labels"].get("signal", one["exp_labels"].get("source", "")) + test["alertname"]
        for case in cases()
        for test in case.get("alert_rule_test", [])
        for one in test["exp_alerts"]
    }
    told = {
        rule["labels"].get("signal", rule["labels"].get("source", "")) + rule["alert"]
        for rule in rules("alert")
        if not rule["alert"].startswith(("Availability", "Latency"))
    }
    assert told <= written
    assert {name for name in ALERTS if name.startswith(("Availability", "Latency"))} <= {
        name.removeprefix("service") for name in written
    }
    for name in ALERTS:
        counts = [
            sum(sample["value"] for sample in test["exp_samples"] if f'alertname="{name}"' in sample["labels"])
            for case in cases()
            for test in case.get("promql_expr_test", [])
            if test["expr"].startswith("count by (alertname")
        ]
        assert max(counts) >= 1, name
        assert min(counts) == 0, name


def test_every_alert_has_its_section_and_every_section_its_alert(root):
    text = (root / "docs" / "incident_playbook.md").read_text()
    sections = re.findall(r"^#### (\w+)$", text, re.MULTILINE)
    assert sorted(sections) == sorted(ALERTS)
    # A link within the page leads somewhere.
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors
    for rule in rules("alert"):
        assert rule["annotations"]["runbook"] == f"docs/incident_playbook.md#{rule['alert'].lower()}"


def test_severity_and_owner_in_the_playbook_are_those_of_the_rule(root):
    text = (root / "docs" / "incident_playbook.md").read_text()
    said = dict(re.findall(r"^#### (\w+)\n\n\*(.+?)\.\*", text, re.MULTILINE))
    for rule in rules("alert"):
        assert said[rule["alert"]] == f"{rule['labels']['severity'].capitalize()}, {rule['labels']['owner']}"


def test_every_alert_says_what_whose_and_what_to_do():
    for rule in rules("alert"):
        name, labels, notes = rule["alert"], rule["labels"], rule["annotations"]
        assert labels["severity"] in {"page", "ticket"}, name
        assert labels["owner"] in {"platform", "serving", "model"}, name
        assert labels["layer"] in {"platform", "web", "inference", "model", "business"}, name
        assert labels["cause"], name
        assert set(notes) == {"summary", "action", "runbook"}, name
        assert "$value" in notes["summary"], name
        assert notes["action"].endswith("."), name
        assert "for" in rule, name


def test_drift_alone_pages_nobody():
    drift = [rule for rule in rules("alert") if rule["labels"]["cause"] in {"drift", "quality", "labels", "inputs"}]
    assert {rule["alert"] for rule in drift if rule["labels"]["severity"] == "page"} == {"DriftWithImpact"}


def test_what_alertmanager_holds_back_are_causes_that_exist(root):
    config = yaml.safe_load((root / "ops" / "alertmanager" / "alertmanager.yml").read_text())
    symptoms = config["inhibit_rules"][0]["target_matchers"][0].split('"')[1].split("|")
    causes = {rule["labels"]["cause"] for rule in rules("alert")}
    assert set(symptoms) <= causes
    # What is not a symptom of a dead service is still heard while it is dead.
    assert causes - set(symptoms) == {"down", "memory", "drift", "inputs", "quality", "labels", "rollout", "monitoring"}


def test_the_limits_are_those_of_the_acceptance_criteria():
    text = (PROMETHEUS / "rules" / "objectives.yml").read_text()
    allowed = 1 - CRITERIA["success_rate"].limit
    slow = CRITERIA["latency_p95_ms"].limit / 1000
    given = [float(x) for x in re.findall(r"prediction_errors:ratio\w+ > [\d.]+ \* ([\d.]+)", text)]
    assert len(given) == 8
    assert given == pytest.approx([allowed] * 8)
    assert {float(x) for x in re.findall(r"slow_predictions:ratio\w+ > [\d.]+ \* ([\d.]+)", text)} == {0.05}
    assert set(re.findall(r'outcome="answered",le="([\d.]+)"', text)) == {f"{slow:g}"}
    assert set(re.findall(r'le=~"(\d+)\|', text)) == {f"{1000 * slow:g}"}
    envoy = (PROMETHEUS.parent / "envoy" / "envoy.yaml").read_text()
    edges = re.search(r"upstream_rq_time}\n +buckets: \[(.+)\]", envoy)
    assert edges is not None
    assert slow * 1000 in [float(edge) for edge in edges[1].split(",")]
    for name in ("LatencyP95High", "CpuThrottledAndSlow"):
        (rule,) = (rule for rule in rules("alert") if rule["alert"] == name)
        assert f"> {slow:g}" in rule["expr"]


def test_a_window_in_a_name_is_the_window_in_the_expression():
    for rule in rules("record"):
        windows = set(re.findall(r"\[(\w+)\]", rule["expr"]))
        named = re.findall(r"(?<=[a-z_:])(\d+[mhd])(?:$|_)", rule["record"])
        if windows and ":" in rule["record"] and rule["record"] != "release:is_new":
            assert windows == set(named[:1]), rule["record"]


def test_what_is_recorded_is_still_fresh_when_it_is_read():
    """Prometheus looks back five minutes: a group that is evaluated less often leaves gaps, and `for` begins again."""
    for group in groups():
        number, unit = int(group["interval"][:-1]), group["interval"][-1]
        assert number * {"s": 1, "m": 60}[unit] <= 240, group["name"]


def names_in(expression: str) -> set[str]:
    """Return the names of the metrics in an expression of PromQL."""
    text = re.sub(r'"(?:[^"\\]|\\.)*"', '""', expression)
    text = re.sub(r"\{[^}]*\}|\[[^]]*\]", "", text)
    text = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", "", text)
    words = re.findall(r"(?<![\w.])[a-zA-Z_:][\w:]*(?!\w*\s*\()", text)
    return {word for word in words if word not in {"and", "or", "unless", "offset", "bool", "group_left"}}


def test_names_are_found_in_expressions():
    text = 'sum by (a, b) (rate(x_total{route="/v1 and y"}[5m] offset 1h)) / on (a) group_left () (job:y:z >= 5) and q'
    assert names_in(text) == {"x_total", "job:y:z", "q"}


def read() -> set[str]:
    """Return the names of all metrics that a rule or an annotation reads, without those that rules make themselves."""
    found = set().union(*(names_in(rule["expr"]) for kind in ("alert", "record") for rule in rules(kind)))
    for rule in rules("alert"):
        queries = re.findall(r'(?:query|printf) "(\w.+?)"(?: \$| }})', rule["annotations"]["summary"])
        found |= set().union(*(names_in(query) for query in queries))
    return found - RECORDED - {"ALERTS"}


@pytest.fixture(scope="module")
def lab(artifacts_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[Lab]:
    """Return the real service behind the real Envoy, asked by a real Prometheus with these rules."""
    if shutil.which("prometheus") is None:
        pytest.skip("needs prometheus, which is not on PyPI: `make tools` installs it on Debian and Ubuntu")
    artifact, _ = resolve_channel(artifacts_root / MODEL_NAME, "prod")
    stop = threading.Event()
    with laboratory(tmp_path_factory.mktemp("lab"), artifact, ordinary_flights(500), 240, {}) as running:
        sender = threading.Thread(target=running.traffic, args=(stop,))
        sender.start()
        time.sleep(8)  # some rates of 5 seconds
        yield running
        stop.set()
        sender.join()


def ask(lab: Lab, query: str) -> list[dict[str, Any]]:
    """Return the answer of Prometheus to an expression."""
    answer = lab.client.get(f"{lab.prometheus}/api/v1/query", params={"query": query}).json()
    assert answer["status"] == "success", answer
    found: list[dict[str, Any]] = answer["data"]["result"]
    return found


def test_every_metric_that_is_read_is_exported(lab):
    here = set(lab.client.get(f"{lab.prometheus}/api/v1/label/__name__/values").json()["data"])
    assert "model_validation_failures_total" in read()
    assert sorted(read() - here - PROMISED - NOT_ALWAYS - CHECKS) == []
    assert here >= {name for name in read() if name.startswith(("http_", "process_", "service_", "envoy_", "prom"))}


def test_every_selector_selects_something(lab):
    """Also with its labels: a wrong `route`, or an edge that Prometheus writes in another way, selects nothing."""
    texts = [rule["expr"] for kind in ("alert", "record") for rule in rules(kind)]
    selectors = {found for text in texts for found in re.findall(r"(?<![:\w])[a-z]\w+\{[^}]*\}", text)}
    absent = NOT_ALWAYS | PROMISED | CHECKS | RECORDED | {"ALERTS"}
    asked = [one for one in selectors if one.split("{")[0] not in absent]
    # Not yet: nobody was too slow.
    asked = [one for one in asked if 'status="408"' not in one or "route" in one]
    assert len(asked) > 15
    assert [one for one in sorted(asked) if not ask(lab, f"count({one})")] == []


def test_labels_are_missing_below_the_share_that_a_verdict_needs():
    (rule,) = [rule for rule in rules("alert") if rule["alert"] == "LabelsMissing"]
    assert rule["expr"].split() == ["model_label_coverage", "<", f"{MIN_COVERAGE:g}"]
    assert f"{MIN_COVERAGE:.0%} are needed".replace("%", " %") in rule["annotations"]["summary"]


def test_every_rule_is_evaluated_without_an_error(lab):
    found = lab.client.get(f"{lab.prometheus}/api/v1/rules").json()["data"]["groups"]
    wrong = {
        rule["name"]: rule.get("lastError") for group in found for rule in group["rules"] if rule["health"] != "ok"
    }
    assert wrong == {}
    assert sum(len(group["rules"]) for group in found) == len(rules("alert")) + len(rules("record"))


def test_what_containers_and_checks_export(tmp_path, unused_port):
    """What this machine does not show: the limits of a container, and the port of the checks."""
    import httpx

    from mlops_course.release import Check
    from ops.synthetic import Exposed

    for name, text in (
        ("memory.max", "268435456"),
        ("cpu.max", "100000 100000"),
        ("cpu.stat", "nr_periods 10\nnr_throttled 3\nthrottled_usec 5000"),
    ):
        (tmp_path / name).write_text(text + "\n")
    page = Metrics(Release("1", "abc"), tmp_path).page().decode()
    assert {s.name for family in text_string_to_metric_families(page) for s in family.samples} >= NOT_ALWAYS
    port = unused_port()
    shown = Exposed(port)
    shown.round(
        [Check(name="probabilities", passed=True, detail=""), Check(name="missing weather", passed=False, detail="")]
    )
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    values = {s.labels.get("check", s.name): s.value for f in text_string_to_metric_families(text) for s in f.samples}
    assert values["probabilities"] == 1
    assert values["missing weather"] == 0
    assert time.time() - values["synthetic_round_finished_timestamp_seconds"] < 60
    shown.round([Check(name="probabilities", passed=False, detail="")])
    assert "missing weather" not in httpx.get(f"http://127.0.0.1:{port}/metrics").text


def test_shorter_windows_change_nothing_else():
    text = (
        "interval: 30s\nexpr: rate(a:ratio_rate1h[1h]) > 0.1 and sum(increase(b[5m] offset 1d)) >= 10\n"
        "for: 0s\nfor: 10m\nlabels: {window: 1h}\n"
    )
    assert shorten(text, 240) == (
        "interval: 1s\nexpr: rate(a:ratio_rate1h[15000ms]) > 0.1 and sum(increase(b[5000ms] offset 360000ms)) >= 10\n"
        "for: 0ms\nfor: 3000ms\nlabels: {window: 1h}\n"
    )
    for file in RULES:
        left = re.sub(r"\d+ms", "", shorten(file.read_text(), 240))
        assert [found[0] for found in DURATION.finditer(left) if found[0] != "interval: 1s"] == []


def test_the_drill_knows_only_alerts_that_exist():
    named = BUDGET | SLOW | DEAD | set().union(*(fault.expected | fault.allowed for fault in FAULTS))
    assert named <= ALERTS
