"""Turn a benchmark's JSON into tables, sentences and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Result = dict[str, Any]

PLAIN = ("tutorial", "mlserver-plain", "bentoml-plain", "mlflow")  # they serve the model too, each request by itself
OTHERS = (*PLAIN, "mlserver", "bentoml")  # these two join requests that come at the same time
MIB = 1_048_576
IDLE = 0.5  # load of a machine that has nothing else to do


def median(result: Result, server: str, value: Callable[[dict[str, Any]], Any]) -> float | None:
    """Return the median of a value over the rounds of one server; None if it was not measured."""
    values = [value(row) for row in result["rounds"] if row["server"] == server]
    known = [one for one in values if one is not None]
    return statistics.median(known) if known else None


def field(*path: str) -> Callable[[dict[str, Any]], Any]:
    """Return a function that finds a nested value of a row, or None."""

    def find(row: dict[str, Any]) -> Any:
        value: Any = row
        for name in path:
            value = value.get(name) if value is not None else None
        return value

    return find


def rows_per_s(row: dict[str, Any]) -> float | None:
    """Return how many flights a second were answered in batches."""
    from ops.bench import BATCH

    return row["many"]["per_s"] * BATCH if "many" in row else None


def ratios(result: Result, above: str, below: str, value: Callable[[dict[str, Any]], Any]) -> list[float]:
    """Return the ratio of two servers in each round."""
    by_round: dict[int, dict[str, Any]] = {}
    for row in result["rounds"]:
        by_round.setdefault(row["round"], {})[row["server"]] = value(row)
    pairs = [(one.get(above), one.get(below)) for one in by_round.values()]
    return [a / b for a, b in pairs if a is not None and b]


def best(result: Result, names: Sequence[str], value: Callable[[dict[str, Any]], Any]) -> str:
    """Return the server with the largest median."""
    return max(names, key=lambda name: median(result, name, value) or 0)


def text(value: float | None, form: str = ",.0f") -> str:
    """Return a number as text, and a hyphen for none."""
    return "-" if value is None else format(value, form)


def speed_table(result: Result) -> str:
    """Render the medians of all rounds, a line for each server."""
    lines = [
        "| server | requests/s, 1 connection | requests/s, 16 connections | p50, ms | p99, ms | flights/s in batches "
        "| start to first answer, s | memory, MiB | installed, MiB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, server in result["servers"].items():
        memory = median(result, name, field("memory_bytes"))
        cells = [
            text(median(result, name, field("one_1", "per_s"))),
            text(median(result, name, field("one_16", "per_s"))),
            text(median(result, name, field("one_16", "p50_ms")), ".1f"),
            text(median(result, name, field("one_16", "p99_ms")), ".1f"),
            text(median(result, name, rows_per_s)),
            text(median(result, name, field("start_s")), ".2f"),
            text(memory / MIB if memory else None),
            text(server["installed_bytes"] / MIB),
        ]
        lines.append(f"| {server['title']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Return the median of ratios and their range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def comparisons(result: Result) -> list[tuple[str, list[float], str, float]]:
    """Return what was aimed at: sentence, the ratios of the rounds, 'at least' or 'at most', the target."""
    speed, tail = field("one_16", "per_s"), field("one_16", "p99_ms")
    found = []
    if {"service", "echo"} <= result["servers"].keys():
        found += [
            (
                "throughput at 16 connections over FastAPI without a model",
                ratios(result, "service", "echo", speed),
                "at least",
                0.9,
            ),
            (
                "p99 at 16 connections over FastAPI without a model",
                ratios(result, "service", "echo", tail),
                "at most",
                1.3,
            ),
        ]
    if {"service", *OTHERS} <= result["servers"].keys():
        for words, names, value, target in (
            ("throughput at 16 connections over the best that answers each request by itself", PLAIN, speed, 20),
            ("throughput at 16 connections over the best of all others", OTHERS, speed, 20),
            ("flights a second in batches over the best that answers each request by itself", PLAIN, rows_per_s, 1.3),
            ("flights a second in batches over the best of all others", OTHERS, rows_per_s, 1.3),
        ):
            name = best(result, names, value)
            title = result["servers"][name]["title"]
            found.append((f"{words} ({title})", ratios(result, "service", name, value), "at least", target))
    return found


def goal_lines(result: Result) -> str:
    """Render what was aimed at and what was reached, one line each."""
    lines = []
    for sentence, values, sense, target in comparisons(result):
        reached = statistics.median(values)
        met = reached >= target if sense == "at least" else reached <= target
        lines.append(f"- {sentence}: {spread(values)}; aimed at {sense} {target:g}: {'met' if met else 'NOT met'}")
    for name, path, scale, unit, target in (
        ("start to first answer", ("start_s",), 1.0, "s", 1.2),
        ("ready again after kill -9", ("restart_s",), 1.0, "s", 2.0),
        ("memory after the loads", ("memory_bytes",), MIB, "MiB", 110),
    ):
        value = median(result, "service", field(*path))
        if value is not None:
            verdict = "met" if value / scale <= target else "NOT met"
            lines.append(f"- {name}: {value / scale:.3g} {unit}; aimed at at most {target:g} {unit}: {verdict}")
    return "\n".join(lines)


# Where the service is slower or larger than another server, for the page to say so.
MEASURES: dict[str, tuple[Callable[[dict[str, Any]], Any], bool]] = {
    "requests/s with 1 connection": (field("one_1", "per_s"), True),
    "requests/s with 16 connections": (field("one_16", "per_s"), True),
    "p99 with 16 connections": (field("one_16", "p99_ms"), False),
    "flights/s in batches": (rows_per_s, True),
    "start to first answer": (field("start_s"), False),
    "memory": (field("memory_bytes"), False),
}


def worse_lines(result: Result) -> str:
    """Name each measure in which another server, with or without a model, was better than the service."""
    lines = []
    for measure, (value, more_is_better) in MEASURES.items():
        own = median(result, "service", value)
        for name, server in result["servers"].items():
            other = median(result, name, value)
            if name in ("service", "unwatched", "constant") or own is None or other is None:
                continue
            if (other > own) if more_is_better else (other < own):
                lines.append(
                    f"- {measure}: {server['title']} is better, by a factor of {max(own, other) / min(own, other):.2f}."
                )
    own_size = result["servers"]["service"]["installed_bytes"]
    smaller = [server for server in result["servers"].values() if server["installed_bytes"] < own_size]
    lines += [f"- installed size: {s['title']} is smaller ({s['installed_bytes'] / MIB:.0f} MiB)." for s in smaller]
    return "\n".join(lines) or "In nothing that was measured."


def anatomy_table(result: Result) -> str:
    """Render where the time of one request goes, in microseconds and shares."""
    inside = result["anatomy"]
    whole = 1e6 / (median(result, "service", field("one_16", "per_s")) or 1)
    staged = sum(inside[name] for name in ("validate", "features", "model"))
    parts = {
        "the rest: HTTP (uvicorn, the operating system), and waiting": whole - inside["logged"],
        "validate the body (pydantic)": inside["validate"],
        "derive the features": inside["features"],
        "ONNX Runtime and the decision": inside["model"],
        "headers, key, request id, bytes of the answer": inside["silent"] - staged,
        "metrics and the log line": inside["logged"] - inside["silent"],
    }
    lines = ["| part | µs | share |", "|---|---:|---:|"]
    lines += [f"| {name} | {value:.0f} | {value / whole:.0%} |" for name, value in parts.items()]
    return "\n".join([*lines, f"| one request at 16 connections | {whole:.0f} | 100% |"])


def crowd_lines(result: Result) -> str:
    """Render what happened when more clients asked than may wait."""
    from ops.bench import CROWD

    crowd = field("crowd")
    rows = [crowd(row) for row in result["rounds"] if crowd(row)]
    answered = statistics.median((one["requests"] - one["refused"]) / one["seconds"] for one in rows)
    refused = statistics.median(one["refused"] / one["seconds"] for one in rows)
    usual = median(result, "service", field("one_16", "per_s")) or 1
    waits = statistics.median(one["p50_ms"] for one in rows), statistics.median(one["p99_ms"] for one in rows)
    return (
        f"{CROWD:,} clients that ask again as soon as they are answered, whatever the answer, are twice as many as may "
        f"wait: {answered:,.0f} requests a second were answered ({answered / usual:.0%} of the usual) and "
        f"{refused:,.0f} refused; half of all answers came within {waits[0]:.0f} ms, 99 % within {waits[1]:.0f} ms."
    )


def short_lines(result: Result) -> str:
    """Render the few numbers that a reader with one minute wants."""
    sentences = comparisons(result)
    own = {name: text(median(result, "service", value), form) for name, (value, form) in SHORT.items()}
    titles = {name: server["title"] for name, server in result["servers"].items()}
    joined = titles[best(result, OTHERS, field("one_16", "per_s"))]
    return (
        f"On one core the service, without Envoy, answers {own['speed']} requests a second at 16 connections (p99 "
        f"{own['p99']} ms). In brackets the smallest and the largest of the rounds: {spread(sentences[0][1])} times "
        f"as many as a FastAPI endpoint without a model, {spread(sentences[2][1])} times the best server that runs the "
        f"same model with scikit-learn, request by request, and {spread(sentences[3][1])} times {joined}. "
        f"In batches it answers {spread(sentences[5][1])} times as many flights as the best other. "
        f"It starts in {own['start']} s and takes {own['memory']} MiB. [docs/benchmarks.md](docs/benchmarks.md) says "
        "how this was measured, which goals were missed, and that most of the distance is ONNX Runtime instead of "
        "scikit-learn."
    )


SHORT: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "speed": (field("one_16", "per_s"), ",.0f"),
    "p99": (field("one_16", "p99_ms"), ".1f"),
    "start": (field("start_s"), ".1f"),
    "memory": (lambda row: row["memory_bytes"] / MIB if row["memory_bytes"] else None, ".0f"),
}


def setting_lines(result: Result) -> str:
    """Render machine, versions and procedure."""
    machine = result["machine"]
    busy = machine["load_before"] > IDLE
    rounds = len({row["round"] for row in result["rounds"]})
    lines = [
        f"Machine: {machine['cpu']}, {machine['cores']} cores, {machine['system']}, Python {machine['python']}; "
        f"load before the run {machine['load_before']}"
        + (
            " (**it was not idle**: the figures are lower, and spread more, than on an idle machine). "
            if busy
            else ". "
        )
        + (
            "Server and load generator were each bound to one core. "
            if machine["pinned"]
            else "Nothing was pinned to cores. "
        )
        + f"Model {result['model']}; medians of the rounds. Command: "
        f"`python -m ops bench --rounds {rounds} --seconds {result['seconds']}`.",
        "",
    ]
    servers = result["servers"].values()
    lines += [
        f"- {server['title']}: " + ", ".join(f"{n} {v}" for n, v in server["versions"].items()) for server in servers
    ]
    return "\n".join(lines)


def draw(result: Result, target: Path, source: str) -> None:
    """Plot throughput, batches, start and memory of all servers, a tick for each round. `source` goes into the file."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    shown = [name for name in result["servers"] if name != "constant"]
    panels: list[tuple[str, Callable[[dict[str, Any]], Any], bool]] = [
        ("requests/s, 16 connections", field("one_16", "per_s"), True),
        ("flights/s in batches of 1,000", rows_per_s, True),
        ("start to first answer, s", field("start_s"), True),
        ("memory, MiB", lambda row: row["memory_bytes"] / MIB if row["memory_bytes"] else None, True),
    ]
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.2), sharey=True, layout="constrained")
    for axis, (title, value, log) in zip(axes, panels, strict=True):
        for place, name in enumerate(shown):
            points = [value(row) for row in result["rounds"] if row["server"] == name]
            points = [one for one in points if one is not None]
            color = "tab:blue" if name == "service" else "tab:gray"
            if points:
                middle = statistics.median(points)
                axis.barh(place, middle, color=color, alpha=0.55)
                axis.plot(points, [place] * len(points), "|", color="black", markersize=7)
                axis.annotate(
                    f" {middle:,.3g}" if middle < 10 else f" {middle:,.0f}",
                    (max(points), place),
                    va="center",
                    fontsize=8,
                )
        axis.set(title=title)
        axis.title.set_fontsize(10)
        if log:
            axis.set_xscale("log")
            axis.xaxis.set_minor_formatter(NullFormatter())  # else two labels lie on one another
            low, high = axis.get_xlim()
            axis.set_xlim(low, high * 6)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(shown)), [result["servers"][name]["title"] for name in shown])
    axes[0].invert_yaxis()
    figure.suptitle("Bars: medians; ticks: single rounds; logarithmic scales", fontsize=9)
    figure.savefig(target, dpi=110, metadata={"Source": source})
    plt.close(figure)
