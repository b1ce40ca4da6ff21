"""The committed lock files, and how their changes are reported."""

from __future__ import annotations

import re

import pytest

from ops.lock import CHECKS_LOCK, FULL_LOCK, SERVICE_LOCK, changed, read_lock, versions

ONE = "sha256:" + "1" * 64
TWO = "sha256:" + "2" * 64


def test_the_service_lock_is_a_part_of_the_full_lock(root):
    full, service = read_lock(root / FULL_LOCK), read_lock(root / SERVICE_LOCK)
    assert {pin: hashes for pin, hashes in service.items() if full.get(pin) != hashes} == {}
    names = versions(service).keys()
    assert {"fastapi", "numpy", "onnxruntime", "uvicorn"} <= names
    # The service image stays small because these stay out of it.
    assert names & {"pandas", "scikit-learn", "skl2onnx", "evidently", "matplotlib", "nbdev"} == set()


def test_the_checks_lock_is_what_the_services_lacks(root):
    full, service, checks = (read_lock(root / name) for name in (FULL_LOCK, SERVICE_LOCK, CHECKS_LOCK))
    assert {pin: hashes for pin, hashes in checks.items() if full.get(pin) != hashes} == {}
    assert versions(checks).keys() & versions(service).keys() == set()
    assert "httpx" in versions(checks)
    assert len(checks) < 6


@pytest.mark.parametrize("name", [FULL_LOCK, SERVICE_LOCK, CHECKS_LOCK])
def test_a_lock_names_packages_and_hashes_and_no_place(root, name):
    lines = (root / name).read_text().splitlines()
    pin = r"[a-z0-9._-]+==[^\s;]+( ; [^\\]+)? \\"
    file_hash = r"    --hash=sha256:[0-9a-f]{64}( \\)?"
    assert [line for line in lines if not re.fullmatch(f"{pin}|{file_hash}", line)] == []


def test_reads_a_package_with_two_versions(tmp_path):
    lock = tmp_path / "some.lock"
    lock.write_text(
        f"a==1.0 ; sys_platform == 'linux' \\\n    --hash={ONE} \\\n    --hash={TWO}\n"
        f"a==0.9 ; sys_platform == 'darwin' \\\n    --hash={ONE}\nb==2 \\\n    --hash={TWO}\n"
    )
    pins = read_lock(lock)
    assert pins == {("a", "1.0"): {ONE, TWO}, ("a", "0.9"): {ONE}, ("b", "2"): {TWO}}
    assert versions(pins) == {"a": "0.9 / 1.0", "b": "2"}


@pytest.mark.parametrize("line", ["a==1.0\n", f"a>=1.0 --hash={ONE}\n", "-e .\n"])
def test_refuses_what_is_not_pinned_with_hashes(tmp_path, line):
    (tmp_path / "some.lock").write_text(line)
    with pytest.raises(ValueError, match="not a pinned package with hashes"):
        read_lock(tmp_path / "some.lock")


def test_reports_added_removed_and_moved_versions():
    before = {("gone", "1"): frozenset({ONE}), ("moved", "1"): frozenset({ONE}), ("same", "1"): frozenset({ONE})}
    after = {("moved", "2"): frozenset({TWO}), ("new", "3"): frozenset({TWO}), ("same", "1"): frozenset({ONE})}
    assert changed(before, after) == ["gone: 1 -> removed", "moved: 1 -> 2", "new: not there -> 3"]
