"""Synthetic checks of a running service, once or on a schedule: one JSON line each time."""

from __future__ import annotations

import json
import signal
import sys
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from ops.smoke import Failed, golden_of, key_for, url_option

if TYPE_CHECKING:
    from mlops_course.release import Check


class Exposed:
    """The last round as metrics, on a port of their own: an alert reads them, not the log."""

    def __init__(self, port: int) -> None:
        """Answer on this port from now on."""
        from prometheus_client import CollectorRegistry, Gauge, start_http_server

        registry = CollectorRegistry()
        text = "1 if the check passed in the last round, 0 if it failed."
        self._passed = Gauge("synthetic_check_passed", text, ["check"], registry=registry)
        text = "When the last round ended, whatever its result."
        self._ended = Gauge("synthetic_round_finished_timestamp_seconds", text, registry=registry)
        start_http_server(port, registry=registry)

    def round(self, checks: list[Check]) -> None:
        """Show this round. A check that was not reached is not shown: the failure before it is."""
        self._passed.clear()
        for check in checks:
            self._passed.labels(check.name).set(check.passed)
        self._ended.set_to_current_time()


def observe(url: str, requests: list[dict[str, Any]], exposed: Exposed | None = None) -> dict[str, Any]:
    """Return what one round of checks saw, and show it."""
    from mlops_course.release import ReleaseError, asking, summary, synthetic

    times: list[float] = []
    try:
        with asking(url, key_for(url), times, synthetic=True) as ask:
            checks = synthetic(ask, requests)
    except ReleaseError as error:
        raise Failed(str(error)) from error
    if exposed:
        exposed.round(checks)
    return {
        "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "url": url,
        "ok": all(check.passed for check in checks),
        "failed": {check.name: check.detail for check in checks if not check.passed},
        "checks": len(checks),
        "latency_ms": summary(times),
    }


@click.command(short_help="Check that a running service keeps its invariants, once or every some seconds.")
@url_option
@click.option("--every", type=click.FloatRange(min=1), help="Seconds from one round to the next. Default: one round.")
@click.option("--metrics-port", type=int, help="Show the last round as metrics on this port. Default: nowhere.")
def synthetic(url: str, every: float | None, metrics_port: int | None) -> None:
    """Send the golden flights and variations of them, and check what holds for every release.

    Probabilities between 0 and 1, the same answer in a batch and alone, risk that does not fall as the recent delay
    rises, and an answer without any weather. Writes one JSON line a round. One round ends with exit code 1 if a check
    failed; with --every it goes on until it is stopped. The key is found as by `smoke`.
    """
    # As process 1 of a container Python would not hear SIGTERM.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    requests = [case["request"] for case in golden_of(None)["cases"]]
    exposed = Exposed(metrics_port) if metrics_port else None
    while True:
        started = time.monotonic()
        seen = observe(url, requests, exposed)
        click.echo(json.dumps(seen))
        if every is None:
            if not seen["ok"]:
                raise Failed("; ".join(f"{name}: {detail}" for name, detail in seen["failed"].items()))
            return
        time.sleep(max(0.0, every - (time.monotonic() - started)))


if __name__ == "__main__":
    # In the image of the checks, which has no other command.
    synthetic(prog_name="python -m ops.synthetic")
