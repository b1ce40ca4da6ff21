"""Compare flights with a baseline, and measure how often the comparison is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ops import ROOT, artifacts_option

if TYPE_CHECKING:
    import pandas as pd

    from mlops_course.monitoring import Baseline, DriftReport, DriftVerdict

CAUSES = ROOT / "ops" / "known_causes.toml"
CALIBRATION = ROOT / "build" / "drift" / "calibration.json"
WINDOW_DAYS = 7
GOLDEN_DAYS = 56
SIZES = (200, 1_000, 20_000)  # flights in a window


class Failed(click.ClickException):
    """A command that could not do its work for a reason its message gives; the exit code is 1."""


def scored_flights(artifacts: Path) -> tuple[pd.DataFrame, dict[str, Any], str]:
    """Return all flights with the scores of the model in channel prod, its reference, and its version and digest."""
    from mlops_course.blueprint import MODEL_NAME, ArtifactError, load_dataset, resolve_channel, verify_artifact
    from mlops_course.monitoring import SCORE
    from mlops_course.training import onnx_scores

    try:
        folder, digest = resolve_channel(artifacts.resolve() / MODEL_NAME, "prod")
        verify_artifact(folder, digest)
    except ArtifactError as error:
        raise Failed(str(error)) from error
    flights = load_dataset()
    flights[SCORE] = onnx_scores((folder / "model.onnx").read_bytes(), flights)
    return flights, json.loads((folder / "reference.json").read_text()), f"{folder.name} {digest}"


def between(flights: pd.DataFrame, first: date, last: date) -> pd.DataFrame:
    """Return the flights of these days, both included."""
    when = flights["scheduled_departure"]
    return flights[(when >= first.isoformat()) & (when < (last + timedelta(days=1)).isoformat())]


def cut(first: date, last: date, days: int) -> list[tuple[date, date]]:
    """Cut a period into windows of so many days. What is left over at the end belongs to the last window."""
    count = max(1, ((last - first).days + 1) // days)
    starts = [first + timedelta(days=days * k) for k in range(count)]
    return [*((start, start + timedelta(days=days - 1)) for start in starts[:-1]), (starts[-1], last)]


def baseline_for(kind: str, flights: pd.DataFrame, reference: dict[str, Any], first: date) -> Baseline:
    """Return the training months, or the eight weeks before a window, as baseline."""
    from mlops_course.blueprint import SPLITS
    from mlops_course.monitoring import Baseline

    if kind == "training":
        start, after = (date.fromisoformat(day) for day in SPLITS["train"])
        return Baseline(kind, between(flights, start, after - timedelta(days=1)), reference)
    return Baseline(kind, between(flights, first - timedelta(days=GOLDEN_DAYS), first - timedelta(days=1)), reference)


def print_report(report: DriftReport, verdict: DriftVerdict, path: Path) -> None:
    """Print what one window says, and what it comes to together with those before it."""
    from mlops_course.monitoring import REMEDIES, sentence

    click.echo(
        f"{report.first} to {report.last}  {report.rows['all']:,} flights against {report.baseline}: "
        f"{report.severity}, with the windows before: {verdict.severity}"
    )
    for word, findings in (("alarm", verdict.alarms), ("wait", verdict.waiting), ("known", verdict.explained)):
        for finding in findings:
            click.echo(f"  {word:5}  {sentence(finding)}")
    for kind in dict.fromkeys(finding.kind for finding in (*verdict.alarms, *verdict.waiting)):
        click.echo(f"  to do  {kind}: {REMEDIES[kind]}")
    for feature, values in report.new_values.items():
        click.echo(f"  new    {feature}: " + ", ".join(f"{value} ({count})" for value, count in values.items()))
    click.echo(f"  {path}")


day_option = click.DateTime(formats=["%Y-%m-%d"])


@click.command(short_help="Compare flights of some days with a baseline: what has changed?")
@click.option("--from", "first", type=day_option, required=True, help="First day.")
@click.option("--to", "last", type=day_option, required=True, help="Last day.")
@click.option(
    "--baseline",
    type=click.Choice(["training", "golden"]),
    default="golden",
    help="The months of training, or the eight weeks before each window (the default).",
)
@click.option("--days", type=click.IntRange(1, 90), default=WINDOW_DAYS, help="Days in a window. Default: 7.")
@click.option("--causes", type=click.Path(path_type=Path, dir_okay=False), default=CAUSES, help="Known causes.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), required=True, help="Where reports go.")
@artifacts_option
def drift(
    first: datetime, last: datetime, baseline: str, days: int, causes: Path, output: Path, artifacts: Path
) -> None:
    """Check inputs, scores, missing and unknown values, window by window, and write a report for each.

    The flights are those of the course's data, scored by the model in channel prod. A window with findings also gets
    a page by Evidently. Findings are news, not errors: the exit code is 0 with and without them.
    """
    from mlops_course.monitoring import check_window, judge, load_causes, write_report

    if last < first:
        raise click.BadParameter(f"{last.date()} is before {first.date()}", param_hint="--to")
    try:
        known = load_causes(causes)
    except (OSError, ValueError) as error:
        raise Failed(
            f"cannot read the known causes: {error}; correct the file or give another with --causes"
        ) from error
    flights, reference, _ = scored_flights(artifacts)
    reports: list[DriftReport] = []
    normal = None
    for start, end in cut(first.date(), last.date(), days):
        window = between(flights, start, end)
        try:
            if normal is None or baseline == "golden":
                normal = baseline_for(baseline, flights, reference, start)
            reports.append(check_window(window, normal, known))
        except ValueError as error:
            raise Failed(f"{start} to {end}: {error}") from error
        path = write_report(reports[-1], window, normal, output)
        print_report(reports[-1], judge(reports), path)


def interval(hits: int, of: int) -> list[float]:
    """Return the 95 % interval of a share, by Wilson's formula."""
    z, share = 1.96, hits / of
    middle, spread = share + z * z / (2 * of), z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return [round((middle + sign * spread) / (1 + z * z / of), 4) for sign in (-1, 1)]


def evidently_flags(window: pd.DataFrame, sample: pd.DataFrame, columns: Sequence[str]) -> dict[str, bool]:
    """Return which columns have drifted by the rules that Evidently chooses by itself for this reference.

    The tests are called one by one, since a whole report takes a second; a test compares the two.
    """
    import os
    import warnings

    from mlops_course.blueprint import CATEGORICAL

    os.environ.setdefault("DO_NOT_TRACK", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from evidently.legacy.calculations.stattests import get_stattest
        from evidently.legacy.core import ColumnType

        found = {}
        for name in columns:
            kind = ColumnType.Categorical if name in CATEGORICAL else ColumnType.Numerical
            then, now = sample[name].dropna(), window[name].dropna()
            found[name] = bool(get_stattest(then, now, kind, None)(then, now, kind, None).drifted)
    return found


# Evidently chooses p-values for a reference of up to 1,000 rows, and distances for a larger one.
OURS, P_VALUES, DISTANCES = "ours", "Evidently, 1,000", "Evidently, 20,000"
EVIDENTLY_EVERY = 4  # its rules take longer, and are far enough from ours to need fewer windows
REFERENCES = {P_VALUES: 1_000, DISTANCES: 20_000}


def measure_false_alarms(
    flights: pd.DataFrame, normal: Baseline, samples: dict[str, pd.DataFrame], design: str, rows: int, windows: int
) -> Iterator[dict[str, int]]:
    """Yield, for each window without drift, which rules raise an alarm."""
    import numpy as np

    from mlops_course.monitoring import KEY_FEATURES, SCORE, check_window, draw_window

    rng = np.random.default_rng([rows, len(design), 1])
    for k in range(windows):
        window = draw_window(flights, rows, design, rng)  # type: ignore[arg-type]
        alarms = {OURS: int(bool(check_window(window, normal).findings))}
        for rule, sample in samples.items() if k % EVIDENTLY_EVERY == 0 else ():
            flags = evidently_flags(window, sample, [*KEY_FEATURES, SCORE])
            alarms[rule] = int(any(flags.values()))
            alarms[f"{rule}, half"] = int(2 * sum(flags.values()) >= len(flags))
            alarms.update({f"{rule}: {name}": int(flag) for name, flag in flags.items()})
        yield alarms


def measure_detection(
    flights: pd.DataFrame, normal: Baseline, samples: dict[str, pd.DataFrame], design: str, feature: str, windows: int
) -> Iterator[dict[str, int]]:
    """Yield, for each window of 1,000 flights with one feature moved, which rules find that feature."""
    import numpy as np

    from mlops_course.monitoring import KEY_FEATURES, check_window, draw_window, plant

    rng = np.random.default_rng([list(KEY_FEATURES).index(feature), len(design), 2])
    for k in range(windows):
        window = plant(draw_window(flights, 1_000, design, rng), feature, flights, rng)  # type: ignore[arg-type]
        found = {OURS: int(any(one.feature == feature for one in check_window(window, normal).findings))}
        for rule, sample in samples.items() if k % EVIDENTLY_EVERY == 0 else ():
            found[rule] = int(evidently_flags(window, sample, [feature])[feature])
        yield found


def summed(rows: Sequence[dict[str, int]]) -> dict[str, dict[str, Any]]:
    """Return, for each rule, how often it spoke."""
    found = {}
    for rule in rows[0]:
        spoke = [row[rule] for row in rows if rule in row]
        found[rule] = {
            "hits": sum(spoke),
            "windows": len(spoke),
            "share": round(sum(spoke) / len(spoke), 4),
            "interval": interval(sum(spoke), len(spoke)),
        }
    return found


@click.command("calibrate-drift", short_help="Measure false alarms and detection of the drift rules.")
@click.option(
    "--windows", type=click.IntRange(10), default=400, help="Windows without drift of each kind. Default: 400."
)
@click.option("--planted", type=click.IntRange(10), default=200, help="Windows with a planted shift. Default: 200.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), default=CALIBRATION, help="The JSON file.")
@artifacts_option
def calibrate_drift(windows: int, planted: int, output: Path, artifacts: Path) -> None:
    """Draw windows from the training months and see what our rule and Evidently's default rules say.

    Windows of 200, 1,000 and 20,000 flights, drawn as single flights or as consecutive days, seeds fixed. In half of
    the work one feature is moved. Takes some minutes; `make publish` copies the result into docs/reports.
    """
    from rich.progress import track

    from mlops_course.blueprint import canonical_json, split_by_time
    from mlops_course.monitoring import KEY_FEATURES, Baseline

    flights, reference, model = scored_flights(artifacts)
    train = split_by_time(flights)["train"]
    normal = Baseline("training", train, reference)
    samples = {rule: train.sample(rows, random_state=5) for rule, rows in REFERENCES.items()}
    alarms, detected = [], []
    for design in ("rows", "days"):
        for size in SIZES:
            steps = measure_false_alarms(train, normal, samples, design, size, windows)
            seen = list(track(steps, f"no drift, {size:,} flights, {design}", total=windows))
            rules = summed(seen)
            columns = {rule: rules.pop(rule)["share"] for rule in list(rules) if ": " in rule}
            alarms.append({"design": design, "rows": size, "rules": rules, "columns": columns})
        for feature in KEY_FEATURES:
            steps = measure_detection(train, normal, samples, design, feature, planted)
            seen = list(track(steps, f"planted in {feature}, {design}", total=planted))
            detected.append({"design": design, "rows": 1_000, "feature": feature, "rules": summed(seen)})
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(canonical_json({"model": model, "false_alarms": alarms, "detection": detected}))
    click.echo(f"wrote {output}")
