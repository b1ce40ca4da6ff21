"""The benchmark: what it concludes from what it measured, and that it runs for real."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from PIL import Image

from ops.bench import Bench, bench, report
from ops.bench.servers import contenders, largest_difference
from ops.publish import BENCHMARKS, publish_benchmarks


def row(turn: int, server: str, per_s: float, p99: float, batches: float | None = None) -> dict[str, Any]:
    """Return what one round measures of one server."""
    load = {"per_s": per_s, "p50_ms": 1.0, "p99_ms": p99, "requests": 100, "refused": 0, "seconds": 1.0}
    many = {"many": {**load, "per_s": batches}} if batches else {}
    return {
        "round": turn,
        "server": server,
        "start_s": 1.0,
        "memory_bytes": 100 * report.MIB,
        "one_1": load,
        "one_16": load,
        **many,
    }


def measured(service: float = 900, echo: float = 1_000, other: float = 40, batches: float = 60) -> dict[str, Any]:
    """Return a result of two rounds; the second is twice as fast for everybody."""
    rows = []
    for turn, pace in enumerate((1, 2)):
        rows += [row(turn, "service", service * pace, 5.0, batches * pace), row(turn, "echo", echo * pace, 4.0)]
        rows += [row(turn, name, other * pace, 50.0, 40 * pace) for name in report.OTHERS]
    names = ("service", "echo", *report.OTHERS)
    servers = {name: {"title": name, "installed_bytes": report.MIB, "versions": {}} for name in names}
    return {"rounds": rows, "servers": servers}


def verdicts(result: dict[str, Any]) -> list[str]:
    """Return 'met' or 'NOT met' for each goal."""
    return [line.rpartition(": ")[2] for line in report.goal_lines(result).splitlines()]


def test_ratios_are_taken_within_a_round() -> None:
    assert report.ratios(measured(), "service", "echo", report.field("one_16", "per_s")) == [0.9, 0.9]


@pytest.mark.parametrize(
    ("changes", "missed"),
    [({}, []), ({"service": 899.0}, [0]), ({"service": 700.0, "other": 40.0}, [0, 2, 3]), ({"batches": 51.0}, [4, 5])],
)
def test_a_goal_that_was_missed_is_called_missed(changes: dict[str, float], missed: list[int]) -> None:
    found = verdicts(measured(**changes))
    assert [number for number, verdict in enumerate(found) if verdict == "NOT met"] == missed
    assert set(found) <= {"met", "NOT met"}


def test_a_slow_tail_is_a_missed_goal() -> None:
    result = measured()
    for one in result["rounds"]:
        if one["server"] == "service":
            one["one_16"] = {**one["one_16"], "p99_ms": 5.21}
    assert verdicts(result)[1] == "NOT met"


def test_every_measure_in_which_another_server_is_better_is_named() -> None:
    lines = report.worse_lines(measured()).splitlines()
    assert "- requests/s with 16 connections: echo is better, by a factor of 1.11." in lines
    assert "- p99 with 16 connections: echo is better, by a factor of 1.25." in lines
    assert not [line for line in lines if "mlflow" in line]


def test_answers_that_differ_or_are_missing_are_noticed() -> None:
    assert largest_difference([0.1, 0.5], [0.1, 0.25]) == 0.25
    with pytest.raises(RuntimeError, match="1 probabilities for 2 flights"):
        largest_difference([0.1], [0.1, 0.2])


def test_the_committed_plot_shows_the_committed_numbers() -> None:
    with Image.open(BENCHMARKS.with_suffix(".png")) as plot:
        assert plot.info["Source"] == hashlib.sha256(BENCHMARKS.read_bytes()).hexdigest()


def test_the_committed_run_compares_all_servers_in_every_round() -> None:
    result = json.loads(BENCHMARKS.read_text())
    names = [*contenders("key")]
    assert [*result["servers"]] == names
    rounds = {one["round"] for one in result["rounds"]}
    assert len(rounds) >= 3
    assert sorted((one["round"], one["server"]) for one in result["rounds"]) == sorted(
        (r, n) for r in rounds for n in names
    )
    assert {one["server"] for one in result["rounds"] if one["memory_bytes"] is None} == set()


def test_an_unknown_server_and_a_missing_model_are_told(tmp_path: Path, artifacts_root: Path) -> None:
    wrong = CliRunner().invoke(
        bench, ["--only", "flask", "--artifacts", str(artifacts_root), "--folder", str(tmp_path)]
    )
    assert (wrong.exit_code, "flask is not one of service" in wrong.output) == (2, True)
    none = CliRunner().invoke(bench, ["--artifacts", str(tmp_path), "--folder", str(tmp_path / "out")])
    assert (none.exit_code, "run `make train` first" in none.output) == (1, True)


NEEDS_WRK = pytest.mark.skipif(shutil.which("wrk") is None, reason="the load generator wrk is not installed")


@NEEDS_WRK
def test_a_run_of_one_server(tmp_path: Path, artifacts_root: Path) -> None:
    """Installs the echo, starts it, loads it; so every part of the harness but the other servers is run."""
    arguments = ["--only", "echo", "--rounds", "1", "--seconds", "1"]
    done = CliRunner().invoke(bench, [*arguments, "--artifacts", str(artifacts_root), "--folder", str(tmp_path)])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "benchmarks.json").read_text())
    (one,) = result["rounds"]
    assert min(one["one_1"]["per_s"], one["one_16"]["per_s"], one["start_s"], one["memory_bytes"]) > 0
    assert (one["one_16"]["refused"], one["one_16"]["broken"]) == (0, 0)
    assert result["servers"]["echo"]["versions"]["fastapi"]


@NEEDS_WRK
def test_a_server_that_does_not_answer_ends_the_run(tmp_path: Path, unused_port: Any) -> None:
    """Nobody listens: every request is broken, and nothing is measured."""
    (tmp_path / "echo.one").write_text("{}\n")
    run = Bench(tmp_path, tmp_path, [], "key", 1)
    with pytest.raises(subprocess.CalledProcessError):
        run.load(unused_port(), "/v1/predict", "echo.one", 1)


def test_a_partial_run_is_not_published(tmp_path: Path) -> None:
    """Nothing is written before that is known."""
    before = BENCHMARKS.read_bytes()
    partial = tmp_path / "benchmarks.json"
    partial.write_text(json.dumps({"servers": {"echo": {}}, "rounds": []}))
    with pytest.raises(click.ClickException, match=r"lacks bentoml, .*; run `make bench`"):
        publish_benchmarks(partial)
    assert BENCHMARKS.read_bytes() == before
