"""Copy chosen results into docs/, and fill the generated parts of the documents from them.

A number in a document is never typed. It stands between two markers, and this module writes what is between them
from a committed JSON file or from the code. A test renders everything again and fails when a document is stale.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ops import ROOT, artifacts_option
from ops.bench import report

QUALITY = ROOT / "docs" / "reports" / "quality.json"
BENCHMARKS = QUALITY.with_name("benchmarks.json")
REBUILDS = ROOT / "docs" / "reports" / "rebuilds.json"
DRILL = REBUILDS.with_name("alert-drill.json")
DRIFT = ROOT / "docs" / "reports" / "drift_calibration.json"

# Which metrics the README shows, in words that need no glossary.
ROWS = {
    "roc_auc": "ROC AUC, the chance that a disrupted flight ranks above another",
    "average_precision": "average precision",
    "brier_skill": "Brier skill, 0 is no better than the average",
    "recall_at_budget": "share of disrupted flights among the riskiest quarter of each day",
    "calibration_error": "mean distance between promised and observed risk",
}


def collect_quality(shelf: Path) -> dict[str, Any]:
    """Return the headline metrics, intervals and digest of every registered version on the shelf."""
    from mlops_course.blueprint import approved_versions, parse_version, read_registry

    registry = read_registry(shelf)
    if not registry.versions:
        raise click.ClickException(f"no registered version in {shelf}; run `make train` first")
    versions = {}
    for version in sorted(registry.versions, key=parse_version):
        metrics = json.loads((shelf / version / "metrics.json").read_text())
        versions[version] = {
            "title": metrics["title"],
            # A candidate's manifest holds its commit, so its digest is new with each commit.
            "digest": registry.versions[version] if version in approved_versions() else None,
            "metrics": metrics["test"]["metrics"],
            "intervals": metrics["intervals"],
            "threshold": metrics["threshold"],
        }
        baselines = metrics["baselines_roc_auc"]
    return {"versions": versions, "baselines_roc_auc": baselines}


def quality_table() -> str:
    """Render docs/reports/quality.json as the README's table."""
    quality = json.loads(QUALITY.read_text())
    versions = quality["versions"]
    heads = [f"{version} ({one['title']})" for version, one in versions.items()]
    lines = ["| locked test month, August 2013 | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for name, words in ROWS.items():
        cells = []
        for one in versions.values():
            spread = one["intervals"].get(name)
            text = f"{one['metrics'][name]:.3f}"
            cells.append(f"{text} ({spread[0]:.3f} to {spread[1]:.3f})" if spread else text)
        lines.append(f"| {words} | " + " | ".join(cells) + " |")
    recent = quality["baselines_roc_auc"]["recent delay"]
    lines += [
        "",
        "In brackets: 95 % intervals from resampling whole days, because flights of one day share their weather. "
        f"Sorting flights by the recent delay at their airport, without any model, reaches a ROC AUC of {recent:.3f}.",
    ]
    return "\n".join(lines)


def settings_table() -> str:
    """Render the settings of the service: name, default, meaning."""
    from mlops_course.serving import Settings

    lines = ["| variable | default | meaning |", "|---|---|---|"]
    # Own fields first: what must be chosen before what may stay as it is.
    own = Settings.__annotations__
    for name, field in sorted(Settings.model_fields.items(), key=lambda item: item[0] not in own):
        default = "" if field.is_required() or field.default is None else f"`{field.default}`"
        lines.append(f"| `{name.upper()}` | {default} | {field.description} |")
    return "\n".join(lines)


def benchmark(render: Callable[[dict[str, Any]], str]) -> Callable[[], str]:
    """Return a function that renders one part of the committed benchmark."""
    return lambda: render(json.loads(BENCHMARKS.read_text()))


def drift_table(part: str, label: Callable[[dict[str, Any]], str]) -> str:
    """Render one part of the committed calibration of the drift rules: a line for each kind of window."""
    rows = json.loads(DRIFT.read_text())[part]
    rules = list(rows[0]["rules"])
    rules.insert(0, rules.pop(rules.index("ours")))
    lines = ["| windows | " + " | ".join(rules) + " |", "|---|" + "---|" * len(rules)]
    for row in rows:
        cells = []
        for rule in rules:
            seen = row["rules"][rule]
            low, high = seen["interval"]
            cells.append(f"{seen['share']:.1%} ({low:.1%} to {high:.1%})" if rule == "ours" else f"{seen['share']:.0%}")
        lines.append(f"| {label(row)} | " + " | ".join(cells) + " |")
    counts = [rows[0]["rules"][rule]["windows"] for rule in rules[:2]]
    return "\n".join([*lines, "", f"In each line {counts[0]} windows for our rule, {counts[1]} for Evidently's."])


DESIGNS = {"rows": "drawn one by one", "days": "of consecutive days"}


def drift_alarms() -> str:
    """Render how often the drift rules alarm without drift."""
    return drift_table("false_alarms", lambda row: f"{row['rows']:,} flights {DESIGNS[row['design']]}")


def drift_detection() -> str:
    """Render how often the drift rules find a feature that was moved."""
    return drift_table("detection", lambda row: f"`{row['feature']}`, flights {DESIGNS[row['design']]}")


def drill_table() -> str:
    """Render docs/reports/alert-drill.json: each fault, what fired and when."""
    drill = json.loads(DRILL.read_text())
    lines = ["| fault | done to it | had to fire, seconds after it | also true |", "|---|---|---|---|"]
    for one in drill["faults"]:
        times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in one["expected_s"].items())
        lines.append(f"| {one['fault']} | {one['how']} | {times} | {', '.join(one['also_s'])} |")
    told = f"With windows {drill['factor']:g} times as short as in production, and {drill['requests_per_second']:g} "
    lines += ["", told + "requests a second. Nothing else fired, neither before a fault nor during it."]
    return "\n".join(lines)


# Which document has which generated part.
PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"quality": quality_table, "settings": settings_table, "speed": benchmark(report.short_lines)},
    "docs/benchmarks.md": {
        "speed": benchmark(report.speed_table),
        "goals": benchmark(report.goal_lines),
        "worse": benchmark(report.worse_lines),
        "crowd": benchmark(report.crowd_lines),
        "anatomy": benchmark(report.anatomy_table),
        "setting": benchmark(report.setting_lines),
    },
    "docs/incident_playbook.md": {"drill": drill_table},
    "docs/drift.md": {"alarms": drift_alarms, "detection": drift_detection},
}


def publish_benchmarks(measured: Path) -> list[str]:
    """Copy a new benchmark into docs/reports and draw it. Returns the names of the files written."""
    if not measured.exists():
        return []
    from ops.bench.servers import contenders

    if missing := contenders("").keys() - json.loads(measured.read_text())["servers"].keys():
        names = ", ".join(sorted(missing))
        raise click.ClickException(f"{measured} lacks {names}; run `make bench`, or remove the file, and publish again")
    BENCHMARKS.write_bytes(measured.read_bytes())
    plot = BENCHMARKS.with_suffix(".png")
    report.draw(json.loads(BENCHMARKS.read_text()), plot, source=hashlib.sha256(BENCHMARKS.read_bytes()).hexdigest())
    return [file.relative_to(ROOT).as_posix() for file in (BENCHMARKS, plot)]


def fill(text: str, name: str, content: str) -> str:
    """Return `text` with everything between the markers called `name` replaced. Raises ValueError without them."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"the markers {begin} and {end} are missing")
    return pattern.sub(lambda _: f"{begin}\n{content}\n{end}", text)


def render(document: str) -> str:
    """Return a document with all its generated parts written again."""
    text = (ROOT / document).read_text(encoding="utf-8")
    for name, make in PARTS[document].items():
        text = fill(text, name, make())
    return text


@click.command(short_help="Copy reports into docs/ and renew the generated parts of the documents.")
@artifacts_option
def publish(artifacts: Path) -> None:
    """Write docs/reports from the artifacts, and what README and docs say from docs/reports and the code."""
    from mlops_course.blueprint import MODEL_NAME, canonical_json
    from service.app import openapi_document

    written = publish_benchmarks(ROOT / "build" / "bench" / "benchmarks.json")
    QUALITY.parent.mkdir(parents=True, exist_ok=True)
    QUALITY.write_bytes(canonical_json(collect_quality(artifacts.resolve() / MODEL_NAME)))
    written.append(QUALITY.relative_to(ROOT).as_posix())
    # Measured where a Docker engine answers, or Prometheus is installed; readers without see the committed files.
    for report_file in (REBUILDS, DRILL):
        if (measured := ROOT / "build" / report_file.name).exists():
            report_file.write_bytes(measured.read_bytes())
            written.append(report_file.relative_to(ROOT).as_posix())
    if (measured := ROOT / "build" / "drift" / "calibration.json").exists():
        DRIFT.write_bytes(measured.read_bytes())
        written.append(DRIFT.relative_to(ROOT).as_posix())
    for document in PARTS:
        (ROOT / document).write_text(render(document), encoding="utf-8")
        written.append(document)
    (ROOT / "docs" / "openapi.json").write_bytes(canonical_json(openapi_document()))
    click.echo("wrote " + ", ".join([*written, "docs/openapi.json"]))
