"""Faults: damaged artifacts, at the start and at a reload, and processes that are stopped or killed under load."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from mlops_course.blueprint import MANIFEST, ArtifactError, Manifest, artifact_digest, canonical_json, verify_artifact
from mlops_course.serving import NullObserver, Problem, Settings, build_app, load_model, reload

from .conftest import Running, launch

FILES = sorted(
    [
        *("calibration.png", "confusion.png", "errors.csv", "golden.json", MANIFEST, "metrics.json", "model.joblib"),
        *("model.onnx", "model_card.md", "predictions.parquet", "reference.json", "release.json", "scores.png"),
    ]
)
NOBODY = 65_534


class Told(NullObserver):
    """Remembers why models were refused."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def load_failed(self, reason: str) -> None:
        self.reasons.append(reason)


@pytest.fixture
def copied(release: tuple[Path, str], tmp_path: Path) -> Path:
    """Return a copy of the released artifact that may be damaged."""
    return shutil.copytree(release[0], tmp_path / "deep" / release[0].name)


@pytest.fixture
def own(settings: Settings, copied: Path) -> Settings:
    """Return settings for that copy."""
    return settings.model_copy(update={"model_uri": str(copied)})


# What can happen to an artifact. A change returns the digest that is configured afterwards, if it is another one.

Change = Callable[[Path], str | None]


def _flip(folder: Path, name: str) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)


def _cut(folder: Path, name: str, left: float) -> None:
    """Keep only a part of a file."""
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(len(data) * left)])


def _instead(folder: Path, name: str, make: Callable[[Path], Any]) -> None:
    """Replace a file by something else."""
    (folder / name).unlink()
    make(folder / name)


def _add(folder: Path, name: str) -> None:
    """Add a file."""
    (folder / name).write_text("x")


def _lead_to_nothing(folder: Path) -> None:
    """Replace the folder by a symbolic link to nothing."""
    shutil.rmtree(folder)
    folder.symlink_to(folder.parent / "gone")


def _outside(folder: Path, name: str) -> None:
    """Move a file out of the folder and leave a symbolic link to it."""
    shutil.move(folder / name, folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)


def _edited(**changes: Any) -> Change:
    """Edit the manifest; the digest stays what it was."""

    def edit(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        (folder / MANIFEST).write_bytes(canonical_json({**manifest, **changes}))

    return edit


def _registered(**changes: Any) -> Change:
    """Edit the manifest, and configure the digest that it then has: the one who edited it could do that too."""

    def edit(folder: Path) -> str:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        for key, value in changes.items():
            manifest[key] = {**manifest[key], **value} if isinstance(value, dict) else value
        (folder / MANIFEST).write_bytes(canonical_json(manifest))
        return artifact_digest((folder / MANIFEST).read_bytes())

    return edit


def _reordered(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest["features"].reverse()
    (folder / MANIFEST).write_bytes(canonical_json(manifest))


def _another_digest(folder: Path) -> str:
    return "sha256:" + "0" * 64


HASH = "0" * 64
FAULTS: dict[str, tuple[Change, str]] = {
    **{
        f"a flipped bit in {name}": (
            lambda f, name=name: _flip(f, name),  # type: ignore[misc]
            "manifest.json has digest" if name == MANIFEST else f"{name} was changed",
        )
        for name in FILES
    },
    "an edited threshold": (_edited(threshold=0.01), "manifest.json has digest"),
    "another order of features": (_reordered, "manifest.json has digest"),
    "a file missing": (lambda f: (f / "release.json").unlink(), "release.json is missing"),
    "a file too many": (lambda f: _add(f, "extra.txt"), "extra.txt is not listed"),
    "a link too many": (lambda f: (f / "extra").symlink_to("/etc/hosts"), "extra is not listed"),
    "a file that is a link out": (lambda f: _outside(f, "golden.json"), "golden.json is missing or not a plain file"),
    "a manifest that is a link out": (lambda f: _outside(f, MANIFEST), "manifest.json is a symbolic link"),
    "a folder that is a link to nothing": (_lead_to_nothing, "manifest.json: No such file"),
    "another digest": (_another_digest, "or MODEL_DIGEST is wrong"),
    "half a graph": (lambda f: _cut(f, "model.onnx", 0.5), "model.onnx was changed"),
    "an empty graph": (lambda f: _cut(f, "model.onnx", 0), "model.onnx was changed"),
    "half a manifest": (lambda f: _cut(f, MANIFEST, 0.5), "manifest.json has digest"),
    "an empty manifest": (lambda f: _cut(f, MANIFEST, 0), "manifest.json has digest"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "manifest.json: No such file"),
    "no folder": (shutil.rmtree, "manifest.json: No such file"),
    "a pipe for a file": (
        lambda f: _instead(f, "reference.json", os.mkfifo),
        "reference.json is missing or not a plain",
    ),
    "a pipe for the manifest": (
        lambda f: _instead(f, MANIFEST, os.mkfifo),
        "manifest.json is a symbolic link or not a",
    ),
    "a folder for a file": (lambda f: _instead(f, "golden.json", Path.mkdir), "golden.json is missing or not a plain"),
    "a folder for the manifest": (
        lambda f: _instead(f, MANIFEST, Path.mkdir),
        "manifest.json is a symbolic link or not",
    ),
    "a name that leads up": (_registered(files={"../up": HASH}), "which is not a plain file name"),
    "a name from the root": (_registered(files={"/etc/hosts": HASH}), "which is not a plain file name"),
    "a name that is the folder above": (_registered(files={"..": HASH}), ".. is missing or not a plain file"),
    "a name with a null byte": (_registered(files={"a\0b": HASH}), "is missing or not a plain file"),
    "the manifest in its own list": (_registered(files={MANIFEST: HASH}), "manifest.json was changed"),
    "another major version": (_registered(version="2.0.0"), "version 2.0.0 has another input contract"),
    "a version that is none": (_registered(version="../1"), "cannot be read as an artifact"),
    "a field that is unknown": (_registered(surprise=1), "is not a manifest of this course"),
}


def test_the_list_of_files_is_complete(release: tuple[Path, str]) -> None:
    assert sorted(path.name for path in release[0].iterdir()) == FILES


@pytest.mark.parametrize(("change", "said"), FAULTS.values(), ids=FAULTS)
def test_a_damaged_artifact_is_not_served(own: Settings, copied: Path, change: Change, said: str) -> None:
    digest = change(copied) or own.model_digest
    observer = Told()
    app = build_app(own.model_copy(update={"model_digest": digest}), observer)
    with TestClient(app) as client:
        assert client.get("/health").status_code == 200
        ready = client.get("/ready")
        assert (ready.status_code, client.post("/v1/predict", json={}).status_code) == (503, 503)
        told = Problem.model_validate_json(ready.content).detail
    assert said in told
    assert str(copied.parent) not in ready.text
    assert len(observer.reasons) == 1
    assert len(told) < 1_000


@pytest.mark.parametrize(("change", "said"), FAULTS.values(), ids=FAULTS)
def test_a_damaged_artifact_does_not_replace_the_served_model(
    own: Settings, copied: Path, example: dict[str, Any], change: Change, said: str
) -> None:
    observer = Told()
    app = build_app(own, observer)
    with TestClient(app) as client:
        before = (client.get("/v1/model").json(), client.post("/v1/predict", json=example).json()["probability"])
        digest = change(copied) or own.model_digest
        app.runtime.settings = own.model_copy(update={"model_digest": digest})
        assert not reload(app.runtime)
        after = (client.get("/v1/model").json(), client.post("/v1/predict", json=example).json()["probability"])
        assert client.get("/ready").status_code == 200
    assert after == before
    assert observer.reasons == [app.runtime.reason]
    assert said in app.runtime.reason.replace(f"{copied}/", "")


def test_a_good_artifact_replaces_a_damaged_one(own: Settings, copied: Path, example: dict[str, Any]) -> None:
    good = (copied / "model.onnx").read_bytes()
    _flip(copied, "model.onnx")
    app = build_app(own)
    with TestClient(app) as client:
        assert client.get("/ready").status_code == 503
        (copied / "model.onnx").write_bytes(good)
        assert reload(app.runtime)
        assert (client.get("/ready").status_code, app.runtime.reason) == (200, "")
        assert client.post("/v1/predict", json=example).status_code == 200


@pytest.mark.parametrize("name", ["model.onnx", "golden.json", "reference.json"])
def test_what_is_used_is_what_was_checked(
    own: Settings, copied: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A file is replaced between the check and its use."""

    def check_then_swap(folder: Path, digest: str | None) -> Manifest:
        manifest = verify_artifact(folder, digest)
        _flip(folder, name)
        return manifest

    monkeypatch.setattr("mlops_course.serving.verify_artifact", check_then_swap)
    with pytest.raises(ArtifactError, match=f"{name} is missing or was changed while it was read"):
        load_model(copied, own.model_digest)


def test_a_manifest_swapped_between_two_looks_is_refused(
    release: tuple[Path, str], copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swap_then_check(folder: Path, digest: str | None) -> Manifest:
        _edited(threshold=0.01)(folder)
        return verify_artifact(folder, digest)

    monkeypatch.setattr("mlops_course.serving.verify_artifact", swap_then_check)
    for digest in (release[1], None):
        shutil.copy(release[0] / MANIFEST, copied / MANIFEST)
        with pytest.raises(ArtifactError, match="changed after it was registered"):
            load_model(copied, digest)


def test_files_that_change_all_the_time_are_served_whole_or_not_at_all(own: Settings, copied: Path) -> None:
    """Another thread swaps the threshold and the golden cases, each in one step, while the artifact is loaded."""
    versions = []
    for threshold in (0.34, 0.01):
        folder = shutil.copytree(copied, copied.parent / f"t{threshold}")
        versions.append((folder, _registered(threshold=threshold)(folder)))
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            for folder, _ in versions:
                shutil.copy(folder / MANIFEST, copied.parent / "next")
                (copied.parent / "next").replace(copied / MANIFEST)

    swapper = threading.Thread(target=swap)
    swapper.start()
    served = Counter[float]()
    try:
        for number in range(40):
            digest = versions[number % 2][1]
            try:
                model = load_model(copied, digest)
            except ArtifactError:
                served[-1] += 1
            else:
                assert (model.digest, model.threshold) == (digest, (0.34, 0.01)[number % 2])
                served[model.threshold] += 1
    finally:
        stop.set()
        swapper.join()
    assert served.total() == 40
    assert served[-1] > 0


@contextmanager
def unprivileged() -> Generator[None]:
    """Run as a user who is not above permissions; root is, in containers most of all."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def reachable(release: tuple[Path, str]) -> Generator[Path]:
    """Return a copy of the artifact that any user can reach: pytest's own folders are closed to others."""
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        folder = shutil.copytree(release[0], Path(place) / release[0].name)
        folder.chmod(0o755)
        for path in folder.iterdir():
            path.chmod(0o644)
        yield folder
        folder.chmod(0o755)


UNREADABLE = [
    pytest.param("golden.json", 0o000, "golden.json: Permission denied", id="a file"),
    pytest.param(MANIFEST, 0o000, "manifest.json: Permission denied", id="the manifest"),
    pytest.param(".", 0o311, ": Permission denied", id="the list of the folder"),
    pytest.param(".", 0o000, "manifest.json: Permission denied", id="the folder"),
]


@pytest.mark.parametrize(("name", "mode", "said"), UNREADABLE)
def test_what_cannot_be_read_is_refused(
    settings: Settings, reachable: Path, example: dict[str, Any], name: str, mode: int, said: str
) -> None:
    own = settings.model_copy(update={"model_uri": str(reachable)})
    observer = Told()
    running = build_app(own, observer)
    with TestClient(running) as client:
        (reachable / name).chmod(mode)
        with unprivileged():
            assert not reload(running.runtime)
        assert client.get("/ready").status_code == 200
        assert client.post("/v1/predict", json=example).status_code == 200
    fresh = build_app(own, observer)
    with unprivileged(), TestClient(fresh) as client:
        ready = client.get("/ready")
        assert (client.get("/health").status_code, ready.status_code) == (200, 503)
    assert said in ready.json()["detail"]
    assert str(reachable.parent) not in ready.text
    assert len(observer.reasons) == 2


def test_the_limits_of_permissions_are_really_met(reachable: Path) -> None:
    (reachable / "golden.json").chmod(0)
    with unprivileged(), pytest.raises(PermissionError):
        (reachable / "golden.json").read_bytes()


PLACES = ["with space", "(c)", "q'uote", "ümlaut", "a:b", "a;b", "a\nb"]


@pytest.mark.parametrize("place", PLACES)
def test_no_answer_tells_where_the_artifact_lies(settings: Settings, tmp_path: Path, place: str) -> None:
    folder = tmp_path / "hunter2" / place / "hunter2" / "1.0.0"
    app = build_app(settings.model_copy(update={"model_uri": str(folder)}))
    with TestClient(app) as client:
        ready = client.get("/ready")
    assert ready.status_code == 503
    assert "manifest.json" in ready.json()["detail"]
    assert "hunter2" not in ready.text


def test_a_manifest_with_many_mistakes_is_refused_in_few_words(own: Settings, copied: Path) -> None:
    digest = _registered(**{f"key{number}": 1 for number in range(10_000)})(copied)
    with TestClient(build_app(own.model_copy(update={"model_digest": digest}))) as client:
        ready = client.get("/ready")
    assert ready.status_code == 503
    assert len(ready.content) < 2_000


@pytest.mark.skipif(not Path("/proc").exists(), reason="memory is read from /proc, which only Linux has")
def test_a_huge_manifest_is_not_read(serve: Callable[..., Running], copied: Path) -> None:
    """The manifest has 9 kB. Some gigabytes in its place would end the process."""
    with (copied / MANIFEST).open("wb") as file:
        file.truncate(300_000_000)  # a sparse file: it takes no room on the disk
    running = serve(MODEL_URI=str(copied))
    ready = httpx.get(running.url + "/ready")
    assert (ready.status_code, "manifest.json" in ready.json()["detail"]) == (503, True)
    status = Path(f"/proc/{running.process.pid}/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    assert int(peak.split()[1]) < 200_000  # KiB; about 90,000 without the manifest


# The same with real processes

REAL: dict[str, tuple[Change, str]] = {
    name: FAULTS[name] for name in ("a flipped bit in model.onnx", "a pipe for the manifest", "a name that leads up")
}


@pytest.mark.parametrize(("change", "said"), REAL.values(), ids=REAL)
def test_a_process_with_a_damaged_artifact_stays_alive(
    serve: Callable[..., Running], own: Settings, copied: Path, change: Change, said: str
) -> None:
    digest = change(copied) or str(own.model_digest)
    running = serve(MODEL_URI=str(copied), MODEL_DIGEST=digest)
    ready = httpx.get(running.url + "/ready")
    assert (ready.status_code, ready.headers["retry-after"]) == (503, "5")
    assert said in ready.json()["detail"]
    assert str(copied.parent) not in ready.text
    assert httpx.get(running.url + "/health").status_code == 200
    assert running.stop() == 0
    refused = [line for line in running.lines() if line["event"] == "model_refused"]
    assert [said in line["reason"] for line in refused] == [True]


# Stopping and killing


def message(path: str, content: Any, *headers: str) -> bytes:
    """Return one request as bytes."""
    body = json.dumps(content).encode()
    head = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {len(body)}"]
    return "\r\n".join([*head, *headers, "", ""]).encode() + body


def whole_answer(connection: socket.socket) -> bytes:
    """Return everything until the server closes."""
    received = b""
    while part := connection.recv(65_536):
        received += part
    return received


def knock(port: int, content: bytes, outcomes: Counter[str]) -> None:
    """Send one request after the other, each on its own connection, until the door is closed. Count what happens."""
    while True:
        try:
            connection = socket.create_connection(("127.0.0.1", port), timeout=20)
        except ConnectionError:
            return  # this one was never accepted
        with connection:
            try:
                connection.sendall(content)
                answer = whole_answer(connection)
            except OSError as error:
                outcomes[type(error).__name__] += 1
            else:
                outcomes[answer[9:12].decode() or "empty"] += 1


def test_sigterm_loses_nothing_of_many_clients_batches_and_new_connections(
    serve: Callable[..., Running], example: dict[str, Any]
) -> None:
    """32 clients, four of them with batches, that open a connection for each request, before and during the drain."""
    running = serve(DRAIN_S="0.3", MAX_BATCHES_WAITING="100")
    single = message("/v1/predict", example, "connection: close")
    batch = message("/v1/predict/batch", {"flights": [example] * 200}, "connection: close")
    outcomes = Counter[str]()
    clients = [
        threading.Thread(target=knock, args=(running.port, batch if number % 8 == 0 else single, outcomes))
        for number in range(32)
    ]
    for client in clients:
        client.start()
    time.sleep(0.3)
    running.process.send_signal(signal.SIGTERM)
    for client in clients:
        client.join(30)
    assert running.process.wait(20) == 0
    assert set(outcomes) == {"200"}
    logged = Counter(line["route"] for line in running.lines() if line.get("status") == 200)
    assert logged["/v1/predict"] + logged["/v1/predict/batch"] == outcomes["200"]
    assert logged["/v1/predict/batch"] > 0


def test_a_service_killed_under_load_takes_its_port_again(
    release: tuple[Path, str], tmp_path: Path, unused_port: Callable[[], int], example: dict[str, Any]
) -> None:
    """Some connections are busy, some are idle, and one is in the middle of a body when the process is killed."""
    port = unused_port()
    first = launch(release, tmp_path, port)
    outcomes = Counter[str]()
    content = message("/v1/predict", example, "connection: close")
    load = [threading.Thread(target=knock, args=(port, content, outcomes)) for _ in range(8)]
    idle = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(8)]
    second = None
    try:
        idle[0].sendall(content[:-10])
        for client in load:
            client.start()
        time.sleep(0.3)
        first.process.kill()
        first.process.wait(10)
        for client in load:
            client.join(30)
        assert outcomes["200"] > 0
        second = launch(release, tmp_path, port)  # the same port, at once, while old connections are not closed
        assert httpx.get(second.url + "/ready").status_code == 200
        assert httpx.post(second.url + "/v1/predict", json=example).status_code == 200
        assert second.stop() == 0
    finally:
        for running in (first, second):
            if running is not None:
                running.process.kill()
        for connection in idle:
            connection.close()
