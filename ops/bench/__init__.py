"""Compare the service with other ways of serving the same model: `python -m ops bench`."""

from __future__ import annotations

import json
import os
import platform
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ops import ROOT, artifacts_option

if TYPE_CHECKING:
    from ops.bench.peers import Flight, Peer

HERE = Path(__file__).resolve().parent
VERSION = "1.1.0"  # the model that is served: the newest of this version
BATCH = 1_000
FLIGHTS = 200  # different requests, sent in turn
# Connections: one client that waits for each answer; many clients; and for batches, so that one always waits.
CONNECTIONS = (1, 16)
BATCH_CONNECTIONS = 2
# More clients than may wait, each of which asks again at once.
CROWD = 1_000
WARM_UP_S = 1
# Largest difference to training's probability: the service rounds to 4 decimals.
TOLERANCE = 6e-5


@click.command(short_help="Compare the service's speed and size with other servers of the same model.")
@artifacts_option
@click.option("--rounds", default=5, show_default=True, help="How often each server is started and measured.")
@click.option("--seconds", default=4, show_default=True, help="How long each load lasts.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=ROOT / "build" / "bench",
    help="Where environments and the result go. Default: build/bench.",
)
@click.option("--only", multiple=True, help="Only this server; may be repeated. Default: all.")
def bench(artifacts: Path, rounds: int, seconds: int, folder: Path, only: tuple[str, ...]) -> None:
    """Install each server in an environment of its own, prove that all give the same answers, then measure.

    In each round every server is started afresh, so all meet the same minutes of the machine. It gets one core, the
    load generator (wrk) another. The result is benchmarks.json; `python -m ops publish` shows it in docs/.
    """
    from ops.bench.servers import contenders

    if shutil.which("wrk") is None:
        raise click.ClickException("wrk is not installed: apt-get install wrk, or brew install wrk")
    key = secrets.token_hex(16)
    peers = contenders(key)
    if unknown := sorted(set(only) - peers.keys()):
        raise click.BadParameter(f"{unknown[0]} is not one of {', '.join(peers)}", param_hint="--only")
    chosen = {name: peer for name, peer in peers.items() if name in only or not only}
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    artifact, golden = served_artifact(artifacts)
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        bench = Bench(Path(scratch), artifact, golden, key, seconds)
        try:
            result = bench.run(chosen, folder / "envs", rounds)
        except (RuntimeError, subprocess.CalledProcessError) as error:
            raise click.ClickException(str(error)) from error
    target = folder / "benchmarks.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    click.echo(summary(result))
    click.echo(f"wrote {target}" + ("" if only else "; `python -m ops publish` brings it into docs/benchmarks.md"))


def served_artifact(artifacts: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Return the folder and golden cases of the newest artifact of `VERSION`, such as 1.1.0-rc.1."""
    from mlops_course.blueprint import MODEL_NAME, parse_version, read_registry

    shelf = artifacts.resolve() / MODEL_NAME
    found = [version for version in read_registry(shelf).versions if version.split("-")[0] == VERSION]
    if not found:
        raise click.ClickException(f"no version {VERSION} in {shelf}; run `make train` first")
    artifact = shelf / max(found, key=parse_version)
    return artifact, json.loads((artifact / "golden.json").read_text())["cases"]


def progress(items: Sequence[Any], text: str) -> Iterator[Any]:
    """Show a bar while going through the items."""
    from rich.progress import track

    yield from track(items, description=text)


class Bench:
    """One run: what is served, and what is sent."""

    def __init__(self, scratch: Path, artifact: Path, golden: list[dict[str, Any]], key: str, seconds: int) -> None:
        """Take one core for the servers and another for the load, where the system can do that."""
        self.scratch, self.artifact, self.golden, self.key, self.seconds = scratch, artifact, golden, key, seconds
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self.load_core: int | None
        self.server_core: int | None
        self.load_core, self.server_core = (cores[0], cores[-1]) if len(cores) > 1 else (None, None)

    def flights(self, count: int) -> list[Flight]:
        """Return golden requests, in turn, until there are enough."""
        return [self.golden[number % len(self.golden)]["request"] for number in range(count)]

    def run(self, peers: dict[str, Peer], envs: Path, rounds: int) -> dict[str, Any]:
        """Install, check and measure."""
        from ops.bench.servers import install, installed_bytes

        folders = {name: envs / peer.lock.parent.name for name, peer in peers.items()}  # variants share one
        pythons = {name: install(peers[name], folders[name]) for name in progress([*peers], "installing")}
        sizes = {name: installed_bytes(python) for name, python in pythons.items()}
        for name in progress([*peers], "preparing and checking"):
            self.prepare(peers[name], pythons[name])
        rows: list[dict[str, Any]] = []
        for number in progress(range(rounds * len(peers)), "measuring"):
            turn, place = divmod(number, len(peers))
            name = [*peers][(place + turn) % len(peers)]  # nobody is always the first
            rows.append({"round": turn, "server": name, **self.measure(peers[name], pythons[name])})
        return {
            "machine": machine(),
            "model": self.artifact.name,
            "seconds": self.seconds,
            "servers": {
                n: {"title": p.title, "versions": versions(p), "installed_bytes": sizes[n]} for n, p in peers.items()
            },
            "rounds": rows,
            "anatomy": self.anatomy(peers["service"], pythons["service"]) if "service" in peers else None,
        }

    def prepare(self, peer: Peer, python: Path) -> None:
        """Write what will be sent, and prove that the server answers what training computed."""
        from ops.bench.servers import largest_difference, running

        work = self.scratch / peer.name
        work.mkdir()
        peer.prepare(python, self.artifact, work)
        bodies = {"one": [peer.single(flight) for flight in self.flights(FLIGHTS)]}
        if peer.many:
            bodies["many"] = [peer.batch(self.flights(BATCH))]
        for kind, lines in bodies.items():
            (self.scratch / f"{peer.name}.{kind}").write_bytes(b"\n".join(lines) + b"\n")
        with running(peer, python, self.artifact, work, self.server_core, self.key) as server:
            server.wait(peer.one, bodies["one"][0])
            if not peer.many:
                return
            expected = [case["probability"] for case in self.golden]
            alone = [
                p
                for case in self.golden
                for p in peer.probabilities(server.ask(peer.one, peer.single(case["request"])) or b"")
            ]
            together = peer.probabilities(
                server.ask(peer.many, peer.batch([case["request"] for case in self.golden])) or b""
            )
            for kind, answers in (("alone", alone), ("in a batch", together)):
                if (difference := largest_difference(answers, expected)) > TOLERANCE:
                    raise RuntimeError(
                        f"{peer.title}, flights {kind}: {difference:.6f} away from training's probabilities"
                    )

    def measure(self, peer: Peer, python: Path) -> dict[str, Any]:
        """Start a server, put the loads on it one after the other, and look at its memory."""
        import time

        from ops.bench.servers import launch, running

        first = (self.scratch / f"{peer.name}.one").read_bytes().splitlines()[0]
        work = self.scratch / peer.name
        started = time.perf_counter()
        with running(peer, python, self.artifact, work, self.server_core, self.key) as server:
            server.wait(peer.one, first)
            found: dict[str, Any] = {"start_s": round(time.perf_counter() - started, 3)}
            for connections in CONNECTIONS:
                found[f"one_{connections}"] = self.load(server.port, peer.one, f"{peer.name}.one", connections)
            if peer.many:
                found["many"] = self.load(server.port, peer.many, f"{peer.name}.many", BATCH_CONNECTIONS)
            found["memory_bytes"] = server.memory_bytes()
            if peer.name == "service":
                found["crowd"] = self.load(server.port, peer.one, f"{peer.name}.one", CROWD, refusals=True)
                server.process.kill()
                server.process.wait()
                killed = time.perf_counter()
                command = peer.command(python, self.artifact, work, server.port)
                again = launch(command, server.port, server.log, self.server_core, self.key)
                server.process = again.process
                server.wait(peer.one, first)
                found["restart_s"] = round(time.perf_counter() - killed, 3)
        return found

    def load(self, port: int, path: str, bodies: str, connections: int, refusals: bool = False) -> dict[str, Any]:
        """Let wrk ask again and again. Raises `RuntimeError` if an answer is broken, or refused where none may be."""
        from ops.bench.servers import pin

        for seconds in (WARM_UP_S, self.seconds):
            command = ["wrk", "--threads", "1", "--connections", str(connections), "--duration", f"{seconds}s"]
            command += ["--timeout", "30s", "--script", str(HERE / "requests.lua"), f"http://127.0.0.1:{port}{path}"]
            command += ["--", str(self.scratch / bodies), self.key]
            done = subprocess.run(command, capture_output=True, text=True, check=True, preexec_fn=pin(self.load_core))
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        if found["broken"] or (found["refused"] and not refusals):
            raise RuntimeError(f"{bodies}, {connections} connections: some requests were not answered: {found}")
        return {**found, "per_s": round(found["requests"] / found["seconds"], 1)}

    def anatomy(self, peer: Peer, python: Path) -> dict[str, float]:
        """Measure where the time of one request goes inside the service."""
        from ops.bench.servers import QUIET, pin

        _, extra, _ = peer.command(python, self.artifact, self.scratch / peer.name, 1)
        command = [python, HERE / "anatomy.py", self.scratch / f"{peer.name}.one"]
        done = subprocess.run(
            command,
            env={**QUIET, **extra},
            capture_output=True,
            text=True,
            check=True,
            preexec_fn=pin(self.server_core),
        )
        found: dict[str, float] = json.loads(done.stdout)
        return found


def machine() -> dict[str, Any]:
    """Describe where the run took place. Names no host and no person."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next(
            (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu
        )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "pinned": hasattr(os, "sched_getaffinity"),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
    }


# The versions that a report names, of all that are locked.
NAMED = ("fastapi", "uvicorn", "onnxruntime", "mlserver", "bentoml", "mlflow", "scikit-learn", "pandas", "pydantic")


def versions(peer: Peer) -> dict[str, str]:
    """Return the versions of the libraries that matter, from the server's lock."""
    pinned = (
        line.split(" ")[0].split(";")[0].split("==") for line in peer.lock.read_text().splitlines() if "==" in line
    )
    return {name: version for name, version in pinned if name in NAMED}


def summary(result: dict[str, Any]) -> str:
    """Return the result in a few lines."""
    from ops.bench.report import goal_lines, speed_table

    return speed_table(result) + "\n\n" + goal_lines(result)
