"""The stack as `make up` starts it: built images, a door, limits. It is used, broken, healed and removed.

Everything runs under a project name and at ports of its own, so that a stack somebody uses is not touched.
"""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from mlops_course.release import fingerprint_of
from mlops_course.serving import EXAMPLE, PROBLEM_TYPE, Settings, config_fingerprint
from ops.alert_rules import configure
from ops.compose import make_key

HEAL_S = 60


@dataclass
class Stack:
    """One running Compose project."""

    project: str
    image: str
    environment: dict[str, str]
    artifacts: Path
    printed: str = ""
    complained: str = ""
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.environment['DOOR_PORT']}"

    def ops(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run one of our commands on this project."""
        line = [sys.executable, "-m", "ops", *arguments]
        return subprocess.run(line, env=self.environment, capture_output=True, text=True, check=False, timeout=300)

    def docker(self, *arguments: str) -> str:
        """Run docker and return what it printed."""
        line = ["docker", *arguments]
        return subprocess.run(
            line, env=self.environment, capture_output=True, text=True, check=True, timeout=120
        ).stdout

    def container(self, name: str) -> dict[str, Any]:
        """Return what the engine knows about one container."""
        found: dict[str, Any] = json.loads(self.docker("inspect", f"{self.project}-{name}-1"))[0]
        return found

    def python(self, name: str, code: str) -> subprocess.CompletedProcess[str]:
        """Run Python inside a container."""
        line = ["docker", "exec", f"{self.project}-{name}-1", "python", "-c", code]
        return subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)

    def predict(self, client: httpx.Client | None = None) -> httpx.Response:
        """Ask for one prediction, through the door."""
        post = client.post if client else httpx.post
        return post(self.url + "/v1/predict", json=EXAMPLE, headers=self.headers, timeout=20)

    def log(self, name: str = "service") -> list[dict[str, Any]]:
        """Return a container's log."""
        lines = self.docker("logs", f"{self.project}-{name}-1").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]


def left_over(project: str) -> list[str]:
    """Return what the engine still has of a project."""
    own = ["--filter", f"label=com.docker.compose.project={project}", "--quiet"]
    found = []
    for kind in (["ps", "--all"], ["network", "ls"], ["volume", "ls"]):
        done = subprocess.run(["docker", *kind, *own], capture_output=True, text=True, check=True)
        found += done.stdout.split()
    return found


@pytest.fixture(scope="module")
def make_stack(
    built_image: str,
    checks_image: str,
    artifacts_root: Path,
    tmp_path_factory: pytest.TempPathFactory,
    unused_port: Callable[[], int],
) -> Generator[Callable[..., Stack]]:
    """Prepare stacks; `stack.ops('up')` starts one. All are removed in the end, whatever happened."""
    made: list[Stack] = []

    def make(name: str) -> Stack:
        keep = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME", "DOCKER_HOST", "TMPDIR")}
        own = {
            "COMPOSE_PROJECT_NAME": f"flights-{name}-{os.getpid()}",
            **{
                name: str(unused_port())
                for name in ("DOOR_PORT", "PORT", "PROMETHEUS_PORT", "ALERTMANAGER_PORT", "GRAFANA_PORT")
            },
            # One round at the start; after it the tests have the service to themselves.
            "CHECKS_EVERY_S": "3600",
        }
        secrets = tmp_path_factory.mktemp(name) / "secrets"
        for variable, file in (
            ("API_KEY_FILE", "API_KEY"),
            ("ALERT_WEBHOOK_FILE", "ALERT_WEBHOOK_URL"),
            ("GRAFANA_PASSWORD_FILE", "GRAFANA_PASSWORD"),
        ):
            own[variable] = str(secrets / file)
        made.append(Stack(own["COMPOSE_PROJECT_NAME"], built_image, keep | own, artifacts_root))
        return made[-1]

    yield make
    for stack in made:
        stack.ops("down", "--volumes")


@pytest.fixture(scope="module")
def stack(make_stack: Callable[..., Stack]) -> Stack:
    """Return a running stack, as `make up` starts it."""
    made = make_stack("prod")
    done = made.ops("up", "--image", made.image, "--artifacts", str(made.artifacts))
    assert done.returncode == 0, done.stdout + done.stderr
    made.printed, made.complained = done.stdout, done.stderr
    made.headers = {"X-API-Key": Path(made.environment["API_KEY_FILE"]).read_text().strip()}
    return made


def need_image(stack: Stack, name: str) -> None:
    """Skip where an image of somebody else's is not here and could not be pulled; `make up` has said so."""
    services = yaml.safe_load(stack.docker("compose", "config", "--no-interpolate"))["services"]
    image = services[name]["image"].split(":-")[1].rstrip("}")
    if subprocess.run(["docker", "image", "inspect", image], capture_output=True, check=False).returncode:
        assert f"the image {image} is not here and cannot be pulled" in stack.complained
        pytest.skip(f"needs the image {image}, which is not here and cannot be pulled")


def wait_until_healed(stack: Stack) -> None:
    """Wait until predictions are answered again."""
    end = time.monotonic() + HEAL_S
    while time.monotonic() < end:
        if stack.predict().status_code == 200:
            return
        time.sleep(0.2)
    raise AssertionError(stack.docker("logs", "--tail", "20", f"{stack.project}-service-1"))


@pytest.mark.parametrize("name", ["API_KEY", "ALERT_WEBHOOK_URL", "GRAFANA_PASSWORD"])
def test_secrets_are_files_that_nobody_elses_folder_shows(stack: Stack, name: str) -> None:
    file = Path(stack.environment["API_KEY_FILE"]).with_name(name)
    assert stat.S_IMODE(file.stat().st_mode) == 0o444
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_up_prints_the_urls_and_never_the_key(stack: Stack) -> None:
    assert f"{stack.url}/v1/predict" in stack.printed
    assert "as prod" in stack.printed
    assert stack.headers["X-API-Key"] not in stack.printed


def test_both_containers_are_healthy(stack: Stack) -> None:
    assert [stack.container(name)["State"]["Health"]["Status"] for name in ("service", "envoy")] == ["healthy"] * 2


def test_the_smoke_test_finds_the_door(stack: Stack) -> None:
    """As `make smoke` after `make up`: nothing listens at PORT, so Envoy is asked."""
    environment = stack.environment | {"API_KEY": stack.headers["X-API-Key"]}
    line = [sys.executable, "-m", "ops", "smoke"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"\nok: {stack.url} serves " in done.stdout


def test_the_key_is_needed(stack: Stack) -> None:
    answer = httpx.post(stack.url + "/v1/predict", json=EXAMPLE)
    assert (answer.status_code, answer.json()["type"]) == (401, PROBLEM_TYPE + "unauthorised")
    assert stack.predict().status_code == 200


def published(stack: Stack, name: str) -> dict[str, set[str]]:
    """Return the ports of a container that are reachable from outside of it, and at which address."""
    ports = stack.container(name)["NetworkSettings"]["Ports"]
    return {port: {one["HostIp"] for one in places} for port, places in ports.items() if places}


def test_only_the_door_is_published_and_only_here(stack: Stack) -> None:
    assert published(stack, "envoy") == {"8080/tcp": {"127.0.0.1"}}
    assert [published(stack, name) for name in ("service", "checks", "inbox")] == [{}, {}, {}]


@pytest.mark.parametrize("path", ["/metrics", "/docs", "/openapi.json"])
def test_what_is_for_operators_does_not_pass(stack: Stack, path: str) -> None:
    assert httpx.get(stack.url + path).json()["type"] == PROBLEM_TYPE + "not-found"


def test_envoys_administration_is_for_its_own_container_only(stack: Stack) -> None:
    done = stack.python("service", "import socket; socket.create_connection(('envoy', 9901), timeout=3)")
    assert "ConnectionRefusedError" in done.stderr
    assert (
        stack.python("service", "import socket; socket.create_connection(('envoy', 8080), timeout=3)").returncode == 0
    )


def test_statistics_are_for_the_inner_network_only(stack: Stack) -> None:
    """One page of Envoy's administration, to be read; nothing else of it, and nothing through the door."""

    def asked(method: str, path: str) -> str:
        code = (
            "import http.client as h; c = h.HTTPConnection('envoy', 9902, timeout=3); "
            f"c.request({method!r}, {path!r}); a = c.getresponse(); print(a.status, len(a.read()))"
        )
        return stack.python("service", code).stdout.split(" ")[0]

    assert asked("GET", "/stats/prometheus") == "200"
    assert [asked("GET", path) for path in ("/", "/config_dump", "/stats", "/stats/prometheus/..")] == ["404"] * 4
    assert [asked("POST", path) for path in ("/stats/prometheus", "/quitquitquit")] == ["404"] * 2
    assert httpx.get(stack.url + "/stats/prometheus").status_code == 404


def prometheus(stack: Stack, path: str) -> Any:
    """Ask Prometheus at its published port."""
    need_image(stack, "prometheus")
    answer = httpx.get(f"http://127.0.0.1:{stack.environment['PROMETHEUS_PORT']}/api/v1/{path}").json()
    assert answer["status"] == "success", answer
    return answer["data"]


def test_prometheus_reaches_everything_that_is_to_be_watched(stack: Stack) -> None:
    expected = {"service", "envoy", "checks", "prometheus", "alertmanager"}
    end = time.monotonic() + 60
    while True:
        found = prometheus(stack, "targets")["activeTargets"]
        if {one["labels"]["job"] for one in found if one["health"] == "up"} == expected:
            break
        assert time.monotonic() < end, found
        time.sleep(0.5)
    assert published(stack, "prometheus") == {"9090/tcp": {"127.0.0.1"}}
    assert f"http://127.0.0.1:{stack.environment['PROMETHEUS_PORT']} " in stack.printed


def test_prometheus_asks_for_the_quality_while_it_is_served(
    stack: Stack, root: Path, tmp_path: Path, unused_port: Callable[[], int]
) -> None:
    """The judge runs on this machine, which has what training needs; its target comes and goes with it."""

    def asked(wanted: list[str]) -> None:
        end = time.monotonic() + 60
        while True:
            found = prometheus(stack, "targets")["activeTargets"]
            if (seen := [one["health"] for one in found if one["labels"]["job"] == "quality"]) == wanted:
                return
            assert time.monotonic() < end, found
            assert judge.poll() is None or not wanted, (seen, judge.stderr)
            time.sleep(0.5)

    line = [sys.executable, "-m", "ops", "quality", "--serve", str(unused_port()), "--compose"]
    judge = subprocess.Popen([*line, "--store", str(tmp_path / "labels.sqlite")], env=stack.environment, text=True)
    try:
        asked(["up"])
    finally:
        judge.terminate()
        assert judge.wait(30) == 0
    assert not (root / "ops" / "prometheus" / "targets" / "quality.yml").exists()
    asked([])


def test_samples_are_kept_as_long_as_the_objective_and_not_without_end(stack: Stack) -> None:
    flags = prometheus(stack, "status/flags")
    assert (flags["storage.tsdb.retention.time"], flags["storage.tsdb.retention.size"]) == ("5w", "4GiB")
    assert prometheus(stack, "status/runtimeinfo")["storageRetention"] == "5w or 4GiB"
    assert (flags["web.enable-admin-api"], flags["web.enable-lifecycle"]) == ("false", "false")


def test_prometheus_has_the_committed_rules_and_nothing_is_wrong_with_them(stack: Stack, root: Path) -> None:
    found = prometheus(stack, "rules")["groups"]
    files = [yaml.safe_load(file.read_text()) for file in (root / "ops" / "prometheus" / "rules").glob("*.yml")]
    assert {one["name"] for one in found} == {group["name"] for file in files for group in file["groups"]}
    assert {rule["health"] for group in found for rule in group["rules"]} <= {"ok", "unknown"}


def test_alertmanager_knows_its_receiver_from_a_file(stack: Stack) -> None:
    need_image(stack, "alertmanager")
    found = stack.container("alertmanager")
    url = Path(stack.environment["ALERT_WEBHOOK_FILE"]).read_text().strip()
    assert url == "http://inbox:8080/"
    assert url not in json.dumps([found["Config"]["Env"], found["Config"]["Cmd"]])
    assert published(stack, "alertmanager") == {"9093/tcp": {"127.0.0.1"}}
    status = httpx.get(f"http://127.0.0.1:{stack.environment['ALERTMANAGER_PORT']}/api/v2/status").json()
    assert "url_file: /run/secrets/ALERT_WEBHOOK_URL" in status["config"]["original"]
    assert url not in status["config"]["original"]


def test_without_grafana_everything_else_runs_and_one_line_says_so(stack: Stack) -> None:
    password = Path(stack.environment["GRAFANA_PASSWORD_FILE"]).read_text().strip()
    assert len(password) >= 40
    assert password not in stack.printed + stack.complained
    present = subprocess.run(["docker", "image", "inspect", "grafana/grafana:13.1.1"], capture_output=True, check=False)
    if present.returncode == 0:
        assert f"http://127.0.0.1:{stack.environment['GRAFANA_PORT']} " in stack.printed
        return
    lines = [line for line in stack.complained.splitlines() if line.startswith("No dashboards: ")]
    assert len(lines) == 1
    assert lines[0].startswith("No dashboards: the image grafana/grafana:13.1.1 is not here and cannot be pulled (")
    assert "grafana " not in stack.printed


def test_the_service_has_no_way_out(stack: Stack) -> None:
    """Its only network is internal: the engine forwards nothing from there to other networks."""
    networks = list(stack.container("service")["NetworkSettings"]["Networks"])
    assert networks == [f"{stack.project}_back"]
    assert stack.docker("network", "inspect", "--format", "{{.Internal}}", *networks).strip() == "true"


MEMORY = {"service": 256, "envoy": 256, "checks": 256, "inbox": 64, "prometheus": 512, "alertmanager": 128}


@pytest.mark.parametrize("name", sorted(MEMORY))
def test_containers_are_hardened_and_limited(stack: Stack, name: str) -> None:
    if name in ("prometheus", "alertmanager"):
        need_image(stack, name)
    found = stack.container(name)
    host = found["HostConfig"]
    assert host["ReadonlyRootfs"]
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    assert not host["Privileged"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert (host["NanoCpus"], host["Memory"], host["PidsLimit"]) == (10**9, MEMORY[name] * 1024 * 1024, 64)
    assert host["RestartPolicy"]["Name"] == "unless-stopped"
    assert host["LogConfig"]["Config"]["max-size"] == "10m"
    assert int(found["Config"]["User"].split(":")[0]) > 0


def test_the_key_is_a_file_and_no_variable(stack: Stack) -> None:
    values = stack.container("service")["Config"]["Env"]
    assert not any(stack.headers["X-API-Key"] in value for value in values)
    shown = stack.python(
        "service", "import os; print(len(open('/run/secrets/API_KEY').read().strip()), 'API_KEY' in os.environ)"
    )
    assert shown.stdout.split() == [str(len(stack.headers["X-API-Key"])), "False"]
    key_file = Path(stack.environment["API_KEY_FILE"])
    assert stat.S_IMODE(key_file.parent.stat().st_mode) == 0o700


def test_the_model_must_have_the_registrys_digest(stack: Stack) -> None:
    model = httpx.get(stack.url + "/v1/model", headers=stack.headers).json()
    given = [value for value in stack.container("service")["Config"]["Env"] if value.startswith("MODEL_DIGEST=")]
    assert given == [f"MODEL_DIGEST={model['digest']}"]


def test_every_line_of_the_log_names_the_commit(stack: Stack) -> None:
    revision = stack.docker(
        "image", "inspect", "--format", '{{index .Config.Labels "org.opencontainers.image.revision"}}', stack.image
    ).strip()
    assert {line["git_sha"] for line in stack.log()} == {revision}


def test_a_killed_service_is_replaced_and_the_door_says_so_meanwhile(stack: Stack) -> None:
    """SIGKILL from outside the container, as the kernel does when memory is short; inside, process 1 is immune."""
    before = stack.container("service")
    seen: list[httpx.Response] = []
    done = threading.Event()

    def client() -> None:
        while not done.is_set():
            seen.append(stack.predict())

    asking = threading.Thread(target=client)
    asking.start()
    kill = ["python", "-c", f"import os; os.kill({before['State']['Pid']}, 9)"]
    stack.docker("run", "--rm", "--pid", "host", "--user", "0", "--cap-add", "KILL", stack.image, *kill)
    end = time.monotonic() + HEAL_S
    while stack.container("service")["RestartCount"] == before["RestartCount"] and time.monotonic() < end:
        time.sleep(0.1)
    wait_until_healed(stack)
    done.set()
    asking.join(30)
    assert {answer.status_code for answer in seen} == {200, 503}
    kinds = {answer.json()["type"].removeprefix(PROBLEM_TYPE) for answer in seen if answer.status_code == 503}
    assert "unavailable" in kinds
    assert kinds <= {"unavailable", "not-ready"}
    assert stack.container("service")["RestartCount"] == before["RestartCount"] + 1


def test_a_stop_under_load_loses_nothing(stack: Stack) -> None:
    """Each request is answered: by the service, or by the door once the service is gone. None is cut off."""
    wait_until_healed(stack)
    counted = len(answered(stack))
    outcomes: list[int] = []
    broken: list[str] = []
    done = threading.Event()

    def client() -> None:
        with httpx.Client() as session:
            while not done.is_set():
                try:
                    outcomes.append(stack.predict(session).status_code)
                except httpx.TransportError as error:
                    broken.append(repr(error))

    clients = [threading.Thread(target=client) for _ in range(4)]
    for one in clients:
        one.start()
    time.sleep(1)
    stack.docker("compose", "stop", "service")
    time.sleep(0.5)
    done.set()
    for one in clients:
        one.join(30)
    assert broken == []
    assert set(outcomes) == {200, 503}
    assert len(answered(stack)) - counted == outcomes.count(200)
    assert stack.container("service")["State"]["ExitCode"] == 0
    stack.docker("compose", "start", "service")
    wait_until_healed(stack)


def answered(stack: Stack) -> list[dict[str, Any]]:
    """Return the log lines of predictions that were answered."""
    return [line for line in stack.log() if line.get("route") == "/v1/predict" and line["status"] == 200]


def rounds(stack: Stack, *, ok: bool, after: int = 0) -> list[dict[str, Any]]:
    """Wait for a round of the checks with this outcome, and return all rounds after the first `after`."""
    end = time.monotonic() + HEAL_S
    while time.monotonic() < end:
        seen = stack.log("checks")[after:]
        if any(one["ok"] is ok for one in seen):
            return seen
        time.sleep(0.2)
    raise AssertionError(stack.docker("logs", f"{stack.project}-checks-1"))


def test_the_schedule_says_what_clients_get(make_stack: Callable[..., Stack]) -> None:
    """Through the door, with the key from its file: it passes, fails while nobody serves, and passes again."""
    watched = make_stack("checks")
    watched.environment["CHECKS_EVERY_S"] = "1"
    # A setting of a release, given as `env $(python -m ops env prod)` would give it.
    watched.environment["THRESHOLD"] = "0.5"
    done = watched.ops("up", "--image", watched.image, "--artifacts", str(watched.artifacts))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Not checked" not in done.stderr
    passed = next(one for one in rounds(watched, ok=True) if one["ok"])
    assert (passed["url"], passed["failed"], passed["checks"]) == ("http://envoy:8080", {}, 4)
    assert passed["latency_ms"]["answers"] == 94
    key = {"X-API-Key": Path(watched.environment["API_KEY_FILE"]).read_text().strip()}
    model = httpx.get(watched.url + "/v1/model", headers=key).json()
    assert model["config"] == fingerprint_of({"THRESHOLD": "0.5"})
    watched.docker("compose", "stop", "service")
    before = len(watched.log("checks"))
    failed = next(one for one in rounds(watched, ok=False, after=before) if not one["ok"])
    assert all(detail.startswith("answered 503, not 200") for detail in failed["failed"].values()), failed
    assert watched.container("checks")["RestartCount"] == 0
    watched.docker("compose", "start", "service")
    rounds(watched, ok=True, after=len(watched.log("checks")))
    assert watched.ops("down", "--volumes").returncode == 0
    assert left_over(watched.project) == []


def test_the_checks_have_no_way_out_and_no_key_in_their_variables(stack: Stack) -> None:
    found = stack.container("checks")
    assert list(found["NetworkSettings"]["Networks"]) == [f"{stack.project}_back"]
    assert not any(stack.headers["X-API-Key"] in value for value in found["Config"]["Env"])


def inbox(stack: Stack, until: Callable[[list[dict[str, Any]]], bool], seconds: float) -> list[dict[str, Any]]:
    """Wait until something holds of the alerts that have arrived, and return them."""
    end = time.monotonic() + seconds
    while not until(found := stack.log("inbox")):
        assert time.monotonic() < end, found
        time.sleep(0.5)
    return found


def test_an_alert_reaches_a_person_and_its_symptoms_do_not(
    make_stack: Callable[..., Stack], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """From the fault to the message: Prometheus, Alertmanager, webhook. Only the windows of the rules are shorter."""
    alerted = make_stack("alerted")
    folder = tmp_path_factory.mktemp("prometheus")
    same = dict.fromkeys(("service", "envoy", "checks", "prometheus", "alertmanager"))
    configure(folder, 240, same, "alertmanager:9093")
    folder.chmod(0o755)
    alerted.environment["PROMETHEUS_CONFIG"] = str(folder)
    done = alerted.ops("up", "--image", alerted.image, "--artifacts", str(alerted.artifacts))
    assert done.returncode == 0, done.stdout + done.stderr
    alerted.complained = done.stderr
    for name in ("prometheus", "alertmanager"):
        need_image(alerted, name)
    alerted.headers = {"X-API-Key": Path(alerted.environment["API_KEY_FILE"]).read_text().strip()}
    stop, spoiled = threading.Event(), threading.Event()

    def client() -> None:
        with httpx.Client() as session:
            while not stop.wait(0.05):
                body = {} if spoiled.is_set() else EXAMPLE
                session.post(alerted.url + "/v1/predict", json=body, headers=alerted.headers, timeout=20)

    asking = threading.Thread(target=client)
    asking.start()
    try:
        time.sleep(10)
        alerted.docker("compose", "stop", "service")
        found = inbox(alerted, lambda seen: any(one["alert"] == "ServiceDown" for one in seen), 90)
        (page,) = (one for one in found if one["alert"] == "ServiceDown")
        assert (page["receiver"], page["severity"], page["status"]) == ("pages", "page", "firing")
        assert page["summary"] == "0 instances of the service answer"
        assert page["runbook"] == "docs/incident_playbook.md#servicedown"
        # The door answers 503, so the budget burns too; that is known and held back.
        api = f"http://127.0.0.1:{alerted.environment['ALERTMANAGER_PORT']}/api/v2/alerts"
        held = {one["labels"]["alertname"]: one["status"]["inhibitedBy"] for one in httpx.get(api).json()}
        assert held["ServiceDown"] == []
        assert held["AvailabilityBudgetBurnsFast"] != []
        alerted.docker("compose", "start", "service")
        spoiled.set()
        found = inbox(
            alerted,
            lambda seen: (
                any((one["alert"], one["status"]) == ("ServiceDown", "resolved") for one in seen)
                and any(one["alert"] == "ValidationFailuresSurge" for one in seen)
            ),
            180,
        )
    finally:
        stop.set()
        asking.join(30)
    ticket = next(one for one in found if one["alert"] == "ValidationFailuresSurge")
    assert (ticket["receiver"], ticket["severity"], ticket["status"]) == ("tickets", "ticket", "firing")
    assert ": missing" in ticket["summary"]
    down = [one["status"] for one in found if one["alert"] == "ServiceDown"]
    assert down[0] == "firing"
    assert down[-1] == "resolved"
    assert alerted.ops("down", "--volumes").returncode == 0


def test_without_the_image_of_the_checks_the_service_runs_all_the_same(make_stack: Callable[..., Stack]) -> None:
    alone = make_stack("alone")
    alone.environment["CHECKS_IMAGE"] = "flight-disruption-checks:absent"
    done = alone.ops("up", "--image", alone.image, "--artifacts", str(alone.artifacts))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Not checked on a schedule: there is no image flight-disruption-checks:absent" in done.stderr
    assert "No inbox for alerts: there is no image flight-disruption-checks:absent" in done.stderr
    assert httpx.get(alone.url + "/ready").status_code == 200
    assert alone.ops("down", "--volumes").returncode == 0


def test_a_service_that_cannot_start_is_reported_with_its_own_words(make_stack: Callable[..., Stack]) -> None:
    broken = make_stack("broken")
    broken.environment["MODEL_DIGEST"] = "sha256:short"
    done = broken.ops("up", "--image", broken.image, "--artifacts", str(broken.artifacts))
    assert done.returncode == 1
    assert "MODEL_DIGEST: should match pattern" in done.stderr
    assert "Traceback" not in done.stderr
    assert broken.ops("down", "--volumes").returncode == 0
    assert left_over(broken.project) == []


def test_a_door_port_that_is_taken_is_named_with_the_fix(make_stack: Callable[..., Stack]) -> None:
    late = make_stack("late")
    with socket.create_server(("127.0.0.1", int(late.environment["DOOR_PORT"]))):
        done = late.ops("up", "--image", late.image, "--artifacts", str(late.artifacts))
    assert done.returncode == 1
    port = late.environment["DOOR_PORT"]
    assert f"Port {port} is taken by another program; choose another: DOOR_PORT=8090 make up" in done.stderr
    assert late.ops("down", "--volumes").returncode == 0


def test_a_channel_without_a_release_starts_nothing(make_stack: Callable[..., Stack], tmp_path: Path) -> None:
    nothing = make_stack("nothing")
    done = nothing.ops("up", "--channel", "prod", "--store", str(tmp_path))
    assert done.returncode == 1
    assert "prod points to nothing yet" in done.stderr
    assert left_over(nothing.project) == []
    both = nothing.ops("up", "--channel", "prod", "--image", nothing.image)
    assert (both.returncode, "leave out --image and --dev" in both.stderr) == (2, True)


def test_in_development_a_change_is_served_without_a_build(make_stack: Callable[..., Stack], root: Path) -> None:
    dev = make_stack("dev")
    done = dev.ops("up", "--dev", "--env", "dev", "--image", dev.image, "--artifacts", str(dev.artifacts))
    assert done.returncode == 0, done.stdout + done.stderr
    assert httpx.get(f"http://127.0.0.1:{dev.environment['PORT']}/docs").status_code == 200

    def loaded() -> int:
        return sum(line["event"] == "model_loaded" for line in dev.log())

    before = loaded()
    (root / "service" / "app.py").touch()  # the content stays as it is
    end = time.monotonic() + HEAL_S
    while loaded() == before and time.monotonic() < end:
        time.sleep(0.2)
    assert loaded() == before + 1
    assert dev.ops("down", "--volumes").returncode == 0
    assert left_over(dev.project) == []


def test_down_leaves_nothing_behind(stack: Stack) -> None:
    """The last test of the stack."""
    assert left_over(stack.project) != []
    done = stack.ops("down", "--volumes")
    assert done.returncode == 0, done.stderr
    assert left_over(stack.project) == []


def test_a_missing_image_is_told_with_the_fix(engine: None, make_stack: Callable[..., Stack]) -> None:
    none = make_stack("none")
    done = none.ops("up", "--image", "flight-disruption:absent")
    assert done.returncode == 1
    assert "there is no image flight-disruption:absent; build it with `make image`" in done.stderr


def test_a_key_is_made_once_and_is_random(tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "API_KEY", tmp_path / "b" / "API_KEY"
    make_key(first)
    make_key(second)
    key = first.read_text()
    make_key(first)
    assert first.read_text() == key != second.read_text()
    assert len(key.strip()) >= 40
    assert stat.S_IMODE(first.parent.stat().st_mode) == 0o700


def test_git_and_the_build_never_take_the_key_in(root: Path) -> None:
    for name in (".secrets/API_KEY", ".env"):
        assert subprocess.run(["git", "check-ignore", "--quiet", name], cwd=root, check=False).returncode == 0


def compose_files(root: Path) -> list[Path]:
    return [root / "docker-compose.yml", root / "docker-compose.dev.yml"]


def test_the_example_names_every_variable_and_no_other(root: Path) -> None:
    text = (root / ".env.example").read_text()
    listed = re.findall(r"^#([A-Z_]+)=", text, re.MULTILINE)
    used = {name for path in compose_files(root) for name in re.findall(r"\$\{([A-Z_]+)", path.read_text())}
    settings = {name.upper() for name in Settings.model_fields}
    assert sorted(listed) == sorted(used | settings)


def test_the_examples_defaults_are_the_real_ones(root: Path) -> None:
    given = dict(re.findall(r"^#([A-Z_]+)=(.*)$", (root / ".env.example").read_text(), re.MULTILINE))
    fields = {name.upper(): value.default for name, value in Settings.model_fields.items()}
    own = {
        name: "" if default is None else f"{default:g}" if isinstance(default, float) else str(default)
        for name, default in fields.items()
    }
    text = "".join(path.read_text() for path in compose_files(root))
    compose = dict(re.findall(r"\$\{([A-Z_]+):-([^}]*)\}", text))
    expected = {**own, **compose, "SERVICE_IMAGE": "flight-disruption:sha-...", "MODEL_DIGEST": "sha256:..."}
    expected["CHECKS_IMAGE"] = "flight-disruption-checks:sha-..."
    assert given == expected


def of_a_release() -> set[str]:
    """Return the settings that change answers: each has another fingerprint with another value."""
    plain = Settings.model_construct()
    numbers = {
        name: field.default for name, field in Settings.model_fields.items() if type(field.default) in (int, float)
    }
    other = {"threshold": 0.9, "log_level": "debug"} | {name: value + 1 for name, value in numbers.items()}
    whole = config_fingerprint(plain)
    return {name.upper() for name in other if config_fingerprint(plain.model_copy(update={name: other[name]})) != whole}


def test_every_setting_of_a_release_reaches_the_container(root: Path) -> None:
    given = yaml.safe_load((root / "docker-compose.yml").read_text())["services"]["service"]["environment"]
    assert {name for name, value in given.items() if value is None} == of_a_release()
    assert {"THRESHOLD", "MAX_BATCH"} <= of_a_release()
    assert not {"LOG_LEVEL", "DRAIN_S", "PORT"} & of_a_release()


@pytest.mark.parametrize("place", ["dev", "staging", "prod"])
def test_the_committed_configuration_is_valid_and_holds_no_secret(root: Path, place: str) -> None:
    lines = (root / "ops" / "config" / f"{place}.env").read_text().splitlines()
    values = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert values["APP_ENV"] == place
    assert not values.keys() & {"API_KEY", "MODEL_DIGEST"}
    assert not values.keys() & of_a_release()
    chosen = Settings.model_validate(
        {name.lower(): value for name, value in values.items()} | {"app_env": "dev"}, strict=False
    )
    grace = yaml.safe_load((root / "docker-compose.yml").read_text())["services"]["service"]["stop_grace_period"]
    assert chosen.drain_s + chosen.stop_s < int(grace.removesuffix("s"))


def test_staging_and_production_differ_in_their_name_only(root: Path) -> None:
    def values(place: str) -> list[str]:
        lines = (root / "ops" / "config" / f"{place}.env").read_text().splitlines()
        return [line for line in lines if not line.startswith(("#", "APP_ENV"))]

    assert values("staging") == values("prod")
