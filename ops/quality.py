"""Judge the model on the outcomes that have come: a report, and numbers for Prometheus."""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ops import ROOT, artifacts_option, setting
from ops.docker import docker
from ops.replay import moment, store_option
from ops.smoke import Failed

if TYPE_CHECKING:
    from mlops_course.monitoring import LabelStore, LatestQuality, Quality, Sample

SHOWN = ("roc_auc", "recall_at_budget", "promise_gap")


def versions_in(store: LabelStore) -> list[str]:
    """Return the model versions that the store has predictions of."""
    return [str(row[0]) for row in store.rows("SELECT DISTINCT model_version FROM predictions ORDER BY 1")]


def references(store: LabelStore, shelf: Path, known: dict[str, Sample]) -> dict[str, Sample]:
    """Return the locked test month of each version in the store, from its artifact; `known` ones are kept."""
    from mlops_course.monitoring import reference_month

    found = {}
    for version in versions_in(store):
        if version in known:
            found[version] = known[version]
        elif (shelf / version / "predictions.parquet").is_file():
            found[version] = reference_month(shelf / version)
        else:
            click.echo(f"no artifact of {version} in {shelf}: it has nothing to be compared with, left out", err=True)
    return found


def newest(store: LabelStore, against: dict[str, Sample]) -> list[LatestQuality]:
    """Judge the latest mature days of each version."""
    from mlops_course.monitoring import latest_quality

    found = [latest_quality(store, version, reference) for version, reference in against.items()]
    return [one for one in found if one is not None]


def print_months(months: list[Quality]) -> None:
    """Print one line for each version and month."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from mlops_course.monitoring import QUALITY_RULES

    table = Table(box=box.SIMPLE_HEAD, title="quality on mature labels (95 % interval, resampling days)")
    for name in ("model", "days", "flights", "labelled", "ROC AUC", "warned in budget", "promise gap", "verdict"):
        table.add_column(name, justify="left" if name in ("model", "days", "verdict") else "right")
    for q in months:
        cells = [q.measured[name] for name in SHOWN]
        spread = [f"{m.value:.3f} ({m.low:.3f} to {m.high:.3f})" for m in cells]
        verdict = q.unjudged or ", ".join(q.worse) or "as approved"
        days = f"{q.first_day} to {q.last_day[5:]}"
        table.add_row(q.model_version, days, f"{q.flights:,}", f"{q.coverage:.1%}", *spread, verdict)
    Console(width=150).print(table)
    broken = {name for q in months for name in q.worse}
    for rule in QUALITY_RULES:
        if rule.metric in broken:
            click.echo(f"  {rule.metric}: {rule.action}")


def exposition(latest: list[LatestQuality]) -> bytes:
    """Return the numbers as Prometheus reads them."""
    from prometheus_client import CollectorRegistry, generate_latest

    from mlops_course.monitoring import QualityMetrics

    registry = CollectorRegistry()
    registry.register(QualityMetrics(latest))
    return generate_latest(registry)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that a reader sees whole or not at all."""
    scratch = path.with_name(f".{path.name}.writing")
    scratch.write_bytes(data)
    scratch.replace(path)


@click.command(short_help="Judge the model on the outcomes that have come.")
@store_option
@artifacts_option
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=ROOT / "build" / "quality",
    help="Where quality.json and quality.prom go. Default: build/quality.",
)
@click.option("--serve", "port", type=click.IntRange(1, 65_535), help="Serve the numbers on this port of this machine.")
@click.option("--host", help="Address to serve on. Default: 127.0.0.1; with --compose the one that containers reach.")
@click.option("--compose", is_flag=True, help="With --serve: let the Prometheus that `make up` started ask for them.")
@click.option("--every", default=30.0, show_default=True, help="With --serve: seconds between two judgements.")
def quality(
    store: Path, artifacts: Path, output: Path, port: int | None, host: str | None, compose: bool, every: float
) -> None:
    """Judge each model version by month, and on the latest four weeks of mature days.

    quality.json has everything, quality.prom the latest four weeks as Prometheus reads it (for a textfile collector).
    With --serve it stays and answers Prometheus itself, judging again while a replay fills the store.
    """
    from mlops_course.blueprint import MODEL_NAME, canonical_json
    from mlops_course.monitoring import LabelStore, label_counts, quality_by_month, replayed_to

    if compose and port is None:
        raise click.UsageError("--compose needs --serve PORT, for example --serve 9105")
    if port is None and not store.is_file():
        raise Failed(f"{store} is not there: fill it with `python -m ops replay`")
    shelf = artifacts.resolve() / MODEL_NAME
    with closing(LabelStore(store)) as book:
        if port is not None:
            with announced(port) if compose else nullcontext():
                serve(book, shelf, host or (bridge() if compose else "127.0.0.1"), port, every)
            return
        against = references(book, shelf, {})
        months = [q for version, reference in against.items() for q in quality_by_month(book, version, reference)]
        if not months:
            raise Failed("no day is mature yet; let the replay go on for a day or two")
        print_months(months)
        latest = newest(book, against)
        report = {
            "replayed_to": moment(replayed_to(book)),
            "labels": {version: label_counts(book, version) for version in against},
            "months": [json.loads(q.model_dump_json()) for q in months],
            "latest": [json.loads(one.quality.model_dump_json()) for one in latest],
            "estimate_latest": {one.quality.model_version: one.estimate for one in latest},
        }
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / "quality.json", canonical_json(report))
        write_atomically(output / "quality.prom", exposition(latest))
    click.echo(f"wrote quality.json and quality.prom to {output}; outcomes up to {report['replayed_to']}")


def bridge() -> str:
    """Return this machine's address on Docker's network; where containers live in a machine of their own, 127.0.0.1."""
    found = docker("network", "inspect", "bridge", "--format", "{{(index .IPAM.Config 0).Gateway}}").strip()
    with socket.socket() as probe:
        try:
            probe.bind((found, 0))
        except OSError:
            return "127.0.0.1"
    return found


@contextmanager
def announced(port: int) -> Iterator[None]:
    """Tell the Prometheus of docker-compose.yml where to ask, and at the end that nobody answers there any more."""
    target = ROOT / setting("PROMETHEUS_CONFIG", "ops/prometheus") / "targets" / "quality.yml"
    write_atomically(target, f'- targets: ["host.docker.internal:{port}"]\n'.encode())
    try:
        yield
    finally:
        target.unlink(missing_ok=True)


def serve(store: LabelStore, shelf: Path, host: str, port: int, every: float) -> None:
    """Answer Prometheus until stopped, and judge again every some seconds."""
    from prometheus_client import CollectorRegistry, start_http_server

    from mlops_course.monitoring import QualityMetrics

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    metrics, registry = QualityMetrics(), CollectorRegistry()
    registry.register(metrics)
    try:
        start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise Failed(f"cannot listen on {host}:{port}: {error.strerror}") from error
    click.echo(f"quality at http://{host}:{port}/metrics")
    against: dict[str, Sample] = {}
    while True:
        against = references(store, shelf, against)
        metrics.latest = newest(store, against)
        time.sleep(every)
