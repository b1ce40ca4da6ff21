"""The summary: the numbers are those of Prometheus, what is not known is said, and a wrong file is an error."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result

from mlops_course.blueprint import MODEL_NAME, resolve_channel
from mlops_course.monitoring import Baseline, Figure, Summary, check_window, three_answers
from ops import ROOT
from ops.summary import summary
from tests.ops.live import Prometheus, prometheus

if TYPE_CHECKING:
    import pandas as pd

DAY = 86_400
STEP = 300  # seconds between two samples


def run(*arguments: object) -> Result:
    return CliRunner().invoke(summary, [str(one) for one in arguments])


def read(folder: Path) -> Summary:
    return Summary.model_validate_json((folder / "summary.json").read_text())


def figures(facts: Summary) -> dict[str, Figure]:
    return {one.name: one for one in (*facts.service, *facts.model)}


def test_of_the_running_service(watched: Prometheus, tmp_path: Path) -> None:
    words = tmp_path / "said.txt"
    words.write_text("This week: nothing but <tests>.\n")
    done = run("--prometheus", watched.url, "--period", "1m", "--said-in", words, "--output", tmp_path / "page")
    assert done.exit_code == 0, done.output
    facts, page = read(tmp_path / "page"), (tmp_path / "page" / "index.html").read_text()
    assert "Are we within our promises?" in done.output
    found = figures(facts)
    assert found["Predictions that succeed"].value == 1
    assert found["Error budget left"].value == 1
    assert 0 < (found["95 % of predictions take at most"].value or math.nan) < 10_000
    assert (found["Flights scored"].value or 0) > 1000
    assert facts.release.startswith("0123456-1.0.0-")
    assert (found["Drift of the inputs"].value or math.nan) < 10
    assert found["Quality on labelled flights"].light == "unknown"
    assert dict(zip("abc", three_answers(facts), strict=True))["b"][1] == "unknown"
    assert "This week: nothing but &lt;tests&gt;." in page


def test_with_what_labels_and_drift_say(
    watched: Prometheus, artifacts_root: Path, flights: pd.DataFrame, tmp_path: Path
) -> None:
    """The figures are those of `ops quality`, of the model that serves; a drift report adds its findings."""
    options = {"--store": watched.folder / "labels.sqlite", "--artifacts": artifacts_root, "--output": tmp_path}
    command = [sys.executable, "-m", "ops", "quality", *(str(part) for pair in options.items() for part in pair)]
    judged = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert judged.returncode == 0, judged.stderr
    (latest,) = json.loads((tmp_path / "quality.json").read_text())["latest"]
    reports = drift_reports(flights, artifacts_root, tmp_path)
    drift = [part for file in reports for part in ("--drift", file)]
    asked = ["--prometheus", watched.url, "--period", "1m", "--quality", tmp_path / "quality.json"]
    done = run(*asked, *drift, "--output", tmp_path / "page")
    assert done.exit_code == 0, done.output
    facts = read(tmp_path / "page")
    ranking = figures(facts)["Ranking of the flights (ROC AUC)"]
    assert ranking.value == latest["measured"]["roc_auc"]["value"]
    assert f"{latest['reference']['roc_auc']:.3f}" in ranking.target
    assert figures(facts)["Disrupted flights that were warned"].value == latest["measured"]["recall_at_budget"]["value"]
    # Twice in a row a carrier came under another code.
    found = figures(facts)["Findings of the drift report"]
    assert (found.value or 0) > 0
    assert found.light in ("yellow", "red")
    assert any(risk.text.startswith("Drift: unknown carrier") and risk.doing for risk in facts.risks)
    assert any(plot.title.startswith("Ranking of the flights (ROC AUC): 1.0.0 ") for plot in facts.plots)
    # September was more punctual than the model promised; what broke its rule is a risk with a remedy.
    assert latest["worse"] == ["promise_gap"]
    assert any(
        risk.text.startswith("Promised minus observed risk") and "recalibrate" in risk.doing for risk in facts.risks
    )


def drift_reports(flights: pd.DataFrame, artifacts_root: Path, folder: Path) -> list[Path]:
    """Compare two weeks of September, in which one carrier has another code, with spring, as `ops drift` does."""
    artifact, _ = resolve_channel(artifacts_root / MODEL_NAME, "prod")
    when = flights["scheduled_departure"]
    spring = flights[(when >= "2013-03-01") & (when < "2013-06-01")]
    normal = Baseline("spring", spring, json.loads((artifact / "reference.json").read_text()), draws=200)
    files = []
    for first, after in (("2013-09-01", "2013-09-08"), ("2013-09-08", "2013-09-15")):
        week = flights[(when >= first) & (when < after)]
        report = check_window(week.assign(carrier=week["carrier"].replace("UA", "U2")), normal)
        files.append(folder / f"drift-{first}.json")
        files[-1].write_text(report.model_dump_json())
    return files


@pytest.fixture(scope="module")
def unwatched(
    prometheus_tools: None, unused_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory
) -> Generator[Prometheus]:
    """A Prometheus that knows nothing."""
    with prometheus(tmp_path_factory.mktemp("empty"), unused_port(), {}) as running:
        yield running


def test_no_data_is_never_green(unwatched: Prometheus, tmp_path: Path) -> None:
    done = run("--prometheus", unwatched.url, "--output", tmp_path)
    assert done.exit_code == 0, done.output
    facts = read(tmp_path)
    assert facts.seen is None
    assert {one.light for one in (*facts.service, *facts.model)} == {"unknown", None}
    assert [shade for _, shade, _, _ in three_answers(facts)] == ["unknown"] * 3
    assert facts.release == "not known"
    assert "fine" not in re.sub(r"<footer>.*", "", (tmp_path / "index.html").read_text(), flags=re.DOTALL)


def history(end: int, days: int = 16) -> Iterator[str]:
    """Yield two weeks and two days of samples as OpenMetrics text: good weeks, then a bad one.

    100 predictions every five minutes, each within 10 ms; in the last seven days one in a hundred fails, and the others
    take up to 200 ms. On one day nothing was measured.
    """
    start = end - days * DAY
    times = [t for t in range(start, end + 1, STEP) if not 3 * DAY <= end - t < 4 * DAY]
    bad = [max(0, t - (end - 7 * DAY)) // STEP for t in times]
    sent = [(t - start) // STEP for t in times]
    labels = 'job="service",route="/v1/predict",method="POST"'
    series: dict[str, tuple[str, Sequence[float]]] = {
        'up{job="service"}': ("gauge", [1] * len(times)),
        'release_info{job="service",release="a1b2c3d-1.0.0-0f2e",model_version="1.0.0"}': ("gauge", [1] * len(times)),
        f'http_requests_total{{{labels},status="200"}}': (
            "counter",
            [100 * n - b for n, b in zip(sent, bad, strict=True)],
        ),
        f'http_requests_total{{{labels},status="500"}}': ("counter", bad),
        'model_predictions_total{origin="JFK",decision="on_time"}': ("counter", [100 * n for n in sent]),
        'model:feature_psi:1d{feature="dest"}': ("gauge", [0.3 if b else 0.02 for b in bad]),
        'model:feature_psi:1d{feature="temperature_f"}': ("gauge", [6.0] * len(times)),
        "model:score_psi:7d": ("gauge", [0.2] * len(times)),
    }
    for edge, fast in (("0.01", 1), ("0.15", 1), ("0.2", 0), ("+Inf", 0)):
        counts = [100 * (n - b) if fast else 100 * n for n, b in zip(sent, bad, strict=True)]
        name = f'http_request_duration_seconds_bucket{{{labels},outcome="answered",le="{edge}"}}'
        series[name] = ("counter", counts)
    for name, (kind, values) in series.items():
        # A histogram would need more than its buckets.
        told = "unknown" if "_bucket" in name else kind
        yield f"# TYPE {name.partition('{')[0].removesuffix('_total')} {told}"
        yield from (f"{name} {value} {t}" for t, value in zip(times, values, strict=True))
    yield "# EOF"


@pytest.fixture(scope="module")
def remembered(
    prometheus_tools: None, unused_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory
) -> Generator[Prometheus]:
    """A Prometheus with a past."""
    folder = tmp_path_factory.mktemp("past")
    merged: dict[str, list[str]] = {}
    for line in history(int(time.time()) // STEP * STEP):
        # OpenMetrics wants the lines of a family together.
        key = re.split(r"[ {]", line.removeprefix("# TYPE "))[0].removesuffix("_total") if line != "# EOF" else "~"
        if not (line.startswith("# TYPE") and key in merged):
            merged.setdefault(key, []).append(line)
    (folder / "past.txt").write_text("\n".join(line for lines in merged.values() for line in lines) + "\n")
    command = ["promtool", "tsdb", "create-blocks-from", "openmetrics", "--max-block-duration=1024h"]
    made = subprocess.run([*command, folder / "past.txt", folder / "data"], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    with prometheus(folder, unused_port(), {}) as running:
        yield running


def test_numbers_arrows_and_lights_of_a_bad_week(remembered: Prometheus, tmp_path: Path) -> None:
    done = run("--prometheus", remembered.url, "--output", tmp_path)
    assert done.exit_code == 0, done.output
    facts = read(tmp_path)
    found = figures(facts)
    succeeded = found["Predictions that succeed"]
    assert succeeded.value == pytest.approx(0.99, abs=2e-4)
    assert succeeded.before == pytest.approx(1, abs=2e-4)
    assert succeeded.light == "yellow"
    left = found["Error budget left"]
    assert (left.value or 0) < 0
    assert left.light == "red"
    slow = found["95 % of predictions take at most"]
    assert slow.value == pytest.approx(197.5, abs=1), "within the bucket from 150 to 200 ms"
    assert (slow.before or math.nan) < 10
    assert slow.light == "yellow"
    drift = found["Drift of the inputs"]
    assert (drift.value, drift.before, drift.light) == (0.3, 0.02, "red")
    assert "dest" in drift.note
    assert facts.release == "a1b2c3d-1.0.0-0f2e"
    assert facts.seen == pytest.approx(6 / 7, abs=0.02)
    assert any("of the period" in risk.text for risk in facts.risks), "a day without measurements is named"
    points = facts.plots[0].lines["share"]
    assert any(point.value is None for point in points), "and stays a gap in the plot"
    page = (tmp_path / "index.html").read_text()
    assert page.count("worse</span>") >= 3


def test_the_page_needs_no_network(remembered: Prometheus, tmp_path: Path) -> None:
    assert run("--prometheus", remembered.url, "--output", tmp_path).exit_code == 0
    page = (tmp_path / "index.html").read_text()
    addresses = re.findall(r'(?:src|href|action)="([^"#][^"]*)"|url\((?!#)([^)]*)\)|@import', page)
    assert addresses == []
    assert "<script" not in page


def test_nobody_answers(unused_port: Callable[[], int], tmp_path: Path) -> None:
    done = run("--prometheus", f"http://127.0.0.1:{unused_port()}", "--output", tmp_path)
    assert done.exit_code == 1
    assert "does not answer as Prometheus" in done.output
    assert not (tmp_path / "index.html").exists()


@pytest.mark.parametrize("period", ["7", "0d", "week", "-1d", "1y"])
def test_a_wrong_period(period: str, tmp_path: Path) -> None:
    done = run("--period", period, "--output", tmp_path)
    assert done.exit_code == 2
    assert "such as 7d" in done.output


def test_reports_with_different_baselines(
    unwatched: Prometheus, flights: pd.DataFrame, artifacts_root: Path, tmp_path: Path
) -> None:
    first, second = drift_reports(flights, artifacts_root, tmp_path)
    second.write_text(second.read_text().replace('"spring"', '"golden"'))
    done = run("--prometheus", unwatched.url, "--drift", first, "--drift", second, "--output", tmp_path / "page")
    assert done.exit_code == 1
    assert "different baselines" in done.output


@pytest.mark.parametrize("option", ["--quality", "--drift"])
def test_a_wrong_file(option: str, unwatched: Prometheus, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps({"1.0.0": [{"roc_auc": 1}]}))
    done = run("--prometheus", unwatched.url, option, wrong, "--output", tmp_path / "page")
    assert done.exit_code == 1
    assert f"ops {option[2:]}" in done.output
    assert not (tmp_path / "page").exists()


def test_both_ways_of_saying_something(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    done = run("--said", "b", "--said-in", tmp_path / "a", "--output", tmp_path / "page")
    assert done.exit_code == 2
    assert "not both" in done.output
