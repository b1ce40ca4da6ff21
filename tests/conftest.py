"""What every test shares: where the project is, and what a skip means in CI."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    import pandas as pd

ROOT = Path(__file__).resolve().parent.parent

# The same examples in every run, and no limit on their time: a slow machine is not a wrong answer.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the folder of the project."""
    return ROOT


@pytest.fixture(scope="session")
def flights() -> pd.DataFrame:
    """Return the whole data set, as the chapters load it. Tests must not change it: copy first."""
    from mlops_course.blueprint import load_dataset

    return load_dataset(ROOT / "chapters" / "data")


@pytest.fixture(scope="session")
def splits(flights: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the rows of train, validation, test and production. Tests must not change them: copy first."""
    from mlops_course.blueprint import split_by_time

    return split_by_time(flights)


@pytest.fixture(scope="session")
def artifacts_root() -> Path:
    """Return the folder of the built artifacts: that of the course run by `make test`, else the learner's own.

    Tests must not change it: copy what has to be changed.
    """
    from mlops_course.blueprint import MODEL_NAME

    for folder in (ROOT / "build" / "test" / "artifacts", ROOT / "artifacts"):
        if (folder / MODEL_NAME / "registry.json").exists():
            return folder
    pytest.fail("no artifacts to test: run make course first")


@pytest.fixture(scope="session")
def unused_port() -> Callable[[], int]:
    """Return a function that finds a port that nothing listens on."""

    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    return find


@pytest.fixture(scope="session")
def course_build() -> Path:
    """Return what the last run of all chapters left: that of `make test`, else that of `make course`."""
    for build in (ROOT / "build" / "test", ROOT / "build"):
        if (build / "course.json").exists():
            return build
    pytest.fail("no executed chapters in build/; run `make course` first")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skip into a failure where REQUIRE_ALL=1: CI has to run every test, or say so."""
    report = yield
    # An expected failure is also reported as skipped, but it did run.
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("REQUIRE_ALL") == "1":
        report.outcome = "failed"
        report.longrepr = f"skipped, but REQUIRE_ALL=1 allows no skip: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a whole file that skips itself."""
    report = yield
    if report.skipped and os.environ.get("REQUIRE_ALL") == "1":
        report.outcome = "failed"
        report.longrepr = f"skipped, but REQUIRE_ALL=1 allows no skip: {report.longrepr}"
    return report


def clean_environment(**variables: str) -> dict[str, str]:
    """Return an environment in which nothing of this shell's configuration reaches the service."""
    keep = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    return {**keep, "PYTHONPATH": str(ROOT), **variables}


@pytest.fixture(scope="session")
def running_service(
    unused_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., AbstractContextManager[str]]:
    """Return a context manager that runs a real `python -m service` with some variables, and gives its address."""

    from mlops_course.release import asking

    @contextmanager
    def run(**variables: str) -> Generator[str]:
        port, log = unused_port(), tmp_path_factory.mktemp("service") / "log"
        with log.open("wb") as output:
            env = clean_environment(PORT=str(port), DRAIN_S="0", **variables)
            process = subprocess.Popen([sys.executable, "-m", "service"], env=env, stdout=output, stderr=output)
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + 30
        try:
            with asking(url) as ask:
                while ask("GET", "/ready").status != 200:
                    assert process.poll() is None, log.read_text()
                    assert time.monotonic() < end, log.read_text()
                    time.sleep(0.1)
            yield url
        finally:
            process.kill()
            process.wait(10)

    return run
