"""What the tests of containers share: an engine, and one image of the code as it is now."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Generator
from pathlib import Path

import pytest

from ops.docker import missing
from ops.image import Plan, build, plan


@pytest.fixture(scope="session")
def engine() -> None:
    """Skip where no Docker engine answers."""
    if why := missing():
        pytest.skip(f"needs Docker: {why}")


@pytest.fixture(scope="session")
def image_plan(engine: None, artifacts_root: Path) -> Plan:
    """Return what the tests build: the code as it is, and the model in channel prod."""
    return plan(artifacts_root, None)


@pytest.fixture(scope="session")
def built_image(image_plan: Plan) -> Generator[str]:
    """Return an image of the code as it is now, under a name that no other run uses."""
    name = f"flight-disruption:test-{os.getpid()}"
    build(image_plan, name)
    yield name
    subprocess.run(["docker", "image", "rm", "--force", name], capture_output=True, check=True)
