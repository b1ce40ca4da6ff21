"""Install, start, watch and stop the servers that are compared, each in its own environment and on one core."""

from __future__ import annotations

import functools
import hashlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ops import ROOT
from ops.bench.peers import PEERS, Peer, Start, encode, flight_batch, flight_probabilities

# One thread for numerical libraries: a server gets one core. No telemetry waits for a network.
QUIET = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "NO_COLOR": "1"}
START_LIMIT_S = 180.0
STOP_LIMIT_S = 20.0
# How often a server that starts is asked; the measured start is exact to this.
POLL_S = 0.01


@dataclass(frozen=True)
class Own(Peer):
    """A server of this project: installed from the service's lock, with the code that stands here."""

    @property
    def lock(self) -> Path:
        """The lock of the service."""
        return ROOT / "service" / "requirements.lock"


SERVICE = ("-m", "service")
UNWATCHED = (str(Path(__file__).parent / "unwatched.py"),)


def start_service(program: Sequence[str], key: str, python: Path, artifact: Path, port: int) -> Start:
    """Serve as in production: verified artifact, key, request ids; `SERVICE` with metrics and a log line a request."""
    from mlops_course.blueprint import artifact_digest, read_manifest

    settings = {
        "APP_ENV": "prod",
        "API_KEY": key,
        "GIT_SHA": "benchmark",
        "MODEL_URI": str(artifact),
        "MODEL_DIGEST": artifact_digest(read_manifest(artifact)),
        "PORT": str(port),
        "DRAIN_S": "0",
        "PYTHONPATH": str(ROOT),
    }
    return [str(python), *program], settings, ROOT


def start_constant(python: Path, port: int) -> Start:
    """Serve constant bytes with the same uvicorn."""
    server = [str(python), "-m", "uvicorn", "constant:app", "--host", "127.0.0.1", "--port", str(port)]
    return [*server, "--no-access-log", "--log-level", "error"], {}, Path(__file__).parent


def contenders(key: str) -> dict[str, Peer]:
    """Return all servers: ours, the peers, and constant bytes. `key` is the API key of ours."""
    own: Callable[..., Peer] = functools.partial(Own, single=encode, batch=flight_batch)
    ours = functools.partial(own, one="/v1/predict", many="/v1/predict/batch", probabilities=flight_probabilities)
    service = ours(
        name="service",
        title="this service",
        command=lambda python, artifact, _, port: start_service(SERVICE, key, python, artifact, port),
    )
    unwatched = ours(
        name="unwatched",
        title="this service, without metrics and logs",
        command=lambda python, artifact, _, port: start_service(UNWATCHED, key, python, artifact, port),
    )
    constant = own(
        name="constant",
        title="uvicorn, constant bytes",
        one="/",
        many=None,
        probabilities=lambda _: [],
        command=lambda python, _, __, port: start_constant(python, port),
    )
    return {"service": service, "unwatched": unwatched, **PEERS, "constant": constant}


def install(peer: Peer, folder: Path) -> Path:
    """Make the environment of a server, unless it is there already; return its interpreter.

    Bytecode is compiled at once, as in an image: otherwise the first start would be measured with the compiler.
    """
    stamp, python = folder / "installed", folder / "bin" / "python"
    wanted = hashlib.sha256(peer.lock.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    uv = Path(sys.executable).parent / "uv"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, folder], check=True)
    sync = ["pip", "sync", "--quiet", "--compile-bytecode", "--require-hashes"]
    subprocess.run([uv, *sync, "--python", python, peer.lock], check=True)
    stamp.write_text(wanted)
    return python


def installed_bytes(python: Path) -> int:
    """Return the size of what is installed, without bytecode."""
    packages = next((python.parent.parent / "lib").glob("python*/site-packages"))
    return sum(
        file.stat().st_size for file in packages.rglob("*") if file.is_file() and "__pycache__" not in file.parts
    )


def unused_port() -> int:
    """Return a port that nobody uses now."""
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        port: int = door.getsockname()[1]
        return port


def pin(core: int | None) -> Callable[[], None] | None:
    """Return what a new process calls to stay on one core; None where the system cannot do that."""
    if core is None:
        return None
    return lambda: os.sched_setaffinity(0, {core})


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    headers: dict[str, str]

    def ask(self, path: str, body: bytes) -> bytes | None:
        """Send one request. Returns the answer's body, or None if there is no answer with status 200."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("POST", path, body, self.headers)
            answer = connection.getresponse()
            content = answer.read()
        except OSError:
            return None
        finally:
            connection.close()
        return content if answer.status == 200 else None

    def wait(self, path: str, body: bytes) -> None:
        """Wait for the first answer. Raises `RuntimeError` with the end of the log if there is none."""
        end = time.monotonic() + START_LIMIT_S
        while self.ask(path, body) is None:
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"no answer; the log ends with:\n{self.log.read_text()[-2000:]}")
            time.sleep(POLL_S)

    def memory_bytes(self) -> int | None:
        """Return the proportional set size of the server and its children; None where it cannot be read."""
        import psutil

        first = psutil.Process(self.process.pid)
        values = [getattr(one.memory_full_info(), "pss", None) for one in (first, *first.children(recursive=True))]
        return None if None in values else sum(value or 0 for value in values)

    def stop(self) -> None:
        """Stop the server and its children."""
        import psutil

        try:
            first = psutil.Process(self.process.pid)
            family = [*first.children(recursive=True), first]
        except psutil.NoSuchProcess:
            family = []
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        _, left = psutil.wait_procs(family, timeout=STOP_LIMIT_S)
        for one in left:
            one.kill()
        self.process.wait(STOP_LIMIT_S)


def launch(start: Start, port: int, log: Path, core: int | None, key: str) -> Server:
    """Start a server; it is not ready yet."""
    command, extra, folder = start
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, cwd=folder, env={**kept, **QUIET, **extra}, stdout=output, stderr=output, preexec_fn=pin(core)
        )
    return Server(process, port, log, {"content-type": "application/json", "x-api-key": key})


@contextmanager
def running(peer: Peer, python: Path, artifact: Path, work: Path, core: int | None, key: str) -> Iterator[Server]:
    """Start a server and stop it in the end, whatever happens."""
    port = unused_port()
    server = launch(peer.command(python, artifact, work, port), port, work.with_suffix(".log"), core, key)
    try:
        yield server
    finally:
        server.stop()


def largest_difference(answers: Sequence[float], expected: Sequence[float]) -> float:
    """Return how far the answers are from training's probabilities. Raises `RuntimeError` if some are missing."""
    if len(answers) != len(expected):
        raise RuntimeError(f"{len(answers)} probabilities for {len(expected)} flights")
    return max(abs(a - b) for a, b in zip(answers, expected, strict=True))
