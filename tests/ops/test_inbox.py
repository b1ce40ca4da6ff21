"""The inbox for alerts: one line for each alert, and an error for anything else."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Generator

import httpx
import pytest

MESSAGE = {
    "receiver": "pages",
    "status": "firing",
    "alerts": [
        {
            "status": "firing",
            "labels": {"alertname": "ServiceDown", "severity": "page", "owner": "platform", "cause": "down"},
            "annotations": {"summary": "0 instances", "action": "Start it.", "runbook": "docs/incident_playbook.md#x"},
            "startsAt": "2013-09-01T00:00:00Z",
        },
        {
            "status": "resolved",
            "labels": {"alertname": "DoorDown"},
            "annotations": {},
            "startsAt": "2013-09-01T00:00:00Z",
        },
    ],
}


@pytest.fixture
def inbox(unused_port: Callable[[], int]) -> Generator[tuple[str, subprocess.Popen[str]]]:
    """Return the address of a running inbox, and its process."""
    port = unused_port()
    line = [sys.executable, "-m", "ops.inbox", "--port", str(port)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    url, end = f"http://127.0.0.1:{port}/", time.monotonic() + 30
    while True:
        try:
            httpx.get(url)
            break
        except httpx.TransportError:
            assert time.monotonic() < end
            time.sleep(0.1)
    yield url, process
    process.kill()
    process.wait(10)
    assert process.stdout is not None
    process.stdout.close()


def test_each_alert_is_one_line(inbox):
    url, process = inbox
    assert httpx.post(url, json=MESSAGE).status_code == 200
    process.terminate()
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 0
    first, second = map(json.loads, output.splitlines())
    assert (first["receiver"], first["alert"], first["status"], first["severity"]) == (
        *("pages", "ServiceDown", "firing", "page"),
    )
    assert (first["action"], first["since"]) == ("Start it.", "2013-09-01T00:00:00Z")
    assert (second["alert"], second["status"], second["severity"]) == ("DoorDown", "resolved", "")


@pytest.mark.parametrize("content", [b"", b"no json", b"{}", b'{"alerts": [{}]}', b"[]", b'{"alerts": 3}'])
def test_what_is_no_message_is_refused(inbox, content):
    url, process = inbox
    assert httpx.post(url, content=content).status_code == 400
    assert httpx.post(url, json=MESSAGE).status_code == 200
    process.terminate()
    output, _ = process.communicate(timeout=10)
    assert len(output.splitlines()) == 2


def test_a_message_without_end_is_refused(inbox):
    url, _ = inbox
    assert httpx.post(url, content=b" " * ((1 << 20) + 1)).status_code == 400
