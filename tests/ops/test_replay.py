"""`python -m ops replay` and `quality` with a real service: all flights once, killed and resumed, down and back."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from threading import Timer
from typing import Any

import httpx
import pytest
from click.testing import CliRunner, Result
from prometheus_client.parser import text_string_to_metric_families

from mlops_course.blueprint import MODEL_NAME
from mlops_course.monitoring import LabelStore, Outcome, Quality, Scored, label_counts, write_step
from ops import smoke
from ops.__main__ import cli

KEY = "k7Qz9-mR2vXw8-Lp4tNb6"
DAY = ["--from", "2013-12-05", "--to", "2013-12-05"]
FLIGHTS_OF_DAY = 969


@pytest.fixture(autouse=True)
def _no_key(monkeypatch, tmp_path):
    """The environment and the containers of whoever runs the tests must not decide."""
    for name in ("API_KEY", "PORT", "DOOR_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(smoke, "KEY_FILE", tmp_path / "API_KEY")


@pytest.fixture(scope="module")
def url(artifacts_root: Path, running_service) -> Generator[str]:
    """Return where a real service answers, outside dev."""
    from mlops_course.blueprint import read_registry

    shelf = artifacts_root / MODEL_NAME
    digest = read_registry(shelf).versions["1.0.0"]
    place = {"APP_ENV": "staging", "GIT_SHA": "a" * 40, "API_KEY": KEY, "MODEL_DIGEST": digest}
    with running_service(MODEL_URI=str(shelf / "1.0.0"), **place) as address:
        yield address


@pytest.fixture
def key(monkeypatch) -> None:
    """Give the commands the key."""
    monkeypatch.setenv("API_KEY", KEY)


def ops(*arguments: str | Path) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(cli, [str(one) for one in arguments])


def rows(path: Path) -> list[tuple[Any, ...]]:
    """Return all predictions and outcomes of a store."""
    with closing(LabelStore(path)) as store:
        return store.rows("SELECT * FROM predictions ORDER BY 1") + store.rows("SELECT * FROM outcomes ORDER BY 1")


@pytest.fixture(scope="module")
def whole(url, tmp_path_factory) -> Path:
    """Return the store of a day that was replayed without interruption, in batches."""
    path: Path = tmp_path_factory.mktemp("store") / "labels.sqlite"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("API_KEY", KEY)
        result = ops("replay", "--url", url, *DAY, "--speed", "max", "--store", path)
    assert result.exit_code == 0, result.output
    return path


def test_every_flight_is_in_the_store_with_its_outcome_and_release(whole, flights):
    day = flights[flights["scheduled_departure"].dt.strftime("%Y-%m-%d") == "2013-12-05"]
    assert len(day) == FLIGHTS_OF_DAY
    with closing(LabelStore(whole)) as store:
        counts = label_counts(store, "1.0.0")
        disrupted = store.rows("SELECT sum(disrupted) FROM outcomes")[0][0]
        (release,) = store.rows("SELECT DISTINCT release FROM predictions")[0]
    assert (counts["predictions"], counts["labelled"], counts["mature"]) == (FLIGHTS_OF_DAY,) * 3
    assert disrupted == day["disrupted"].sum()
    assert release.startswith("aaaaaaa-1.0.0-")


def test_one_by_one_the_answers_are_the_same(url, key, whole, tmp_path):
    before = counted(url, "/v1/predict")
    path = tmp_path / "single.sqlite"
    result = ops("replay", "--url", url, *DAY, "--speed", "max", "--batch-minutes", "0", "--store", path)
    assert result.exit_code == 0, result.output
    alone, together = rows(path), rows(whole)
    assert [row[:6] for row in alone] == [row[:6] for row in together]
    # 32-bit sums have another order in a batch: a probability beside the edge of its fourth decimal may fall over it.
    scores = [(one[6], other[6]) for one, other in zip(alone, together, strict=True) if len(one) > 3]
    assert len(scores) == FLIGHTS_OF_DAY
    assert max(abs(one - other) for one, other in scores) < 1.01e-4
    assert sum(one != other for one, other in scores) < 10
    assert counted(url, "/v1/predict") - before == FLIGHTS_OF_DAY


def counted(url: str, route: str) -> float:
    """Return how many requests of a route the service counted as answered."""
    text = httpx.get(f"{url}/metrics").text
    wanted = {"route": route, "status": "200"}
    families = text_string_to_metric_families(text)
    samples = [s for f in families for s in f.samples if s.name == "http_requests_total"]
    return sum(s.value for s in samples if wanted.items() <= s.labels.items())


def test_killed_in_the_middle_it_goes_on_and_ends_the_same(url, whole, tmp_path):
    path = tmp_path / "killed.sqlite"
    # A day in about eight seconds, one request a flight.
    command = [sys.executable, "-m", "ops", "replay", "--url", url, *DAY, "--speed", "9000", "--store", str(path)]
    env = {**os.environ, "API_KEY": KEY}
    for least in (50, 300):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
        wait_for(path, least, process)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    done = len(rows(path))
    assert 0 < done < len(rows(whole))
    last = subprocess.run(
        [*command[:-4], "--speed", "max", "--store", str(path)], capture_output=True, text=True, env=env, check=False
    )
    assert last.returncode == 0, last.stderr
    assert "flights scored up to 2013-12-05" in last.stdout
    assert [row[:6] for row in rows(path)] == [row[:6] for row in rows(whole)]
    assert "repeated predictions 0, repeated outcomes 0" in last.stdout


def wait_for(path: Path, predictions: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until the store has so many predictions."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert process.poll() is None, "the replay ended"
        if path.exists():
            with closing(LabelStore(path)) as store:
                if store.rows("SELECT count(*) FROM predictions")[0][0] >= predictions:
                    return
        time.sleep(0.05)
    pytest.fail(f"not {predictions} predictions in time")


def test_a_service_that_is_away_for_a_moment_is_waited_for(artifacts_root, unused_port, whole, tmp_path):
    """It starts only after the replay; the answers are the same."""
    port, path = unused_port(), tmp_path / "late.sqlite"
    env = {"PORT": str(port), "MODEL_URI": str(artifacts_root / MODEL_NAME / "1.0.0"), "DRAIN_S": "0"}
    env |= {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    started: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        started.append(subprocess.Popen([sys.executable, "-m", "service"], env=env, stdout=subprocess.DEVNULL))

    timer = Timer(6, start)
    timer.start()
    try:
        result = ops("replay", "--url", f"http://127.0.0.1:{port}", *DAY, "--speed", "max", "--store", path)
    finally:
        timer.join()
        started[0].kill()
        started[0].wait(10)
    assert result.exit_code == 0, result.output
    assert [row[:2] for row in rows(path)] == [row[:2] for row in rows(whole)]


def test_a_service_that_stays_away_ends_it_with_advice(unused_port, tmp_path):
    url = f"http://127.0.0.1:{unused_port()}"
    result = ops("replay", "--url", url, *DAY, "--speed", "max", "--patience", "0.1", "--store", tmp_path / "s")
    assert result.exit_code == 1
    assert "the service answered 0: ConnectError; the same command goes on from here" in result.output


def test_without_the_key_it_says_what_the_service_said(url, tmp_path):
    result = ops("replay", "--url", url, *DAY, "--speed", "max", "--store", tmp_path / "s")
    assert result.exit_code == 1
    assert "answered 401" in result.output


def test_each_service_gets_every_flight(url, key, artifacts_root, running_service, tmp_path):
    """Two releases on the same flights, in one store; --fresh begins anew."""
    path, candidate = tmp_path / "both.sqlite", str(artifacts_root / MODEL_NAME / "1.1.0-rc.1")
    with running_service(MODEL_URI=candidate) as other:
        command = ["replay", "--url", url, "--url", other, *DAY, "--speed", "max", "--store", path, "--fresh"]
        for _ in range(2):
            result = ops(*command)
            assert result.exit_code == 0, result.output
    with closing(LabelStore(path)) as store:
        found = store.rows("SELECT model_version, count(*) FROM predictions GROUP BY 1 ORDER BY 1")
        assert found == [("1.0.0", FLIGHTS_OF_DAY), ("1.1.0-rc.1", FLIGHTS_OF_DAY)]
        assert store.rows("SELECT count(*) FROM outcomes") == [(FLIGHTS_OF_DAY,)]
        assert label_counts(store, "1.0.0")["repeated predictions"] == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--speed", "fast"], "'fast' is not a speed; give replayed seconds a second, such as 60, or max"),
        (["--speed", "-1"], "'-1' is not a speed"),
        (["--speed", "nan"], "'nan' is not a speed"),
        (["--from", "2014-02-01", "--to", "2014-02-02"], "the data has 2013-01-01 to 2013-12-31"),
        (["--from", "yesterday"], "does not match the format"),
    ],
)
def test_wrong_options_are_refused(arguments, text, tmp_path):
    result = ops("replay", *arguments, "--store", tmp_path / "s")
    assert result.exit_code == 2
    assert text in result.output


def test_the_speed_says_what_windows_of_rules_become(unused_port, tmp_path):
    url = f"http://127.0.0.1:{unused_port()}"
    result = ops("replay", "--url", url, *DAY, "--speed", "60", "--patience", "0", "--store", tmp_path / "s")
    assert "speed 60, for rules: 1h of flights is 1m, 6h of flights is 6m, 1d of flights is 24m" in result.output


# Quality


@pytest.fixture(scope="module")
def weeks(flights, artifacts_root, tmp_path_factory) -> Path:
    """Return a store with sixteen days of December, scored by the model without a service."""
    from mlops_course.monitoring import as_seconds, known_at, record
    from mlops_course.training import onnx_scores

    days = flights["scheduled_departure"].dt.strftime("%Y-%m-%d")
    part = flights[days.between("2013-12-01", "2013-12-16")]
    graph = (artifacts_root / MODEL_NAME / "1.0.0" / "model.onnx").read_bytes()
    score, day = onnx_scores(graph, part).astype(float).round(4).tolist(), days[part.index].tolist()
    at, known = (as_seconds(part["scheduled_utc"]) - 7_200).tolist(), as_seconds(known_at(part)).tolist()
    ids, label, origin = record(part, "2013", "2014").ids, part["disrupted"].tolist(), part["origin"].tolist()
    path: Path = tmp_path_factory.mktemp("weeks") / "labels.sqlite"
    each = list(zip(ids, at, day, origin, score, label, known, strict=True))
    predictions = [Scored(i, "1.0.0", "r", t, d, o, s, int(s >= 0.34)) for i, t, d, o, s, _, _ in each]
    with closing(LabelStore(path)) as store:
        write_step(store, predictions, [Outcome(one[0], one[5], one[6]) for one in each], at=max(known) + 2 * 86_400)
    return path


def test_the_report_says_what_the_labels_say(weeks, artifacts_root, tmp_path):
    result = ops("quality", "--store", weeks, "--artifacts", artifacts_root, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "quality.json").read_text())
    (month,) = report["months"]
    assert (month["model_version"], month["first_day"], month["days"]) == ("1.0.0", "2013-12-01", 16)
    assert month["flights"] == report["labels"]["1.0.0"]["predictions"]
    assert month["worse"] == ["promise_gap"]
    assert "promise_gap: the probabilities are off: recalibrate" in result.output
    samples = samples_of((tmp_path / "quality.prom").read_text())
    assert samples["model_quality", "roc_auc"] == report["latest"][0]["measured"]["roc_auc"]["value"]
    assert samples["model_quality_regressed", "promise_gap"] == 1
    assert samples["model_label_coverage", ""] == 1


def samples_of(text: str) -> dict[tuple[str, str], float]:
    """Return samples by name and measure."""
    families = text_string_to_metric_families(text)
    return {(s.name, s.labels.get("metric", "")): s.value for family in families for s in family.samples}


def test_prometheus_can_scrape_it_and_sees_new_labels(artifacts_root, weeks, unused_port, tmp_path):
    path, port = tmp_path / "labels.sqlite", unused_port()
    command = [sys.executable, "-m", "ops", "quality", "--store", str(path), "--artifacts", str(artifacts_root)]
    process = subprocess.Popen([*command, "--serve", str(port), "--every", "0.2"], stdout=subprocess.DEVNULL)
    try:
        assert scrape(port, lambda found: not found) == {}  # an empty store: nothing to say yet
        with closing(LabelStore(weeks)) as old, closing(LabelStore(path)) as new:
            predictions = [Scored(*row) for row in old.rows("SELECT * FROM predictions")]
            outcomes = [Outcome(*row) for row in old.rows("SELECT * FROM outcomes")]
            write_step(new, predictions, outcomes, at=max(o.known_at for o in outcomes) + 2 * 86_400)
        found = scrape(port, lambda samples: ("model_quality", "roc_auc") in samples)
        assert found["model_quality_regressed", "promise_gap"] == 1
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait(10)


def scrape(port: int, good: Any) -> dict[tuple[str, str], float]:
    """Scrape until the answer is good."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            found = samples_of(httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=5).text)
        except httpx.TransportError:
            found = {("not", "there"): 0.0}
        if good(found):
            return found
        time.sleep(0.2)
    raise AssertionError(found)


def test_without_a_store_or_mature_days_it_says_what_to_do(tmp_path, artifacts_root):
    result = ops("quality", "--store", tmp_path / "nothing")
    assert result.exit_code == 1
    assert "fill it with `python -m ops replay`" in result.output
    path = tmp_path / "young.sqlite"
    with closing(LabelStore(path)) as store:
        write_step(store, [Scored("0" * 32, "1.0.0", "r", 1_000, "2013-12-01", "EWR", 0.5, 1)], [], at=2_000)
    result = ops("quality", "--store", path, "--artifacts", artifacts_root)
    assert result.exit_code == 1
    assert "no day is mature yet" in result.output


def test_a_model_without_an_artifact_is_left_out_and_named(weeks, artifacts_root, tmp_path):
    path = tmp_path / "labels.sqlite"
    with closing(LabelStore(weeks)) as old, closing(LabelStore(path)) as new:
        predictions = [Scored(*row) for row in old.rows("SELECT * FROM predictions")]
        write_step(new, [one._replace(model_version="7.0.0") for one in predictions[:10]], [], at=1)
        write_step(new, predictions, [], at=predictions[-1].scored_at + 10 * 86_400)
    result = ops("quality", "--store", path, "--artifacts", artifacts_root, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    assert "no artifact of 7.0.0" in result.output
    assert "0.0% have an outcome" in result.output
    (month,) = json.loads((tmp_path / "quality.json").read_text())["months"]
    assert (month["measured"]["roc_auc"]["value"], month["coverage"]) == (None, 0.0)
    assert math.isnan(Quality.model_validate(month).measured["roc_auc"].value)
    assert samples_of((tmp_path / "quality.prom").read_text())["model_label_coverage", ""] == 0
