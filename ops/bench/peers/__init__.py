"""The other ways of serving the same model, so that each can be installed, started, asked and stopped.

Each has a folder here with its requirements, their lock and what its server needs, and runs in an environment
of its own. Nothing of the project is installed there. README.md says how each is set up, and why.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

# One flight as a client of the service sends it, such as a request in golden.json.
Flight = dict[str, Any]
# What starts a server: the arguments, what is added to the environment, and the folder to start it in.
Start = tuple[list[str], dict[str, str], Path]


def nothing(python: Path, artifact: Path, work: Path) -> None:
    """Most peers need no preparation."""


@dataclass(frozen=True)
class Peer:
    """One way of serving the model.

    In every call `python` is the interpreter of the peer's own environment, `artifact` the folder of a version
    (with model.joblib), and `work` a folder of this peer's own, empty at first. All three are absolute paths.
    """

    name: str  # of its folder; after a hyphen, of a variant
    title: str  # as a report shows it
    one: str  # path of the route for one flight
    many: str | None  # path of the route for several flights
    single: Callable[[Flight], bytes]  # the body for one flight
    batch: Callable[[Sequence[Flight]], bytes]  # the body for several flights
    probabilities: Callable[[bytes], list[float]]  # in an answer of either route, in order, not rounded
    command: Callable[[Path, Path, Path, int], Start]  # from python, artifact, work and the port to listen on
    prepare: Callable[[Path, Path, Path], None] = (
        nothing  # with python, artifact and work; once, before the first start
    )

    @property
    def lock(self) -> Path:
        """The versions and hashes to install."""
        return HERE / self.name.split("-")[0] / "requirements.lock"


def encode(value: object) -> bytes:
    """Return JSON without spaces. NaN is refused: it is no JSON."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def tool(python: Path, name: str) -> str:
    """Return the path of a command that was installed next to this interpreter."""
    return str(python.parent / name)


# The two with FastAPI take the same requests as the service and give answers of the same form.


def flight_batch(flights: Sequence[Flight]) -> bytes:
    """Return the body of the service's batch route."""
    return encode({"flights": list(flights)})


def flight_probabilities(answer: bytes) -> list[float]:
    """Read an answer in the service's own form."""
    content = json.loads(answer)
    return [float(one["probability"]) for one in content.get("predictions", [content])]


def start_uvicorn(folder: str, python: Path, artifact: Path, port: int) -> Start:
    """Serve app.py in one of the folders here."""
    server = [str(python), "-m", "uvicorn", "app:app", "--host", "127.0.0.1", "--port", str(port), "--no-access-log"]
    return server, {"MODEL_FOLDER": str(artifact)}, HERE / folder


ECHO = Peer(
    name="echo",
    title="FastAPI without a model",
    one="/v1/predict",
    many=None,
    single=encode,
    batch=flight_batch,
    probabilities=lambda _: [],
    command=lambda python, artifact, _, port: start_uvicorn("echo", python, artifact, port),
)

TUTORIAL = Peer(
    name="tutorial",
    title="FastAPI, pandas and joblib",
    one="/v1/predict",
    many="/v1/predict/batch",
    single=encode,
    batch=flight_batch,
    probabilities=flight_probabilities,
    command=lambda python, artifact, _, port: start_uvicorn("tutorial", python, artifact, port),
)


# The other three take the model's own features, so the client derives the time of day and the day of the week.


def features(flight: Flight) -> dict[str, Any]:
    """Return what the model sees of one flight, in the model's order; None is missing."""
    from mlops_course.blueprint import FEATURES, derive

    minute_of_day, day_of_week = derive(datetime.fromisoformat(flight["scheduled_departure"]))
    known = {**flight, "minute_of_day": minute_of_day, "day_of_week": day_of_week}
    return {name: known.get(name) for name in FEATURES}


def tensors(flights: Sequence[Flight]) -> bytes:
    """Return a request of the Open Inference Protocol (V2): one input for each column."""
    from mlops_course.blueprint import CATEGORICAL, FEATURES

    rows = [features(flight) for flight in flights]
    inputs = [
        {
            "name": name,
            "shape": [len(rows), 1],
            "datatype": "BYTES" if name in CATEGORICAL else "FP32",
            "data": [row[name] for row in rows],
        }
        for name in FEATURES
    ]
    return encode({"inputs": inputs})


def tensor_probabilities(answer: bytes) -> list[float]:
    """Read the second of the two columns of predict_proba; the values come row after row."""
    return [float(value) for value in json.loads(answer)["outputs"][0]["data"][1::2]]


def prepare_mlserver(python: Path, artifact: Path, work: Path) -> None:  # noqa: ARG001 - all have one signature
    """Lay out the folder that MLServer serves: its settings, and the model with its own."""
    model = work / "flight-disruption"
    model.mkdir()
    shutil.copy(HERE / "mlserver" / "settings.json", work)
    shutil.copy(HERE / "mlserver" / "model-settings.json", model)
    shutil.copy(artifact / "model.joblib", model)


def prepare_mlserver_plain(python: Path, artifact: Path, work: Path) -> None:
    """Do the same, but let each request be answered by itself, which is MLServer's default."""
    prepare_mlserver(python, artifact, work)
    file = work / "flight-disruption" / "model-settings.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in settings.items() if not name.startswith("max_batch")}))


def start_mlserver(python: Path, artifact: Path, work: Path, port: int) -> Start:  # noqa: ARG001 - all have one signature
    """Serve that folder. Only the port is not in its settings."""
    return [tool(python, "mlserver"), "start", "."], {"MLSERVER_HTTP_PORT": str(port)}, work


MLSERVER = Peer(
    name="mlserver",
    title="MLServer, joining requests",
    one="/v2/models/flight-disruption/infer",
    many="/v2/models/flight-disruption/infer",
    single=lambda flight: tensors([flight]),
    batch=tensors,
    probabilities=tensor_probabilities,
    command=start_mlserver,
    prepare=prepare_mlserver,
)


def rows(flights: Sequence[Flight]) -> bytes:
    """Return the argument `rows` of both routes of bentoml/service.py."""
    return encode({"rows": [features(flight) for flight in flights]})


MLSERVER_PLAIN = replace(MLSERVER, name="mlserver-plain", title="MLServer", prepare=prepare_mlserver_plain)


def start_bentoml(python: Path, artifact: Path, work: Path, port: int, join: str = "yes") -> Start:
    """Serve the class in service.py. The port is taken by a process that starts the one that serves."""
    server = [tool(python, "bentoml"), "serve", "service:FlightDisruption", "--host", "127.0.0.1", "--port", str(port)]
    extra = {"MODEL_FOLDER": str(artifact), "BENTOML_HOME": str(work), "BENTOML_DO_NOT_TRACK": "True"}
    extra["JOIN_REQUESTS"] = join
    return server, extra, HERE / "bentoml"


BENTOML = Peer(
    name="bentoml",
    title="BentoML, joining requests",
    one="/predict",
    many="/predict_batch",
    single=lambda flight: rows([flight]),
    batch=rows,
    probabilities=lambda answer: [float(value) for value in json.loads(answer)],
    command=start_bentoml,
)


BENTOML_PLAIN = replace(
    BENTOML,
    name="bentoml-plain",
    title="BentoML",
    command=lambda python, artifact, work, port: start_bentoml(python, artifact, work, port, join="no"),
)


def frame(flights: Sequence[Flight]) -> bytes:
    """Return a data frame in the form that MLflow recommends: the names once, then the rows."""
    table = [features(flight) for flight in flights]
    return encode({"dataframe_split": {"columns": list(table[0]), "data": [list(row.values()) for row in table]}})


def frame_probabilities(answer: bytes) -> list[float]:
    """Read the second of the two columns of predict_proba."""
    return [float(row[1]) for row in json.loads(answer)["predictions"]]


def prepare_mlflow(python: Path, artifact: Path, work: Path) -> None:
    """Write the joblib file as an MLflow model. Raises `RuntimeError` with what MLflow said."""
    command = [str(python), str(HERE / "mlflow" / "prepare.py"), str(artifact / "model.joblib"), str(work / "model")]
    quiet = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    done = subprocess.run(command, cwd=work, env=quiet, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"mlflow/prepare.py ended with code {done.returncode}:\n{done.stderr}")


def start_mlflow(python: Path, artifact: Path, work: Path, port: int) -> Start:  # noqa: ARG001 - all have one signature
    """Serve that model. MLflow starts uvicorn, which has to be on the PATH and takes settings from the environment."""
    server = [tool(python, "mlflow"), "models", "serve", "--model-uri", str(work / "model"), "--env-manager", "local"]
    extra = {
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "UVICORN_ACCESS_LOG": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    return [*server, "--workers", "1", "--host", "127.0.0.1", "--port", str(port)], extra, work


MLFLOW = Peer(
    name="mlflow",
    title="MLflow",
    one="/invocations",
    many="/invocations",
    single=lambda flight: frame([flight]),
    batch=frame,
    probabilities=frame_probabilities,
    command=start_mlflow,
    prepare=prepare_mlflow,
)

_ALL = (ECHO, TUTORIAL, MLSERVER_PLAIN, MLSERVER, BENTOML_PLAIN, BENTOML, MLFLOW)
PEERS: dict[str, Peer] = {peer.name: peer for peer in _ALL}
