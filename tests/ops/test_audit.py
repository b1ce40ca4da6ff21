"""The audit says what it does not know, and the list of packages is complete and valid CycloneDX."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from ops.__main__ import cli
from ops.audit import problems
from ops.lock import SERVICE_LOCK, read_lock

HASH = "sha256:" + "1" * 64


def test_what_nobody_can_say_anything_about_is_a_failure(tmp_path: Path) -> None:
    """PyPI has no such package; where PyPI does not answer, the same is said of every package."""
    lock = tmp_path / "some.lock"
    lock.write_text(f"no-such-package-of-this-course==1.0 --hash={HASH}\n")
    result = CliRunner().invoke(cli, ["audit", str(lock)])
    assert result.exit_code == 1, result.output
    assert "1 of 1 packages were not audited" in result.output or "was not audited" in result.output


def test_a_lock_without_hashes_is_told(tmp_path: Path) -> None:
    lock = tmp_path / "some.lock"
    lock.write_text("numpy>=2\n")
    result = CliRunner().invoke(cli, ["audit", str(lock)])
    assert result.exit_code == 1
    assert "some.lock was not audited: pip-audit ended without a result" in result.output


def test_a_vulnerability_is_named_with_its_fix() -> None:
    """In the form of pip-audit's report (its documentation, section JSON)."""
    bugs = [{"id": "PYSEC-1", "fix_versions": ["1.2", "2.0"]}, {"id": "PYSEC-2", "fix_versions": []}]
    found: list[dict[str, Any]] = [
        {"name": "a", "version": "1.0", "vulns": bugs},
        {"name": "b", "version": "1", "vulns": []},
    ]
    assert problems(found) == ["a 1.0: PYSEC-1, fixed in 1.2, 2.0", "a 1.0: PYSEC-2, fixed in no version yet"]
    assert problems(found[1:]) == []


@pytest.fixture(scope="module")
def sbom(root: Path) -> dict[str, object]:
    """Return what `make sbom` writes."""
    subprocess.run(["make", "sbom"], cwd=root, capture_output=True, check=True)
    found: dict[str, object] = json.loads((root / "build" / "sbom" / "service.cdx.json").read_text())
    return found


def test_the_list_of_packages_is_that_of_the_lock(sbom, root: Path) -> None:
    listed = {(one["name"], one["version"]) for one in sbom["components"]}
    assert listed == set(read_lock(root / SERVICE_LOCK))
    hashes = {
        f"sha256:{one['content']}"
        for part in sbom["components"]
        for place in part["externalReferences"]
        for one in place["hashes"]
    }
    assert hashes == {one for pin in read_lock(root / SERVICE_LOCK).values() for one in pin}


def test_the_list_of_packages_is_valid_cyclonedx(sbom) -> None:
    validator = JsonStrictValidator(SchemaVersion.from_version(sbom["specVersion"]))
    assert validator.validate_str(json.dumps(sbom)) is None
    assert validator.validate_str(json.dumps(sbom | {"components": [{"name": "no type"}]})) is not None


def test_the_list_of_packages_repeats(sbom, root: Path) -> None:
    before = (root / "build" / "sbom" / "service.cdx.json").read_bytes()
    subprocess.run(["make", "sbom"], cwd=root, capture_output=True, check=True)
    assert (root / "build" / "sbom" / "service.cdx.json").read_bytes() == before
