"""Releases: identity, storage that survives races and kills, the ledger, checks that can fail, promotion, rollback."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from mlops_course import release
from mlops_course.blueprint import MANIFEST, MODEL_NAME, ArtifactError, VersionError, canonical_json, read_registry
from mlops_course.release import (
    LEDGER,
    Ask,
    Check,
    Conflict,
    Evidence,
    LedgerError,
    Release,
    ReleaseError,
    Reply,
    Store,
    append,
    asking,
    check_settings,
    fetch,
    find_release,
    fingerprint_of,
    make_release,
    open_ledger,
    parse_image,
    promote,
    publish,
    read_ledger,
    record_release,
    roll_back,
    smoke,
    synthetic,
    variables,
)
from mlops_course.serving import Settings, build_app

from ..conftest import clean_environment

SHA = "a" * 40
VERSION = "1.0.0"
Run = Callable[..., AbstractContextManager[str]]


@pytest.fixture
def digest(shelf: Path) -> str:
    """Return the digest of the approved model on the shelf."""
    return read_registry(shelf).versions[VERSION]


@pytest.fixture
def plain(digest: str) -> Release:
    """Return a release without an image and with default settings."""
    return make_release(SHA, VERSION, digest)


@pytest.fixture
def strict(digest: str) -> Release:
    """Return the same with a higher threshold."""
    return make_release(SHA, VERSION, digest, settings={"THRESHOLD": "0.5"})


@pytest.fixture(params=["folder", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Return an empty store of each kind."""
    name = f"{request.node.name.partition('[')[0]}-{os.getpid()}"
    if request.param == "s3":
        return Store(f"{request.getfixturevalue('s3')}/{name}")
    return Store(tmp_path / "store" if request.param == "folder" else f"memory://{name}")


# --- Identity ---------------------------------------------------------------------------------------------------


def test_each_part_is_part_of_the_identity(digest):
    first = make_release(SHA, VERSION, digest)
    assert make_release(SHA, VERSION, digest).digest == first.digest
    image = "registry.example.com/a@sha256:" + "0" * 64
    others = [
        make_release("b" * 40, VERSION, digest),
        make_release(SHA, "1.0.1", digest),
        make_release(SHA, VERSION, "sha256:" + "0" * 64),
        make_release(SHA, VERSION, digest, image),
        make_release(SHA, VERSION, digest, settings={"THRESHOLD": "0.5"}),
    ]
    assert len({one.digest for one in [first, *others]}) == 6


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"PORT": "9000"}, "setting PORT changes no answer"),
        ({"MAX_BATCH": "1000"}, "setting MAX_BATCH has its default value, so it changes nothing; leave it out"),
        ({"TRESHOLD": "0.5"}, "unknown setting TRESHOLD; those of a release: .*MAX_BATCH, .*THRESHOLD"),
        ({"threshold": "0.5"}, "unknown setting threshold"),
        ({"THRESHOLD": "2"}, "setting THRESHOLD: Input should be less than or equal to 1"),
    ],
)
def test_settings_that_are_no_part_of_a_release_are_refused(settings, problem):
    with pytest.raises(ReleaseError, match=problem):
        check_settings(settings)


def test_the_fingerprint_ignores_the_environment_of_whoever_asks(monkeypatch):
    before = fingerprint_of({})
    monkeypatch.setenv("THRESHOLD", "0.9")
    assert fingerprint_of({}) == before
    assert fingerprint_of({"THRESHOLD": "0.9"}) != before


@pytest.mark.parametrize(
    ("part", "value"),
    [("git_sha", "main"), ("git_sha", f"{SHA}-dirty"), ("model_digest", "1.0.0")],
)
def test_a_name_that_can_point_elsewhere_is_no_part_of_a_release(digest, part, value):
    parts = {"git_sha": SHA, "model_version": VERSION, "model_digest": digest, part: value}
    with pytest.raises(ReleaseError, match=f"this is not a release: {part}: String should match pattern"):
        make_release(**parts)


@pytest.mark.parametrize("image", ["registry.example.com/a:v1", "registry.example.com/a@sha256:0123"])
def test_an_image_without_its_whole_digest_is_told_what_to_do(digest, image):
    with pytest.raises(ReleaseError, match=f"'{image}' is not host/name@sha256:…; push the image and take the digest"):
        make_release(SHA, VERSION, digest, image)


def test_a_setting_that_a_release_does_not_name_is_told_to_have_its_default(plain, strict):
    names = set(variables(plain)) - {"SERVICE_IMAGE", "GIT_SHA", "MODEL_DIGEST", "MODEL_VERSION"}
    assert names >= {"THRESHOLD", "MAX_BATCH", "BODY_TIMEOUT_S"}
    assert {variables(plain)[name] for name in names} == {""}
    assert (variables(strict)["THRESHOLD"], variables(strict)["MAX_BATCH"]) == ("0.5", "")


def test_what_a_place_needs_to_run_a_release(strict, digest):
    assert {name: value for name, value in variables(strict).items() if value} == {
        "GIT_SHA": SHA,
        "MODEL_DIGEST": digest,
        "MODEL_VERSION": VERSION,
        "THRESHOLD": "0.5",
    }


# --- Storage ----------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_only_by_who_knows_its_content(store):
    nothing = store.read("a")
    assert nothing == (b"", None)
    store.replace("a", b"1", None)
    with pytest.raises(Conflict, match="a in .* was changed by somebody else"):
        store.replace("a", b"2", None)
    seen = store.read("a")
    assert seen.data == b"1"
    store.replace("a", b"2", seen.mark)
    with pytest.raises(Conflict):
        store.replace("a", b"3", seen.mark)
    assert store.read("a").data == b"2"


def test_a_file_that_was_deleted_is_a_conflict_too(store):
    store.replace("a", b"1", None)
    seen = store.read("a")
    store.fs.rm(store.at("a"))
    with pytest.raises(Conflict):
        store.replace("a", b"2", seen.mark)
    assert store.read("a").mark is None


def test_a_place_without_compare_and_swap_is_refused():
    with pytest.raises(ReleaseError, match="no way is known to replace a file there safely"):
        Store("http://example.com/models")


ADDER = """
import sys
from mlops_course.release import Conflict, Store
store, done = Store(sys.argv[1]), 0
while done < 15:
    found = store.read("count")
    try:
        store.replace("count", str(int(found.data or 0) + 1).encode(), found.mark)
        done += 1
    except Conflict:
        pass
"""


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_processes_that_write_at_once_lose_nothing(kind, request, tmp_path):
    url = str(tmp_path) if kind == "folder" else f"{request.getfixturevalue('s3')}/count"
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    command = [sys.executable, "-c", ADDER, url]
    started = [subprocess.Popen(command, env=clean_environment(**aws)) for _ in range(3)]
    assert [process.wait(120) for process in started] == [0, 0, 0]
    assert Store(url).read("count").data == b"45"


WRITER = """
import sys
from mlops_course.release import Store
store, number = Store(sys.argv[1]), 0
while True:
    number += 1
    store.replace("state", (b"%d " % number) * 200_000, store.read("state").mark)
    if number == 2:
        print("writing", flush=True)
"""


def test_a_killed_writer_leaves_the_old_content_or_the_new_and_no_lock(tmp_path):
    store, chance = Store(tmp_path), random.Random(4)
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    for _ in range(6):
        process = subprocess.Popen(command, env=clean_environment(), stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        process.stdout.close()
        data, mark = store.read("state")
        number = data.partition(b" ")[0]
        assert data == (number + b" ") * 200_000
        # Nobody holds the lock any more; a next writer goes on where the dead one stopped.
        store.replace("state", data, mark)


# --- The ledger -------------------------------------------------------------------------------------------------


def event(store: Store, one: Release, channel: str = "candidate", action: str = "release") -> release.Ledger:
    """Add an event for a release."""
    return append(store, read_ledger(store), action=action, by="ann", channel=channel, to=one.digest, release=one)


def test_the_ledger_says_who_when_what_from_and_to(store, plain, strict):
    event(store, plain, "staging", "promote")
    ledger = event(store, strict, "staging", "promote")
    first, second = ledger.events
    assert (first.before, first.to, first.previous) == (None, plain.digest, None)
    assert (second.before, second.to, second.by) == (plain.digest, strict.digest, "ann")
    line = store.read(LEDGER).data.splitlines()[0]
    assert second.previous == hashlib.sha256(line).hexdigest()
    assert json.loads(line)["from"] is None
    assert json.loads(line)["at"].endswith("+00:00")
    assert (ledger.current("staging"), ledger.current("prod")) == (strict, None)


def test_lines_are_only_ever_added(store, plain, strict):
    before = b""
    for one in (plain, strict, plain):
        event(store, one)
        now = store.read(LEDGER).data
        assert now.startswith(before)
        assert now.count(b"\n") == before.count(b"\n") + 1
        before = now


def damaged(store: Store, change: Callable[[list[bytes]], list[bytes]]) -> None:
    """Rewrite the ledger's lines."""
    found = store.read(LEDGER)
    store.replace(LEDGER, b"".join(change(found.data.splitlines(keepends=True))), found.mark)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda lines: [*lines[:2], lines[2][:-9]], "line 3 is cut off"),
        (lambda lines: [*lines[:2], lines[2][:-1]], "line 3 is cut off"),
        (lambda lines: [lines[0].replace(b'"by":"ann"', b'"by":"ben"'), *lines[1:]], "line 2 does not follow"),
        (lambda lines: [lines[0], lines[2]], "line 2 does not follow"),
        (lambda lines: lines[1:], "line 1 does not follow"),
        (lambda lines: [*lines, lines[2]], "line 4 does not follow"),
        (lambda lines: [lines[0], b"{}\n", *lines[1:]], "line 2 is not an event"),
        (lambda lines: [*lines[:2], b"\n"], "line 3 is not an event"),
    ],
    ids=["cut", "no newline", "edited", "removed", "first removed", "repeated", "no event", "empty"],
)
def test_a_ledger_that_was_damaged_or_edited_is_refused(tmp_path, plain, strict, change, problem):
    store = Store(tmp_path)
    for one in (plain, strict, plain):
        event(store, one)
    damaged(store, change)
    with pytest.raises(LedgerError, match=problem):
        read_ledger(store)
    with pytest.raises(LedgerError, match=problem):
        event(store, plain)


def test_an_event_that_contradicts_the_ones_before_is_refused(tmp_path, plain, strict):
    store = Store(tmp_path)
    ledger = event(store, plain)
    forged = ledger.events[0].model_copy(update={"previous": ledger.head, "before": strict.digest})
    line = json.dumps(forged.model_dump(by_alias=True)).encode() + b"\n"
    store.replace(LEDGER, ledger.data + line, ledger.mark)
    with pytest.raises(LedgerError, match="line 2 moves candidate from a release that was not there"):
        read_ledger(store)


APPENDER = """
import json, sys, time
from pathlib import Path
from mlops_course.release import Conflict, Release, Store, append, read_ledger
store, one = Store(sys.argv[1]), Release.model_validate_json(sys.argv[2])
ledger = read_ledger(store)
Path(sys.argv[3]).touch()
while not Path(sys.argv[4]).exists():
    time.sleep(0.001)
try:
    append(store, ledger, action="promote", by=sys.argv[3][-1], channel="staging", to=one.digest, release=one)
except Conflict:
    sys.exit(7)
"""


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_of_two_promotions_at_once_exactly_one_wins(kind, request, tmp_path, plain, strict):
    url = str(tmp_path / "store") if kind == "folder" else f"{request.getfixturevalue('s3')}/promotions"
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    go, ready = tmp_path / "go", [tmp_path / "a", tmp_path / "b"]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", APPENDER, url, one.model_dump_json(), str(mark), str(go)],
            env=clean_environment(**aws),
        )
        for one, mark in zip((plain, strict), ready, strict=True)
    ]
    end = time.monotonic() + 60
    while not all(mark.exists() for mark in ready):
        assert time.monotonic() < end
        time.sleep(0.01)
    go.touch()
    codes = [process.wait(60) for process in started]
    assert sorted(codes) == [0, 7]
    (only,) = read_ledger(Store(url)).events
    assert only.by == "ab"[codes.index(0)]
    assert only.release == (plain, strict)[codes.index(0)]


# --- The pointers follow ----------------------------------------------------------------------------------------


def test_the_model_registry_says_what_the_ledger_says(shelf, plain):
    store = Store(shelf)
    record_release(store, plain, "ann")
    registry = read_registry(shelf)
    assert registry.channels["candidate"] == VERSION
    assert set(registry.versions) == {VERSION, "1.1.0-rc.1"}


def test_a_command_that_died_between_ledger_and_pointer_is_finished_by_the_next(shelf, plain):
    store = Store(shelf)
    event(store, plain, "staging", "promote")
    assert "staging" not in read_registry(shelf).channels
    _, moved = open_ledger(store)
    assert moved == ["staging"]
    assert read_registry(shelf).channels["staging"] == VERSION
    assert open_ledger(store)[1] == []


def test_a_rollback_that_died_is_finished_and_not_repeated(shelf, plain, strict):
    store, boosted = Store(shelf), make_release(SHA, "1.1.0-rc.1", read_registry(shelf).versions["1.1.0-rc.1"])
    for one in (plain, strict, boosted):
        event(store, one, "staging", "promote")
    open_ledger(store)
    event(store, strict, "staging", "rollback")  # and then it dies: the registry still says 1.1.0-rc.1
    assert roll_back(store, "ann", "staging") == strict
    assert read_registry(shelf).channels["staging"] == VERSION
    assert [e.action for e in read_ledger(store).events].count("rollback") == 1
    assert roll_back(store, "ann", "staging") == plain


def test_a_channel_that_somebody_moved_by_hand_is_moved_back(shelf, plain):
    store = Store(shelf)
    event(store, plain, "staging", "promote")
    open_ledger(store)
    registry = read_registry(shelf)
    registry.channels["staging"] = "1.1.0-rc.1"
    (shelf / "registry.json").write_bytes(canonical_json(registry.model_dump()))
    assert open_ledger(store)[1] == ["staging"]
    assert read_registry(shelf).channels["staging"] == VERSION


# --- Smoke test and synthetic checks ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden(artifacts_root: Path) -> dict[str, Any]:
    """Return the golden cases of the approved release."""
    cases: dict[str, Any] = json.loads((artifacts_root / MODEL_NAME / VERSION / "golden.json").read_text())
    return cases | {"exact": True}


@pytest.fixture(scope="module", params=[VERSION, "1.1.0-rc.1"])
def each_version(request: pytest.FixtureRequest) -> str:
    """Return each version that the course trains."""
    return str(request.param)


def in_process(folder: Path, **settings: Any) -> TestClient:
    """Return a client of a service with a model, in this process."""
    chosen = Settings.model_construct(model_uri=str(folder), max_lag_ms=10_000.0, **settings)
    return TestClient(build_app(chosen), raise_server_exceptions=False)


def ask_with(client: TestClient) -> Ask:
    """Return the function with which checks ask, for a client in this process."""

    def ask(method: str, path: str, content: Any = None) -> Reply:
        answer = client.request(method, path, json=content)
        return Reply(answer.status_code, answer.json(), answer.headers["content-type"].partition(";")[0], 1.0)

    return ask


@pytest.fixture(scope="module")
def ask(artifacts_root: Path) -> Generator[Ask]:
    """Ask a real service in this process."""
    with in_process(artifacts_root / MODEL_NAME / VERSION) as client:
        yield ask_with(client)


def spoilt(ask: Ask, path: str, change: Callable[[Reply], Reply]) -> Ask:
    """Return the same service with one answer changed on its way."""

    def asked(method: str, where: str, content: Any = None) -> Reply:
        reply = ask(method, where, content)
        return change(reply) if where == path else reply

    return asked


def body(**fields: Any) -> Callable[[Reply], Reply]:
    """Return a change of an answer's fields; None removes one."""

    def change(reply: Reply) -> Reply:
        new = {name: value for name, value in {**reply.body, **fields}.items() if value is not None}
        return reply._replace(body=new)

    return change


def test_every_version_passes_both(each_version, artifacts_root):
    folder = artifacts_root / MODEL_NAME / each_version
    cases = json.loads((folder / "golden.json").read_text()) | {"exact": True}
    with in_process(folder) as client:
        ask = ask_with(client)
        checks = smoke(ask, {"version": each_version}, cases) + synthetic(ask, [c["request"] for c in cases["cases"]])
    assert [check.name for check in checks if not check.passed] == []
    assert len(checks) == 9


PREDICT, BATCH = "/v1/predict", "/v1/predict/batch"


@pytest.mark.parametrize(
    ("path", "change", "name", "detail"),
    [
        ("/health", lambda r: r._replace(status=500), "alive", "answered 500, not 200"),
        ("/health", lambda r: Reply(0, "ConnectError", "", 1.0), "alive", "no answer (ConnectError)"),
        ("/health", body(more=1), "alive", "more: Extra inputs are not permitted"),
        ("/ready", lambda r: r._replace(status=503, body={"detail": "no model"}), "ready", "not 200: no model"),
        ("/v1/model", body(digest="sha256:other"), "release", "digest is sha256:other, expected sha256:"),
        ("/v1/model", body(version=1), "release", "/v1/model: version: Input should be a valid string"),
        ("/v1/model", body(config=None), "release", "/v1/model: config: Field required"),
        ("/v1/model", lambda r: r._replace(body="<html>"), "release", "body: Input should be a valid dictionary"),
        (PREDICT, body(probability="0.2"), "golden predictions", "probability: Input should be a valid number"),
        (PREDICT, body(probability=True), "golden predictions", "probability: Input should be a valid number"),
        (PREDICT, body(probability=float("nan")), "golden predictions", "probability: Input should be"),
        (PREDICT, body(threshold=None), "golden predictions", "threshold: Field required"),
        (PREDICT, body(surprise=1), "golden predictions", "surprise: Extra inputs are not permitted"),
        (PREDICT, body(prediction="late"), "golden predictions", "prediction: Input should be 'disrupted' or 'on_time'"),
        (PREDICT, body(prediction="disrupted"), "golden predictions", "contradicts probability and threshold"),
        (PREDICT, body(probability=0.2345), "golden predictions", "another model?"),
        (PREDICT, lambda r: r._replace(kind="text/html"), "refuses bad input", "media type text/html"),
    ],
)
def test_the_smoke_test_names_the_step_that_fails_and_stops_there(ask, golden, digest, path, change, name, detail):
    checks = smoke(spoilt(ask, path, change), {"version": VERSION, "digest": digest}, golden)
    assert [check.passed for check in checks] == [True] * (len(checks) - 1) + [False]
    assert checks[-1].name == name
    assert detail in checks[-1].detail


def test_a_service_that_takes_anything_fails_the_smoke_test(ask, golden):
    def generous(method: str, path: str, content: Any = None) -> Any:
        return ask(method, path, golden["cases"][0]["request"] if content == {} else content)

    failed = smoke(generous, {}, golden)[-1]
    assert (failed.name, failed.passed) == ("refuses bad input", False)


def test_without_recorded_answers_only_the_shape_counts(ask, golden):
    far = {**golden, "cases": [{**case, "probability": 0.99} for case in golden["cases"]]}
    assert not smoke(ask, {}, far)[3].passed
    assert smoke(ask, {}, {**far, "exact": False})[3].passed


def each(change: Callable[[int, dict[str, Any]], dict[str, Any]]) -> Callable[[Reply], Reply]:
    """Return a change of each prediction of a batch."""

    def changed(reply: Reply) -> Reply:
        new = [change(i, one) for i, one in enumerate(reply.body["predictions"])]
        return reply._replace(body={**reply.body, "predictions": new})

    return changed


@pytest.mark.parametrize(
    ("path", "change", "failed"),
    [
        (PREDICT, body(probability=1.5), ["probabilities"]),
        (PREDICT, body(probability=float("nan")), ["probabilities"]),
        (PREDICT, lambda r: r._replace(status=500, body="broken"), ["probabilities"]),
        (BATCH, each(lambda i, one: {**one, "threshold": 0.1}), ["batch equals single"]),
        (
            BATCH,
            each(lambda i, one: {**one, "probability": round(1 - one["probability"], 4)}),
            ["batch equals single", "risk follows delay"],
        ),
        (
            BATCH,
            lambda r: r._replace(body={**r.body, "predictions": r.body["predictions"][1:]}),
            ["batch equals single", "risk follows delay", "missing weather"],
        ),
    ],
    ids=["above one", "nan", "error", "threshold", "turned", "one lost"],
)
def test_each_invariant_can_fail(ask, golden, path, change, failed):
    requests = [case["request"] for case in golden["cases"][:4]]
    checks = synthetic(spoilt(ask, path, change), requests)
    assert [check.name for check in checks if not check.passed] == failed


def test_the_last_decimal_may_differ_in_a_batch_and_no_more(ask, golden):
    """ONNX Runtime adds in another order for many rows, so a probability between two decimals may fall either way."""
    requests = [case["request"] for case in golden["cases"][:4]]

    def moved(by: float) -> list[bool]:
        nudge = each(lambda _, one: {**one, "probability": round(one["probability"] + by, 4), "prediction": "on_time"})
        return [check.passed for check in synthetic(spoilt(ask, BATCH, nudge), requests)][:2]

    assert (moved(0.0001), moved(-0.0001), moved(0.0002)) == ([True, True], [True, True], [True, False])


def test_a_service_that_needs_weather_is_noticed(ask, golden):
    def needs(method: str, path: str, content: Any = None) -> Reply:
        blind = path == BATCH and content["flights"][0]["temperature_f"] is None
        return Reply(422, {"detail": "no weather"}, "application/problem+json", 1.0) if blind else ask(method, path, content)

    requests = [case["request"] for case in golden["cases"] if case["request"]["temperature_f"] is not None][:4]
    failed = [check for check in synthetic(needs, requests) if not check.passed]
    assert [(check.name, check.detail) for check in failed] == [("missing weather", "answered 422, not 200: no weather")]


def test_risk_that_falls_is_told_with_its_numbers(ask, golden):
    fall = each(lambda i, one: {**one, "probability": [0.1, 0.2, 0.3, 0.29, 0.4, 0.5, 0.6][i % 7]})
    checks = {c.name: c for c in synthetic(spoilt(ask, BATCH, fall), [golden["cases"][0]["request"]])}
    assert "flight 0: risk [0.1, 0.2, 0.3, 0.29, 0.4, 0.5, 0.6]" in checks["risk follows delay"].detail


def test_no_check_is_a_failure():
    assert [c.name for c in Evidence(url="u", checks=[]).failed] == ["checks"]
    fine = Check(name="a", passed=True, detail="")
    assert Evidence(url="u", checks=[fine]).failed == []


def test_nothing_that_listens_is_a_failed_check_and_no_crash(golden, unused_port):
    with asking(f"http://127.0.0.1:{unused_port()}") as ask:
        (only,) = smoke(ask, {}, golden)
    assert (only.name, only.passed, only.detail) == ("alive", False, "no answer (ConnectError)")


def test_what_is_no_address_is_told():
    with pytest.raises(ReleaseError, match="is not an address"), asking("http://[::1"):
        pass


@pytest.fixture
def away(digest, unused_port) -> Release:
    """Return a release whose image is in a registry that does not answer."""
    image = f"127.0.0.1:{unused_port()}/flight-disruption@sha256:{'0' * 64}"
    return make_release(SHA, VERSION, digest, image)


def test_an_image_that_is_not_wanted_any_more_does_not_stop_a_rollback(shelf, plain, away):
    store = Store(shelf)
    for one in (plain, away):
        event(store, one, "prod", "promote")
    assert roll_back(store, "ann") == plain
    assert read_ledger(store).current("prod") == plain


def test_a_tag_that_cannot_follow_is_told_after_the_move(shelf, plain, strict, away, running_service: Run):
    """Staging's image is away; neither a new release nor prod has anything to do with it."""
    store = Store(shelf)
    event(store, away, "staging", "promote")
    behind = f"the ledger says that staging is {away.digest[:19]}, and that counts; only the tag staging .* is behind: "
    with pytest.warns(release.BehindWarning, match=behind + "image registry .* does not answer"):
        record_release(store, strict, "ann")
    assert read_ledger(store).current("candidate") == strict
    for one in (plain, strict):
        event(store, one, "prod", "promote")
    with pytest.warns(release.BehindWarning, match=behind):
        assert roll_back(store, "ann") == plain
    with running_service(**place(strict, shelf)) as url:
        promote(store, strict, "staging", url, "ann")
    assert read_ledger(store).current("staging") == strict


def test_a_release_whose_own_image_is_away_does_not_move(shelf, plain, away):
    store = Store(shelf)
    for one in (away, plain):
        event(store, one, "prod", "promote")
    before = (shelf / LEDGER).read_bytes()
    with pytest.raises(ReleaseError, match="does not answer"):
        roll_back(store, "ann")
    with pytest.raises(ReleaseError, match="does not answer"):
        record_release(store, away, "ann")
    assert (shelf / LEDGER).read_bytes() == before


# --- Promotion and rollback, with real services -----------------------------------------------------------------


def place(one: Release, shelf: Path, **more: str) -> dict[str, str]:
    """Return the variables of a place that runs a release without an image."""
    return {**variables(one), "MODEL_URI": str(shelf / one.model_version), **more}


def test_from_candidate_to_prod_and_back(shelf, plain, strict, running_service: Run):
    store = Store(shelf)
    record_release(store, plain, "ann", "first")
    record_release(store, strict, "ann")
    assert record_release(store, plain, "ann").events == read_ledger(store).events  # known, so not written again
    with pytest.raises(ReleaseError, match=r"is not in staging \(nothing is\); promote it there first"):
        promote(store, plain, "prod", "http://127.0.0.1:1", "ann")
    with running_service(**place(plain, shelf)) as url:
        assert promote(store, plain, "staging", url, "ann").failed == []
        assert read_registry(shelf).channels["staging"] == VERSION
        promote(store, plain, "prod", url, "ann")
        # The other release is not what runs there.
        with pytest.raises(ReleaseError, match="not promoted to staging: release: config is "):
            promote(store, strict, "staging", url, "ben")
    refused = read_ledger(store).events[-1]
    assert (refused.action, refused.by, refused.before) == ("refuse", "ben", refused.to)
    assert refused.evidence is not None
    assert [check.name for check in refused.evidence.failed] == ["release"]
    assert read_ledger(store).current("staging") == plain
    with running_service(**place(strict, shelf)) as url:
        promote(store, strict, "staging", url, "ann")
        evidence = promote(store, strict, "prod", url, "ann")
    assert len(evidence.checks) == 9
    assert read_ledger(store).events[-1].evidence == evidence
    assert evidence.latency_ms["answers"] > 90
    with pytest.raises(ReleaseError, match="is not in staging"):
        promote(store, plain, "prod", "http://127.0.0.1:1", "ann")
    assert roll_back(store, "ann", note="too few warnings") == plain
    assert (read_ledger(store).current("prod"), read_ledger(store).current("staging")) == (plain, strict)
    with pytest.raises(ReleaseError, match="prod has no release before this one"):
        roll_back(store, "ann")
    assert read_registry(shelf).channels == {"candidate": VERSION, "staging": VERSION, "prod": VERSION}


def test_a_mistake_of_whoever_asks_is_not_recorded_as_a_refusal(shelf, plain, running_service: Run, unused_port):
    store, key = Store(shelf), "k7Qz9-mR2vXw8-Lp4tNb6"
    record_release(store, plain, "ann")
    before = (shelf / LEDGER).read_bytes()
    gone = f"http://127.0.0.1:{unused_port()}"
    with pytest.raises(ReleaseError, match=f"nothing was checked at {gone}: no answer"):
        promote(store, plain, "staging", gone, "ann")
    for text in ("", "127.0.0.1:8000", "staging"):
        with pytest.raises(ReleaseError, match=f"'{text}' is not an address; write for example http://"):
            promote(store, plain, "staging", text, "ann")
    with running_service(**place(plain, shelf, API_KEY=key)) as url:
        for wrong in (None, "another-key-of-16-chars"):
            with pytest.raises(ReleaseError, match="the key is missing or wrong; set API_KEY, or, .* .secrets/API_KEY"):
                promote(store, plain, "staging", url, "ann", wrong)
        assert (shelf / LEDGER).read_bytes() == before
        assert promote(store, plain, "staging", url, "ann", key).failed == []


def test_a_promotion_that_was_overtaken_moves_nothing(shelf, plain, strict, running_service: Run, monkeypatch):
    store = Store(shelf)
    for one in (plain, strict):
        record_release(store, one, "ann")
    checked = release.examine

    def overtaken(*arguments: Any) -> Evidence:
        evidence = checked(*arguments)
        event(store, strict, "staging", "promote")
        return evidence

    monkeypatch.setattr(release, "examine", overtaken)
    with running_service(**place(plain, shelf)) as url, pytest.raises(Conflict):
        promote(store, plain, "staging", url, "ann")
    assert read_ledger(store).current("staging") == strict


def test_prod_takes_approved_models_only(shelf, running_service: Run):
    store, digest = Store(shelf), read_registry(shelf).versions["1.1.0-rc.1"]
    boosted = make_release(SHA, "1.1.0-rc.1", digest)
    record_release(store, boosted, "ann")
    with running_service(**place(boosted, shelf)) as url:
        promote(store, boosted, "staging", url, "ann")
        with pytest.raises(ReleaseError, match=r"model 1\.1\.0-rc\.1 is not approved, so it cannot go to prod"):
            promote(store, boosted, "prod", url, "ann")
    assert read_ledger(store).current("prod") is None


@pytest.mark.parametrize(
    ("file", "problem"),
    [("model.onnx", "model.onnx was changed"), ("manifest.json", "has digest sha256:.*nothing was kept")],
)
def test_a_rollback_to_what_is_damaged_is_refused_before_anything_moves(shelf, plain, strict, file, problem):
    store = Store(shelf)
    for one in (plain, strict):
        event(store, one, "prod", "promote")
    open_ledger(store)
    before = (shelf / LEDGER).read_bytes()
    with (shelf / VERSION / file).open("ab") as model:
        model.write(b" ")
    with pytest.raises(ArtifactError, match=problem):
        roll_back(store, "ann")
    assert (shelf / LEDGER).read_bytes() == before


def test_a_rollback_whose_settings_mean_something_else_now_is_refused(shelf, plain, strict):
    store = Store(shelf)
    for one in (plain.model_copy(update={"config": "0" * 12}), strict):
        event(store, one, "prod", "promote")
    with pytest.raises(ReleaseError, match="its settings mean something else to this version of the code"):
        roll_back(store, "ann")


def test_rolling_back_twice_goes_two_releases_back(shelf, digest):
    store = Store(shelf)
    three = [make_release(SHA, VERSION, digest, settings={"THRESHOLD": text}) for text in ("0.4", "0.5", "0.6")]
    for one in three:
        event(store, one, "prod", "promote")
    assert roll_back(store, "ann") == three[1]
    assert roll_back(store, "ann") == three[0]


@pytest.mark.parametrize("text", ["sha256:12", "", "12345678", "latest", "sha256:"])
def test_an_unknown_or_short_digest_is_refused(tmp_path, plain, text):
    ledger = event(Store(tmp_path), plain)
    with pytest.raises(ReleaseError, match="names no single release; known: sha256:"):
        find_release(ledger, text)
    assert find_release(ledger, plain.digest) == plain
    assert find_release(ledger, plain.digest[7:15]) == plain


# --- Bringing models --------------------------------------------------------------------------------------------


def test_a_model_goes_into_any_store_and_comes_back_verified(store, shelf, digest, tmp_path):
    publish(store, shelf / VERSION, digest)
    publish(store, shelf / VERSION, digest)  # again is a no-op
    target = tmp_path / "new" / "model"
    manifest = fetch(f"{store.url}/{VERSION}", digest, target)
    assert manifest.version == VERSION
    assert {p.name: p.read_bytes() for p in target.iterdir()} == {
        p.name: p.read_bytes() for p in (shelf / VERSION).iterdir()
    }
    assert fetch("http://example.com/not/asked", digest, target) == manifest  # already there, verified again


def test_a_release_is_promoted_in_an_object_store(s3, shelf, plain, strict, digest, running_service: Run):
    store = Store(f"{s3}/releases")
    publish(store, shelf / VERSION, digest)
    for one in (plain, strict):
        record_release(store, one, "ann")
        with running_service(**place(one, shelf)) as url:
            promote(store, one, "staging", url, "ann")
            promote(store, one, "prod", url, "ann")
    assert roll_back(store, "ann") == plain
    assert json.loads(store.read("registry.json").data)["channels"]["prod"] == VERSION
    assert len(read_ledger(store).events) == 7


@pytest.mark.parametrize("name", ["model.onnx", MANIFEST, "golden.json"])
def test_a_model_that_was_changed_elsewhere_is_never_visible_here(store, shelf, digest, tmp_path, name):
    publish(store, shelf / VERSION, digest)
    content = store.fs.cat_file(store.at(f"{VERSION}/{name}"))
    store.fs.pipe_file(store.at(f"{VERSION}/{name}"), content + b" ")
    target = tmp_path / "brought" / "model"
    with pytest.raises(ArtifactError, match="was changed|has digest"):
        fetch(f"{store.url}/{VERSION}", digest, target)
    assert list(target.parent.iterdir()) == []


def test_a_model_that_is_half_there_is_refused(store, shelf, digest, tmp_path):
    publish(store, shelf / VERSION, digest)
    store.fs.rm(store.at(f"{VERSION}/reference.json"))
    with pytest.raises(ArtifactError, match=r"1\.0\.0/reference\.json does not exist"):
        fetch(f"{store.url}/{VERSION}", digest, tmp_path / "model")
    with pytest.raises(ArtifactError, match=r"9\.9\.9/manifest\.json does not exist; check the URL"):
        fetch(f"{store.url}/9.9.9", digest, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "a/b"])  # noqa: S108 - nothing is written there
def test_a_manifest_that_names_other_places_is_refused_and_writes_nowhere(shelf, tmp_path, name):
    path = shelf / VERSION / MANIFEST
    content = json.loads(path.read_bytes())
    content["files"][name] = content["files"].pop("golden.json")
    path.write_bytes(canonical_json(content))
    digest = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ArtifactError, match="which is not a plain file name"):
        fetch(str(shelf / VERSION), digest, tmp_path / "brought" / "model")
    assert list((tmp_path / "brought").iterdir()) == []


KILLED = """
import sys, time
from pathlib import Path
from mlops_course import release
copy = release._copy
def slow(*arguments):
    copy(*arguments)
    print("copied", flush=True)
    time.sleep(0.2)
release._copy = slow
release.fetch(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
"""


def test_a_fetch_that_is_killed_leaves_nothing_that_looks_like_a_model(shelf, digest, tmp_path):
    target = tmp_path / "brought" / "model"
    command = [sys.executable, "-c", KILLED, str(shelf / VERSION), digest, str(target)]
    process = subprocess.Popen(command, env=clean_environment(), stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    process.kill()
    process.wait(10)
    process.stdout.close()
    assert not target.exists()
    assert [path.name[:10] for path in target.parent.iterdir()] == [".fetching-"]
    assert fetch(str(shelf / VERSION), digest, target).version == VERSION


def test_a_version_keeps_its_content_in_the_store(store, shelf, digest):
    publish(store, shelf / VERSION, digest)
    path = shelf / VERSION / MANIFEST
    content = json.loads(path.read_bytes())
    content["provenance"]["git_sha"] = "c" * 40
    path.write_bytes(canonical_json(content))
    other = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(VersionError, match=r"version 1\.0\.0 is registered with another digest"):
        publish(store, shelf / VERSION, other)
    assert json.loads(store.read("registry.json").data)["versions"] == {VERSION: digest}


# --- Names of images --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["flight-disruption", "registry.example.com/a:v1", "a@sha256:" + "0" * 64, "localhost:5000/a@sha256:00", "h.x/a@sha1:0"],
)
def test_an_image_is_named_by_host_and_digest_only(text):
    with pytest.raises(ReleaseError, match=r"is not host/name@sha256:…"):
        parse_image(text)


def test_only_this_machine_is_spoken_to_without_tls():
    digest = "sha256:" + "0" * 64
    assert parse_image(f"127.0.0.1:5000/a/b@{digest}").url("manifests", "v1") == "http://127.0.0.1:5000/v2/a/b/manifests/v1"
    assert parse_image(f"ghcr.io/a/b@{digest}").url("blobs", digest) == f"https://ghcr.io/v2/a/b/blobs/{digest}"


def test_an_image_registry_that_does_not_answer_is_told(unused_port):
    image = f"127.0.0.1:{unused_port()}/a@sha256:{'0' * 64}"
    with pytest.raises(ReleaseError, match=r"image registry 127\.0\.0\.1:\d+ does not answer \(ConnectError\)"):
        release.check_image(image)


