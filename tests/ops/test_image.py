"""The image: what is in it and what is not, that it repeats, and that it refuses to start half configured."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

import ops.docker
import ops.image
from ops import scan
from ops.__main__ import cli
from ops.docker import DockerError
from ops.image import MIB, Plan, build, labels, layers, own_start

KEY = "k7Qz9-mR2vXw8-Lp4tNb6"  # only here; not a secret
HARDENED = ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
PLANTED = b"-----BEGIN PRIVATE KEY-----\n" + b"MIIEvQIBADANBgkqhkiG9w0BAQEFAASC\n"  # no key, but it looks like one

Entry = tuple[str, int, int, int, str]  # type, mode, user, group, and SHA-256 of the content or where a link leads


def run(image: str, *command: str, options: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in a new container, hardened as in docker-compose.yml."""
    line = ["docker", "run", "--rm", *HARDENED, *(options or []), image, *command]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)


def tree(image: str) -> dict[str, Entry]:
    """Return every file that our Dockerfile put into an image. Times do not count: they are no content."""
    found: dict[str, Entry] = {}
    with scan.own_layers(image) as archives:
        for layer in archives:
            with tarfile.open(fileobj=layer) as archive:
                for member in archive:
                    file = archive.extractfile(member) if member.isfile() else None
                    content = hashlib.sha256(file.read()).hexdigest() if file else member.linkname
                    found[member.name] = (str(member.type), member.mode, member.uid, member.gid, content)
    return found


@pytest.fixture(scope="module")
def files(built_image: str) -> dict[str, Entry]:
    """Return what is in the image on top of its base."""
    return tree(built_image)


@pytest.fixture
def copy_of_project(root: Path, image_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of what the image is built from; builds use it instead of the project."""
    for name in ("Dockerfile", ".dockerignore"):
        shutil.copy(root / name, tmp_path)
    for name in ("service", "mlops_course"):
        shutil.copytree(root / name, tmp_path / name)
    shutil.copytree(image_plan.folder, tmp_path / image_plan.folder.relative_to(root))
    monkeypatch.setattr(ops.docker, "ROOT", tmp_path)
    monkeypatch.setattr(ops.image, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def build_from(
    copy_of_project: Path, image_plan: Plan, root: Path, request: pytest.FixtureRequest
) -> Generator[Callable[..., str]]:
    """Build from the copy: `build_from('--no-cache')`. The image is removed when the test ends."""
    name = f"flight-disruption:{re.sub('[^a-z0-9]', '-', request.node.name.lower())}"

    def make(*options: str) -> str:
        build(replace(image_plan, folder=copy_of_project / image_plan.folder.relative_to(root)), name, *options)
        return name

    yield make
    subprocess.run(["docker", "image", "rm", "--force", name], capture_output=True, check=False)


@pytest.mark.parametrize("recipe", ["Dockerfile", "ops/checks/Dockerfile"])
def test_hadolint_has_nothing_to_say(root: Path, recipe: str) -> None:
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([linter, root / recipe], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_hadolint_would_say_something(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN pip install numpy\n")
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([linter, tmp_path / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "DL3006" in done.stdout


def test_the_image_is_at_most_150_mib_larger_than_its_base(built_image: str) -> None:
    made_by = [line for line, _ in layers(built_image)]
    own = [size for _, size in layers(built_image)[made_by.index(own_start(made_by)) :]]
    assert 50 * MIB < sum(own) <= 150 * MIB


def test_only_what_serves_is_in_it(files: dict[str, Entry], image_plan: Plan) -> None:
    ours = {name for name in files if name.startswith("app/") and files[name][0] == str(tarfile.REGTYPE)}
    sources = {name for name in ours if "__pycache__" not in name}
    expected = {f"app/mlops_course/{name}.py" for name in ("__init__", "blueprint", "serving", "monitoring")}
    service = {"__init__", "__main__", "app", "health", "logs", "main", "observer", "server"}
    expected |= {f"app/service/{name}.py" for name in service}
    expected |= {f"app/model/{path.name}" for path in image_plan.folder.iterdir()}
    assert sources == expected


@pytest.mark.parametrize(
    "unwanted", ["pip", "setuptools", "wheel", "uv", "pandas", "sklearn", "scipy", "pytest", "evidently", "onnx", "ops"]
)
def test_what_builds_trains_or_tests_is_not_in_it(built_image: str, unwanted: str) -> None:
    done = run(built_image, "python", "-c", f"import {unwanted}")
    assert f"No module named '{unwanted}'" in done.stderr


def test_there_is_no_installer_for_the_base_python_either(built_image: str) -> None:
    show = "import importlib.util as u; print([n for n in ('pip', 'setuptools', 'ensurepip') if u.find_spec(n)])"
    done = run(built_image, "/usr/local/bin/python", "-c", show)
    assert done.stdout.strip() == "[]"


def test_no_tests_notebooks_or_caches(files: dict[str, Entry]) -> None:
    unwanted = re.compile(r"(^|/)(tests?|\.cache|\.git)/|\.(ipynb|whl|pyi|h)$")
    assert [name for name in files if unwanted.search(name)] == []


def test_nobody_may_change_its_files(files: dict[str, Entry]) -> None:
    writable = [name for name, entry in files.items() if entry[0] != str(tarfile.SYMTYPE) and entry[1] & 0o022]
    assert writable == []
    assert {entry[2:4] for entry in files.values()} == {(0, 0)}


def test_every_module_is_compiled_and_the_compiled_files_carry_no_time(built_image: str) -> None:
    code = """
import importlib.util, pathlib
for path in [*pathlib.Path('/app').rglob('*.py'), *pathlib.Path('/opt/venv/lib').rglob('*.py')]:
    compiled = pathlib.Path(importlib.util.cache_from_source(path))
    if not compiled.exists() or compiled.read_bytes()[4:8] != bytes([1, 0, 0, 0]):
        print(path)
"""
    assert run(built_image, "python", "-c", code).stdout == ""


def test_two_builds_of_one_commit_have_the_same_files(
    files: dict[str, Entry], copy_of_project: Path, build_from: Callable[..., str]
) -> None:
    """The second build starts from a copy with other modes and times, and from no cache."""
    for path in copy_of_project.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    assert tree(build_from("--no-cache")) == files


def test_the_labels_say_what_it_is(built_image: str, image_plan: Plan) -> None:
    found = labels(built_image)
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", found.pop("created"))
    assert found == {
        "revision": image_plan.revision,
        "version": image_plan.service,
        "model": image_plan.model,
        "digest": image_plan.digest,
    }


def test_a_model_that_is_not_the_named_one_cannot_be_built(
    copy_of_project: Path, build_from: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    manifest = next(copy_of_project.rglob("model.onnx")).parent / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"threshold": 0.', '"threshold": 0.1', 1))
    with pytest.raises(DockerError):
        build_from()
    assert "MODEL_DIGEST is wrong" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("given", "named"),
    [({}, ["API_KEY", "MODEL_DIGEST"]), ({"API_KEY": KEY}, ["MODEL_DIGEST"]), ({"MODEL_DIGEST": ""}, ["API_KEY"])],
    ids=["nothing", "key only", "digest only"],
)
def test_in_production_it_refuses_to_start_without_digest_or_key(
    built_image: str, image_plan: Plan, given: dict[str, str], named: list[str]
) -> None:
    values = {name: value or image_plan.digest for name, value in given.items()}
    options = [text for name, value in values.items() for text in ("--env", f"{name}={value}")]
    done = run(built_image, options=options)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()[1:]
    assert sorted(line.split(":")[0] for line in lines) == named
    assert all("is missing" in line for line in lines)
    assert KEY not in done.stderr


def test_it_runs_as_nobody_and_cannot_write(built_image: str) -> None:
    show = "import os; print(os.getuid(), os.getgid()); open('/app/service/x.py', 'w')"
    done = run(built_image, "python", "-c", show)
    assert done.stdout.strip() == "10001 10001"
    assert "Error" in done.stderr


def test_the_model_runtime_keeps_no_record_of_its_use(built_image: str) -> None:
    """ONNX Runtime writes one below the home folder, to send it away. Here it has a place to write, and does not."""
    code = (
        "from pathlib import Path; from mlops_course.serving import load_model; load_model(Path('model'), None); "
        "print([path.name for path in Path('/tmp').rglob('*')])"
    )
    options = ["--tmpfs", "/tmp:mode=1777", "--env", "HOME=/tmp"]  # noqa: S108 - inside the container
    assert run(built_image, "python", "-c", code, options=options).stdout.strip() == "[]"
    on = run(built_image, "python", "-c", code, options=[*options, "--env", "ORT_DISABLE_TELEMETRY="])
    assert "onnxruntime.db" in on.stdout


def test_without_a_service_the_health_check_fails(built_image: str) -> None:
    assert run(built_image, "python", "-m", "service.health").returncode == 1


def test_planted_secrets_do_not_get_in(copy_of_project: Path, build_from: Callable[..., str], monkeypatch) -> None:
    """An .env file and keys, at the top and inside the folders that are copied, and the key of the environment."""
    monkeypatch.setenv("API_KEY", KEY)
    for place in (".", "service", "mlops_course"):
        (copy_of_project / place / ".env").write_text(f"API_KEY={KEY}\n")
        (copy_of_project / place / "server.key").write_bytes(PLANTED)
        (copy_of_project / place / "id.pem").write_bytes(PLANTED)
    (copy_of_project / ".secrets").mkdir()
    (copy_of_project / ".secrets" / "API_KEY").write_text(KEY)
    assert scan.findings(build_from()) == []


def test_the_scan_sees_a_secret_in_a_layer_even_if_it_was_deleted_later(
    copy_of_project: Path, build_from: Callable[..., str]
) -> None:
    (copy_of_project / "service" / "note.py").write_bytes(PLANTED)
    dockerfile = copy_of_project / "Dockerfile"
    dockerfile.write_text(
        dockerfile.read_text()
        .replace(
            "USER 10001", "COPY service/note.py notes/id.pem\nRUN rm -rf notes\nENV DB_PASSWORD=hunter22\nUSER 10001"
        )
        .replace("compileall -q --invalidation-mode unchecked-hash .", "compileall -q model")
    )
    found = scan.findings(build_from())
    assert "app/notes/id.pem: a file of this name often holds a secret" in found
    assert "app/notes/id.pem: holds a private key" in found
    assert "app/service/note.py: holds a private key" in found
    assert "the image's configuration: holds a value named like a secret" in found
    assert not any("MIIEv" in line or "hunter22" in line for line in found)


def test_the_scan_command(built_image: str) -> None:
    done = CliRunner().invoke(cli, ["scan", built_image])
    assert (done.exit_code, done.stdout) == (0, f"{built_image}: no secret found\n")
    absent = CliRunner().invoke(cli, ["scan", "flight-disruption:absent"])
    assert absent.exit_code == 1
    assert "there is no image flight-disruption:absent" in absent.output


def test_the_checks_image_is_the_services_with_little_on_top(built_image: str, checks_image: str) -> None:
    below, whole = layers(built_image), layers(checks_image)
    assert whole[: len(below)] == below
    assert 0 < sum(size for _, size in whole[len(below) :]) < 5 * MIB
    assert labels(checks_image) == labels(built_image)
    show = "import os, sys, httpx, ops.synthetic; print(os.getuid(), 'onnx' in sys.modules)"
    done = run(checks_image, "python", "-c", show)
    assert done.stdout.split() == ["10001", "False"], done.stderr
    assert scan.findings(checks_image) == []


def test_the_checks_image_says_when_nobody_answers(checks_image: str) -> None:
    done = run(checks_image, "python", "-m", "ops.synthetic", "--url", "http://127.0.0.1:9")
    assert done.returncode == 1
    assert json.loads(done.stdout)["failed"] == {"probabilities": "no answer (ConnectError)"}


def test_checks_belong_to_an_image_by_name_and_tag() -> None:
    assert ops.image.checks_of("flight-disruption:sha-1") == "flight-disruption-checks:sha-1"
    assert ops.image.checks_of("host:5000/a/flights:v1.0.0") == "host:5000/a/flights-checks:v1.0.0"
    assert ops.image.checks_of("host:5000/flights") == "host:5000/flights-checks:latest"


@pytest.fixture
def repository(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a small repository with one commit, which the command takes for the project."""
    for line in ("init -q", "config user.email a@example.org", "config user.name a", "commit -q --allow-empty -m one"):
        subprocess.run(["git", *line.split()], cwd=tmp_path, check=True)
    monkeypatch.setattr(ops.image, "ROOT", tmp_path)
    return tmp_path


def test_the_revision_tells_uncommitted_changes(repository: Path) -> None:
    clean = ops.image.revision()
    assert re.fullmatch("[0-9a-f]{40}", clean)
    (repository / "new.txt").write_text("x")
    assert ops.image.revision() == clean + "-dirty"


def test_without_a_commit_or_a_model_the_command_says_so(repository: Path, tmp_path: Path, monkeypatch) -> None:
    done = CliRunner().invoke(cli, ["image", "--artifacts", str(tmp_path)])
    assert done.exit_code == 1
    assert "run `make train` first" in done.output
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nothing"))
    with pytest.raises(Exception, match="an image is named after a commit"):
        ops.image.revision()


def test_an_unknown_model_is_refused_with_the_known_ones(artifacts_root: Path) -> None:
    done = CliRunner().invoke(cli, ["image", "--model", "9.9.9", "--artifacts", str(artifacts_root)])
    assert done.exit_code == 1
    assert "model 9.9.9 is not registered" in done.output
    assert "1.0.0" in done.output


def test_a_tag_names_the_model_if_it_was_chosen(artifacts_root: Path) -> None:
    assert re.fullmatch(r"flight-disruption:sha-[0-9a-f]{40}(-dirty)?", ops.image.plan(artifacts_root, None).tag)
    assert ops.image.plan(artifacts_root, "1.0.0").tag.endswith("-model-1.0.0")


def test_without_docker_the_commands_say_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = CliRunner().invoke(cli, ["up"])
    assert done.exit_code == 1
    assert "there is no `docker` command; install" in done.output


def test_an_engine_that_does_not_answer_is_told(engine: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
    done = CliRunner().invoke(cli, ["up"])
    assert done.exit_code == 1
    assert "no Docker engine answers; start it" in done.output


def test_the_arguments_of_the_build_hold_no_secret(root: Path) -> None:
    """Build arguments stay in the history for ever."""
    arguments = re.findall(r"^ARG (\w+)", (root / "Dockerfile").read_text(), re.MULTILINE)
    allowed = {"PYTHON_IMAGE", "MODEL", "MODEL_DIGEST", "MODEL_VERSION", "GIT_SHA", "CREATED", "SERVICE_VERSION"}
    assert set(arguments) == allowed


def test_the_report_names_every_share(built_image: str) -> None:
    lines = ops.image.report(built_image).splitlines()
    sizes = [float(line.split()[0]) for line in lines[1:-1]]
    assert len(sizes) == 5
    assert abs(sum(sizes) - float(lines[-1].split()[0])) < 0.5
    inspected = json.loads(ops.docker.docker("image", "inspect", "--format", "{{.Size}}", built_image))
    assert abs(inspected / MIB - sum(sizes)) < 1
