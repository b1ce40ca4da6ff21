"""The real thing on this machine: the service behind its door, a Prometheus that watches both, and real flights."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import yaml

from mlops_course.training import as_request
from ops import ROOT
from ops.door import arguments, configure

RULES = ROOT / "ops" / "prometheus" / "rules"

BATCH = 250  # flights in one request
PAUSE_S = 0.2


@dataclass
class Prometheus:
    """A running Prometheus."""

    url: str
    folder: Path  # what it and its neighbours write

    def get(self, what: str, **parameters: str | float) -> Any:
        """Ask its HTTP interface. Raises AssertionError with its own words when it refuses."""
        answer = httpx.get(f"{self.url}/api/v1/{what}", params=parameters, timeout=30).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def now(self, expr: str) -> list[dict[str, Any]]:
        """Return the series of an expression, as they are now."""
        found: list[dict[str, Any]] = self.get("query", query=expr)["result"]
        return found

    def over_time(self, expr: str, seconds: float, step: float = 1) -> list[dict[str, Any]]:
        """Return the series of an expression over the last seconds."""
        end = time.time()
        found: list[dict[str, Any]] = self.get("query_range", query=expr, start=end - seconds, end=end, step=step)[
            "result"
        ]
        return found


def wait(until: Callable[[], bool], what: str, seconds: float = 30) -> None:
    """Wait for something. Raises AssertionError when it does not happen in time."""
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.1)


@contextmanager
def prometheus(
    folder: Path,
    port: int,
    targets: Mapping[str, tuple[str, str]],
    rules: list[Path] | None = None,
    every: str = "500ms",
) -> Generator[Prometheus]:
    """Run Prometheus on a port. `targets`: name of the job: (address, path of the metrics)."""
    jobs = [
        {"job_name": job, "metrics_path": path, "static_configs": [{"targets": [address]}]}
        for job, (address, path) in targets.items()
    ]
    config = {
        "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every},
        "rule_files": [str(rule) for rule in rules or []],
        "scrape_configs": jobs,
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    running = Prometheus(f"http://127.0.0.1:{port}", folder)

    def ready() -> bool:
        assert process.poll() is None, (folder / "log").read_text()
        try:
            return httpx.get(f"{running.url}/-/ready", timeout=1).status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait(ready, "Prometheus is ready")
        yield running
    finally:
        process.terminate()
        process.wait(20)


@dataclass
class Replay:
    """Sends real flights in the order of time, in batches and one by one, and some bad requests, until stopped."""

    url: str
    flights: pd.DataFrame
    sent: int = 0  # flights
    statuses: dict[int, int] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)

    def _ask(self, client: httpx.Client, path: str, body: Any) -> None:
        status = client.post(self.url + path, json=body).status_code
        self.statuses[status] = self.statuses.get(status, 0) + 1

    def _run(self) -> None:
        with httpx.Client(timeout=10) as client:
            while not self._stop.is_set():
                first = self.sent % (len(self.flights) - BATCH)  # a long test meets the same autumn again
                rows = self.flights.iloc[first : first + BATCH].to_dict("records")
                requests = [as_request(row) for row in rows]
                self._ask(client, "/v1/predict/batch", {"flights": requests})
                for request in requests[:5]:
                    self._ask(client, "/v1/predict", request)
                # A mistake, and an airport that training never saw.
                self._ask(client, "/v1/predict", requests[0] | {"humidity_pct": 300})
                self._ask(client, "/v1/predict", requests[0] | {"dest": "ZZZ"})
                self.sent += len(rows)
                self._stop.wait(PAUSE_S)

    @contextmanager
    def running(self) -> Generator[Replay]:
        """Send in a thread while the body of `with` runs."""
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join(30)


def quick_rules(folder: Path) -> list[Path]:
    """Write the project's rules, evaluated every second. Raises FileNotFoundError when there are none."""
    files = sorted(RULES.glob("*.yml"))
    if not files:
        raise FileNotFoundError(RULES)
    written = []
    for file in files:
        rules = yaml.safe_load(file.read_text())
        for group in rules["groups"]:
            group["interval"] = "1s"
        written.append(folder / file.name)
        written[-1].write_text(json.dumps(rules))
    return written


@contextmanager
def door(folder: Path, port: int, service: int, admin: int) -> Generator[str]:
    """Run Envoy in front of a service; gives the address of its statistics."""
    config = configure(folder, port, service, admin)
    with (folder / "envoy.log").open("wb") as log:
        process = subprocess.Popen(arguments(config), stdout=log, stderr=log)

    def ready() -> bool:
        assert process.poll() is None, (folder / "envoy.log").read_text()
        try:
            return httpx.get(f"http://127.0.0.1:{port}/ready", timeout=1).status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait(ready, "the door is open")
        yield f"127.0.0.1:{admin}"
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def watch(
    url: str, unused_port: Callable[[], int], flights: pd.DataFrame, artifacts: Path, folder: Path
) -> Generator[Prometheus]:
    """Watch a running service and its door with the project's rules.

    First `ops replay` sends five weeks of flights through the door, whose outcomes `ops quality` then judges; more
    flights follow while the test runs.
    """
    port, service = unused_port(), int(url.rpartition(":")[2])
    with ExitStack() as stack:
        statistics = stack.enter_context(door(folder / "door", port, service, unused_port()))
        labels, store = unused_port(), folder / "labels.sqlite"
        targets = {
            "service": (f"127.0.0.1:{service}", "/metrics"),
            "envoy": (statistics, "/stats/prometheus"),
            "quality": (f"127.0.0.1:{labels}", "/metrics"),
        }
        running = stack.enter_context(prometheus(folder, unused_port(), targets, quick_rules(folder)))
        days = ["--from", "2013-09-01", "--to", "2013-10-05", "--speed", "max"]
        replay(folder, "--url", f"http://127.0.0.1:{port}", *days, "--store", str(store))
        stack.enter_context(judging(folder, store, labels, artifacts))
        sender = stack.enter_context(Replay(f"http://127.0.0.1:{port}", flights).running())
        started = time.monotonic()
        # Long enough for two windows of six seconds, and for the rules that read them.
        wait(lambda: sender.sent > 3000 and time.monotonic() - started > 15, "3000 flights are sent", 90)
        wait(lambda: bool(running.now("model_quality")), "the outcomes are judged", 60)
        yield running
    assert set(sender.statuses) == {200, 422}


def replay(folder: Path, *arguments: str) -> None:
    """Run `python -m ops replay` to its end."""
    done = subprocess.run(
        [sys.executable, "-m", "ops", "replay", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    (folder / "replay.log").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def judging(folder: Path, store: Path, port: int, artifacts: Path) -> Generator[None]:
    """Run `python -m ops quality --serve`."""
    command = [sys.executable, "-m", "ops", "quality", "--store", str(store), "--serve", str(port), "--every", "2"]
    command += ["--artifacts", str(artifacts)]
    with (folder / "quality.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        yield
        assert process.poll() is None, (folder / "quality.log").read_text()
    finally:
        process.terminate()
        process.wait(20)
