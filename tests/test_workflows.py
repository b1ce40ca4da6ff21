"""The workflows of GitHub: they call targets that exist, may do little, and strangers get no secret."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from .test_house import makefile_targets

FOLDER = Path(__file__).resolve().parent.parent / ".github" / "workflows"
FILES = sorted(FOLDER.glob("*.y*ml"))
MAKE = re.compile(r"""make ([a-z][a-z-]*)((?: [A-Z]+=(?:[\w./-]+|"\$[A-Z_]+"))*)""")
PINNED = re.compile(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}")

Job = dict[str, Any]


def load(path: Path) -> dict[str, Any]:
    """Return a workflow. YAML reads the key `on` as true."""
    found: dict[str | bool, Any] = yaml.safe_load(path.read_text())
    return {"on" if key is True else str(key): value for key, value in found.items()}


def jobs() -> list[tuple[str, dict[str, Any], Job]]:
    """Return (name, workflow, job) of every job."""
    return [
        (f"{path.stem}/{name}", workflow, job)
        for path in FILES
        for workflow in [load(path)]
        for name, job in workflow["jobs"].items()
    ]


def for_strangers(workflow: dict[str, Any], job: Job) -> bool:
    """Whether a job runs for a pull request, which may come from a fork."""
    return "pull_request" in workflow["on"] and "github.event_name == 'push'" not in job.get("if", "")


ALL = [pytest.param(workflow, job, id=name) for name, workflow, job in jobs()]


def test_there_are_the_jobs_that_these_rules_are_about() -> None:
    names = [name for name, _, _ in jobs()]
    assert names == ["ci/test", "ci/image", "ci/audit", "ci/green", "ci/publish", "release/move"]
    assert [name for name, workflow, job in jobs() if for_strangers(workflow, job)] == [*names[:2], "ci/green"]


@pytest.mark.parametrize(("workflow", "job"), ALL)
def test_every_step_is_a_pinned_action_or_a_target_that_exists(workflow: dict[str, Any], job: Job, root: Path) -> None:
    targets = makefile_targets(root)
    for step in job["steps"]:
        if "uses" in step:
            assert PINNED.fullmatch(step["uses"]), step["uses"]
        elif step["run"] != "exit 1":
            call = MAKE.fullmatch(step["run"])
            assert call is not None, step["run"]
            assert call[1] in targets


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_pin_names_its_version_and_one_action_has_one_pin(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if "uses:" in line]
    assert [line for line in lines if not re.search(r"uses: \S+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line)] == []
    pins = {re.sub(r".*uses: ", "", line) for one in FILES for line in one.read_text().splitlines() if "uses:" in line}
    assert len({pin.split("@")[0] for pin in pins}) == len(pins)


@pytest.mark.parametrize(("workflow", "job"), ALL)
def test_permissions_and_time_are_limited(workflow: dict[str, Any], job: Job) -> None:
    assert workflow["permissions"] == {}
    assert 0 < job["timeout-minutes"] <= 60
    assert job["permissions"].get("contents", "read") == "read"
    if for_strangers(workflow, job):
        assert job["permissions"] in ({}, {"contents": "read"})


@pytest.mark.parametrize(("workflow", "job"), ALL)
def test_no_stranger_gets_a_secret(workflow: dict[str, Any], job: Job) -> None:
    assert not {"pull_request_target", "workflow_run", "issue_comment"} & set(workflow["on"])
    if for_strangers(workflow, job):
        assert not re.search(r"secrets|github\.token|environment", yaml.safe_dump(job))
        # Nor is the token of the checkout left where the code of the pull request could read it.
        checkouts = [step for step in job["steps"] if "actions/checkout" in step.get("uses", "")]
        assert all(step["with"]["persist-credentials"] is False for step in checkouts)


@pytest.mark.parametrize(("workflow", "job"), ALL)
def test_what_somebody_typed_is_never_part_of_a_command(workflow: dict[str, Any], job: Job) -> None:
    assert [step["run"] for step in job["steps"] if "${{" in step.get("run", "")] == []


def test_one_required_check_fails_unless_all_before_it_passed() -> None:
    """A job that is skipped counts as passed, so it must always run, and compare every result with success."""
    ci = load(FOLDER / "ci.yml")["jobs"]
    green = ci["green"]
    needed = {name for name, job in ci.items() if for_strangers(load(FOLDER / "ci.yml"), job)} - {"green"}
    assert set(green["needs"]) == needed
    assert green["if"] == "always()"
    (step,) = green["steps"]
    assert step["run"] == "exit 1"
    assert sorted(step["if"].split(" || ")) == sorted(f"needs.{name}.result != 'success'" for name in needed)


def test_only_main_publishes_and_only_what_is_green() -> None:
    ci = load(FOLDER / "ci.yml")
    publish = ci["jobs"]["publish"]
    assert ci["on"]["push"] == {"branches": ["main"]}
    assert publish["if"] == "github.event_name == 'push' && github.ref == 'refs/heads/main'"
    assert set(publish["needs"]) == {"green", "audit"}
    others = [job for name, job in ci["jobs"].items() if name != "publish"]
    assert not any("write" in job["permissions"].values() for job in others)


def test_a_release_waits_for_approval_and_is_never_interrupted() -> None:
    workflow = load(FOLDER / "release.yml")
    (job,) = workflow["jobs"].values()
    assert list(workflow["on"]) == ["workflow_dispatch"]
    assert job["environment"] == "${{ inputs.channel }}"
    assert workflow["on"]["workflow_dispatch"]["inputs"]["channel"]["options"] == ["staging", "prod"]
    assert job["if"] == "github.ref == 'refs/heads/main'"
    assert workflow["concurrency"] == {"group": "release", "cancel-in-progress": False}


def lint(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one of the linters of `make check`."""
    command = [str(Path(sys.executable).parent / tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_linters_of_make_check_would_say_something(tmp_path: Path) -> None:
    text = (FOLDER / "ci.yml").read_text()
    bad = tmp_path / "bad.yml"
    bad.write_text(text.replace("runs-on:", "runs-in:", 1))
    assert lint("check-jsonschema", "--builtin-schema", "vendor.github-workflows", str(bad)).returncode == 1
    bad.write_text(re.sub(r"@[0-9a-f]{40} # v[\d.]+", "@main", text, count=1))
    done = lint("zizmor", "--offline", "--persona", "pedantic", str(bad))
    assert done.returncode != 0
    assert "unpinned-uses" in done.stdout
