"""Break the running service in one way at a time, and see whether the right alert fires, and no wrong one.

Everything is real: the service, Envoy in front of it, Prometheus with the committed rules, flights from the training
months. Only the clock of the rules is faster (`ops.alert_rules.shorten`). Faults come from outside: signals to the
process, requests, the environment it starts with. Nothing in the product knows of a drill.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ops import ROOT, artifacts_option
from ops.alert_rules import configure

if TYPE_CHECKING:
    import httpx

FACTOR = 240.0  # an hour of the rules is 15 seconds here
CALM_S = 20.0  # of ordinary traffic before each fault; nothing may fire
AFTER_S = 5.0  # after the expected alerts, in which no wrong one may come
LIMIT_S = 120.0  # for the expected alerts to fire
RATE = 40.0  # requests a second
WORKERS = 64  # requests in flight at the most

Request = dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """One way to break it, what has to fire, and what may: symptoms that are true as well."""

    name: str
    how: str
    expected: frozenset[str]
    allowed: frozenset[str]
    inject: Callable[[Lab, threading.Event], None]
    environment: dict[str, str] = field(default_factory=dict)  # of the service, from its start


@dataclass
class Lab:
    """A running service behind a running Envoy, watched by a running Prometheus, with traffic."""

    door: str  # address
    prometheus: str  # address
    service: subprocess.Popen[bytes]
    flights: list[Request]
    client: httpx.Client  # made once: what a client needs to know of certificates takes long to read
    change: Callable[[Request], Request] = lambda flight: flight  # what is done to each flight before it is sent

    def firing(self) -> set[str]:
        """Return the names of the alerts that fire now."""
        answer = self.client.get(f"{self.prometheus}/api/v1/alerts").json()
        return {one["labels"]["alertname"] for one in answer["data"]["alerts"] if one["state"] == "firing"}

    def up(self) -> int:
        """Return how many targets Prometheus could ask the last time."""
        answer = self.client.get(f"{self.prometheus}/api/v1/query", params={"query": "count(up == 1)"}).json()
        return int(answer["data"]["result"][0]["value"][1]) if answer["data"]["result"] else 0

    def post(self, path: str, body: Any) -> None:
        """Send one request. What comes back is for Prometheus to judge."""
        import httpx

        with suppress(httpx.TransportError):
            self.client.post(self.door + path, json=body)

    def traffic(self, stop: threading.Event) -> None:
        """Send flights at a steady rate, whether answers come or not, as a crowd of clients does.

        What is due while all are waiting is left out: a crowd that gave up does not come back at once.
        """
        busy = threading.Semaphore(WORKERS)

        def send(flight: Request) -> None:
            self.post("/v1/predict", flight)
            busy.release()

        started, number = time.monotonic(), 0
        with ThreadPoolExecutor(WORKERS) as crowd:
            while not stop.is_set():
                if busy.acquire(blocking=False):
                    crowd.submit(send, self.change(self.flights[number % len(self.flights)]))
                number += 1
                time.sleep(max(0.0, started + number / RATE - time.monotonic()))


def stall(lab: Lab, stop: threading.Event) -> None:
    """Let the process run for a tenth of a second, and hold it for six."""
    try:
        while not stop.is_set():
            lab.service.send_signal(signal.SIGSTOP)
            time.sleep(0.6)
            lab.service.send_signal(signal.SIGCONT)
            time.sleep(0.1)
    finally:
        lab.service.send_signal(signal.SIGCONT)


def hang(lab: Lab, stop: threading.Event) -> None:
    """Hold the process for good: it lives, its port is open, and it answers nothing."""
    lab.service.send_signal(signal.SIGSTOP)
    stop.wait()
    lab.service.send_signal(signal.SIGCONT)


def kill(lab: Lab, stop: threading.Event) -> None:
    """End the process, as the kernel does when memory runs out, and let nobody start it again."""
    lab.service.kill()
    stop.wait()


def overload(lab: Lab, stop: threading.Event) -> None:
    """Send more large batches at once than may wait."""

    def batches() -> None:
        while not stop.is_set():
            lab.post("/v1/predict/batch", {"flights": lab.flights[:1000]})
            stop.wait(0.05)

    senders = [threading.Thread(target=batches) for _ in range(12)]
    for one in senders:
        one.start()
    for one in senders:
        one.join()


def spoil(lab: Lab, stop: threading.Event) -> None:
    """Let a caller forget one field in every other request."""
    turn = iter(range(sys.maxsize))
    lab.change = lambda flight: (
        {name: value for name, value in flight.items() if name != "carrier"} if next(turn) % 2 else flight
    )
    stop.wait()


def shift(lab: Lab, stop: threading.Event) -> None:
    """Let a pipeline send one carrier for all, one distance, and a code for airports that training never saw."""
    lab.change = lambda flight: {**flight, "carrier": "UA", "distance_miles": 1400.0, "dest": "XXX"}
    stop.wait()


def wait(_: Lab, stop: threading.Event) -> None:
    """Do nothing: the fault is there from the start."""
    stop.wait()


BUDGET = frozenset({"AvailabilityBudgetBurnsFast", "AvailabilityBudgetBurnsSlowly", "ErrorRatioHigh"})
SLOW = frozenset({"LatencyBudgetBurnsFast", "LatencyBudgetBurnsSlowly", "LatencyP95High", "EventLoopSaturated"})
DEAD = frozenset({"TargetDown", "RequestTimeouts", "MetricsStale"})

FAULTS = (
    Fault(
        "latency",
        "SIGSTOP for 0.6 s, SIGCONT for 0.1 s, again and again",
        frozenset({"LatencyBudgetBurnsFast", "EventLoopSaturated"}),
        SLOW | {"TargetDown", "QueueNearLimit"},
        stall,
    ),
    Fault(
        "overload",
        "12 clients with batches of 1,000 flights where 2 may wait",
        frozenset({"AvailabilityBudgetBurnsFast", "RequestsShed"}),
        BUDGET | SLOW | {"QueueNearLimit"},
        overload,
        {"MAX_BATCHES_WAITING": "2"},
    ),
    Fault(
        "bad payloads",
        "every other request lacks `carrier`",
        frozenset({"ValidationFailuresSurge"}),
        frozenset(),
        spoil,
    ),
    Fault(
        "drifted inputs",
        "one carrier, one distance, and an unknown airport in all flights",
        frozenset({"DriftCritical", "UnknownCategoriesSurge"}),
        frozenset({"DriftWarning"}),
        shift,
    ),
    Fault("kill", "SIGKILL, and nobody starts it again", frozenset({"ServiceDown"}), BUDGET | SLOW | DEAD, kill),
    Fault("hang", "SIGSTOP for good", frozenset({"ServiceDown", "RequestTimeouts"}), BUDGET | SLOW | DEAD, hang),
    Fault(
        "refused model",
        "the registry's digest is another one than the artifact's",
        frozenset({"ModelNotReady", "ModelLoadFailed"}),
        BUDGET,
        wait,
        {"MODEL_DIGEST": "sha256:" + "0" * 64},
    ),
)


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(command: list[str], log: Path, **environment: str) -> Generator[subprocess.Popen[bytes]]:
    """Run a program, and end it afterwards, whatever state it is in."""
    keep = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=keep | environment, cwd=ROOT, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def answers(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 60) -> None:
    """Wait until an address answers anything at all. Raises `ClickException` with the program's last words."""
    import httpx

    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        try:
            httpx.get(url, timeout=1)
        except httpx.TransportError:
            time.sleep(0.1)
        else:
            return
    raise click.ClickException(f"nothing answers at {url}:\n{log.read_text(errors='replace')[-2000:]}")


@contextmanager
def laboratory(
    folder: Path,  # for configuration, logs and the samples of Prometheus
    artifact: Path,  # of the model
    flights: list[Request],
    factor: float,
    environment: dict[str, str],  # of the service
) -> Iterator[Lab]:
    """Start service, Envoy and Prometheus, and stop them in the end."""
    import httpx

    from ops import door

    ports = {name: free_port() for name in ("service", "door", "admin", "prometheus")}
    at = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    targets: dict[str, str | None] = {
        "service": f"127.0.0.1:{ports['service']}",
        "envoy": f"127.0.0.1:{ports['admin']}",
        "prometheus": f"127.0.0.1:{ports['prometheus']}",
    }
    config = configure(folder / "prometheus", factor, targets)
    envoy = door.arguments(door.configure(folder / "door", ports["door"], ports["service"], ports["admin"]))
    asked = {"APP_ENV": "dev", "MODEL_URI": str(artifact), "PORT": str(ports["service"]), "DRAIN_S": "0"}
    watcher = [str(shutil.which("prometheus")), f"--config.file={config}", f"--storage.tsdb.path={folder / 'samples'}"]
    watcher += [f"--web.listen-address=127.0.0.1:{ports['prometheus']}", "--log.level=warn"]
    with ExitStack() as stack:
        started = {}
        for name, command, variables, page in (
            ("service", [sys.executable, "-m", "service"], asked | environment, "/health"),
            ("door", envoy, {}, "/health"),
            ("prometheus", watcher, {}, "/-/ready"),
        ):
            log = folder / f"{name}.log"
            started[name] = stack.enter_context(running(command, log, **variables))
            answers(at[name] + page, started[name], log)
        limits = httpx.Limits(max_connections=2 * WORKERS)
        client = stack.enter_context(httpx.Client(timeout=20, limits=limits, trust_env=False))
        lab = Lab(at["door"], at["prometheus"], started["service"], flights, client)
        # Prometheus takes some seconds to find its targets, and until then it is right that nothing answers.
        end = time.monotonic() + 60
        while lab.up() != len(targets) or lab.firing() & {"ServiceDown", "DoorDown"}:
            if time.monotonic() > end:
                raise click.ClickException(f"Prometheus does not find its targets: {lab.up()} of {len(targets)}")
            time.sleep(0.5)
        yield lab


def watch(
    lab: Lab,
    seen: dict[str, float],  # alert -> seconds after `since` at which it was first seen firing; added to
    since: float,
    until: Callable[[], bool],
) -> None:
    """Ask Prometheus what fires, twice a second, until something holds."""
    while not until():
        for name in lab.firing() - seen.keys():
            seen[name] = round(time.monotonic() - since, 1)
        time.sleep(0.5)


def drill(fault: Fault, artifact: Path, flights: list[Request], factor: float = FACTOR) -> dict[str, Any]:
    """Break it in one way, and return what fired, when, and whether that is right."""
    stop_traffic, stop_fault = threading.Event(), threading.Event()
    early: dict[str, float] = {}
    seen: dict[str, float] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="alert-drill-")))
        lab = stack.enter_context(laboratory(folder, artifact, flights, factor, fault.environment))
        threads = [threading.Thread(target=lab.traffic, args=(stop_traffic,))]
        threads[0].start()
        try:
            began = time.monotonic()
            if fault.inject is not wait:
                watch(lab, early, began, lambda: time.monotonic() > began + CALM_S)
            threads.append(threading.Thread(target=fault.inject, args=(lab, stop_fault)))
            since = time.monotonic()
            threads[1].start()
            watch(lab, seen, since, lambda: fault.expected <= seen.keys() or time.monotonic() > since + LIMIT_S)
            enough = time.monotonic() + AFTER_S
            watch(lab, seen, since, lambda: time.monotonic() > enough)
        finally:
            stop_fault.set()
            stop_traffic.set()
            for one in threads:
                one.join()
    wrong = sorted(set(early) | seen.keys() - fault.expected - fault.allowed)
    missed = sorted(fault.expected - seen.keys())
    return {
        "fault": fault.name,
        "how": fault.how,
        "expected_s": {name: seen.get(name) for name in sorted(fault.expected)},
        "also_s": {name: seen[name] for name in sorted(seen.keys() - fault.expected)},
        "wrong": wrong,
        "missed": missed,
        "passed": not wrong and not missed,
    }


def ordinary_flights(number: int = 4000) -> list[Request]:
    """Return flights of the training months as requests, in random order: what the model expects."""
    from mlops_course.blueprint import data_folder, load_dataset, split_by_time
    from mlops_course.training import as_request

    train = split_by_time(load_dataset(data_folder()))["train"]
    rows = train.sample(number, random_state=0).to_dict("records")
    return [as_request(row) for row in rows]


def describe(result: dict[str, Any]) -> str:
    """Return one line for people."""
    times = ", ".join(f"{name} after {at} s" for name, at in result["expected_s"].items() if at is not None)
    parts = [f"{result['fault']:14}  {'ok' if result['passed'] else 'FAILED'}", times]
    parts += [f"did not fire: {', '.join(result['missed'])}"] * bool(result["missed"])
    parts += [f"fired and should not: {', '.join(result['wrong'])}"] * bool(result["wrong"])
    parts += [f"also, as it may: {', '.join(result['also_s'])}"] * bool(result["also_s"] and not result["wrong"])
    return "; ".join(part for part in parts if part)


@click.command("alert-drill", short_help="Break the service in one way at a time and check which alerts fire.")
@click.option("--fault", "names", multiple=True, type=click.Choice([one.name for one in FAULTS]), help="Default: all.")
@click.option("--factor", default=FACTOR, show_default=True, help="By how much the clock of the rules is faster.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=ROOT / "build" / "alert-drill.json",
    help="Where the result goes. Default: build/alert-drill.json.",
)
@artifacts_option
def alert_drill(names: tuple[str, ...], factor: float, output: Path, artifacts: Path) -> None:
    """Run the real service, Envoy and Prometheus with short windows, and break the service.

    Each fault gets a fresh set of them: first ordinary traffic, in which nothing may fire, then the fault, until the
    alerts that it must raise fire. Needs `prometheus` on the PATH (`make tools`), no Docker, and about five minutes.
    """
    from mlops_course.blueprint import MODEL_NAME, resolve_channel

    if shutil.which("prometheus") is None:
        raise click.ClickException(
            "there is no `prometheus` on the PATH; `make tools` installs it on Debian and Ubuntu"
        )
    artifact, _ = resolve_channel(artifacts.resolve() / MODEL_NAME, "prod")
    flights = ordinary_flights()
    chosen = [one for one in FAULTS if not names or one.name in names]
    results = []
    for place, fault in enumerate(chosen, 1):
        click.echo(f"{place}/{len(chosen)}  {fault.name}: {fault.how}")
        results.append(drill(fault, artifact, flights, factor))
        click.echo(f"     {describe(results[-1])}")
    report = {"factor": factor, "requests_per_second": RATE, "calm_s": CALM_S, "faults": results}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    click.echo(f"wrote {output}")
    if failed := [one["fault"] for one in results if not one["passed"]]:
        raise click.ClickException(f"not as expected: {', '.join(failed)}")
