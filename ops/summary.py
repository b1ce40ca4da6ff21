"""The summary for everybody: what Prometheus, the labels and the drift reports say, on one page."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ops import ROOT

if TYPE_CHECKING:
    from mlops_course.monitoring import Figure, Plot, Quality, Risk, Summary

TITLE = "Flight disruption: how is it doing?"
UNITS = {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}
STEPS = 42  # points of a plot: every four hours of a week
ENOUGH_SEEN = 0.9  # of the period; with less, somebody has to know


class SummaryError(click.ClickException):
    """The page cannot be made; the message says why and what to do."""


def seconds_of(_context: click.Context, _parameter: click.Parameter, text: str) -> int:
    """Turn '7d' into seconds."""
    found = re.fullmatch(r"(\d+)([mhdw])", text)
    if not found or not int(found[1]):
        raise click.BadParameter(f"'{text}' is no period; write a number and m, h, d or w, such as 7d")
    return int(found[1]) * UNITS[found[2]]


@dataclass(frozen=True)
class Prometheus:
    """Answers about one period, from Prometheus' HTTP interface."""

    url: str
    end: float  # Unix seconds
    period: int  # seconds

    def get(self, what: str, **parameters: str | float) -> Any:
        """Return what it answers. Raises `SummaryError` when it does not."""
        import httpx

        try:
            answer = httpx.get(f"{self.url}/api/v1/{what}", params=parameters, timeout=60)
            body = answer.json()
        except (httpx.HTTPError, ValueError) as error:
            raise SummaryError(
                f"{self.url} does not answer as Prometheus ({error}); start it, or name another with --prometheus"
            ) from error
        if body.get("status") != "success":
            raise SummaryError(f"{self.url} refuses: {body.get('error', answer.text[:200])}")
        return body["data"]

    def value(self, expr: str, before: int = 0) -> float | None:
        """Return one number at the end of the period, or some seconds `before` it; None if there is none."""
        found = self.get("query", query=expr, time=self.end - before)["result"]
        number = float(found[0]["value"][1]) if found else math.nan
        return number if math.isfinite(number) else None

    def pair(self, expr: str) -> tuple[float | None, float | None]:
        """Return one number for this period and for the one before."""
        return self.value(expr), self.value(expr, self.period)

    def labels(self, expr: str) -> list[dict[str, str]]:
        """Return the labels of what an expression finds, at the end of the period."""
        return [one["metric"] for one in self.get("query", query=expr, time=self.end)["result"]]

    def over_time(self, expr: str) -> list[tuple[str, float | None]]:
        """Return the values of the first series over the period; None where there is none."""
        step = self.period / STEPS
        start = self.end - self.period + step
        found = self.get("query_range", query=expr, start=start, end=self.end, step=step)["result"]
        known = {round(float(at)): float(value) for at, value in (found[0]["values"] if found else [])}
        times = [round(start + n * step) for n in range(STEPS)]
        values = [next((known[t + d] for d in (0, 1, -1) if t + d in known), math.nan) for t in times]
        return [
            (datetime.fromtimestamp(t, UTC).isoformat(timespec="seconds"), v if math.isfinite(v) else None)
            for t, v in zip(times, values, strict=True)
        ]

    def seen(self) -> float | None:
        """Return for which share of the period the service was scraped."""
        step = max(15, round(self.period / 1000))
        counted = self.value(f'count_over_time(max(up{{job="service"}})[{self.period}s:{step}s])')
        return min(1.0, counted * step / self.period) if counted else None


def worse(*values: float | None) -> float | None:
    """Return the smallest of the values that are known."""
    known = [value for value in values if value is not None]
    return min(known) if known else None


def service_figures(asked: Prometheus) -> Iterator[Figure]:
    """Yield what was promised to users, and how much they used it."""
    from mlops_course.blueprint import CRITERIA
    from mlops_course.monitoring import Figure, Limits, light
    from ops.grafana.queries import DOOR, failed, ratio

    promised, slow = CRITERIA["success_rate"].limit, CRITERIA["latency_p95_ms"].limit
    window = f"{asked.period}s"

    def at_door(length: str) -> str:
        both = (f'{DOOR},envoy_response_code_class="5"', DOOR)
        return ratio(*(f"sum(increase(envoy_http_downstream_rq_xx{{{labels}}}[{length}]))" for labels in both))

    inside, outside = (asked.pair(f"1 - {share(window)}") for share in (failed, at_door))
    succeeded, earlier = (worse(*both) for both in zip(inside, outside, strict=True))
    yield Figure(
        name="Predictions that succeed",
        value=succeeded,
        form=".2%",
        before=earlier,
        least=0.0002,
        better="more",
        light=light(succeeded, Limits(fine=promised, act=0.98)),
        target=f"Promised: {promised:.1%} over 30 days.".replace("%", "\N{NO-BREAK SPACE}%"),
        note="" if outside[0] is not None else "As the service counts; what it could not answer at all is not known.",
    )
    month = worse(*(asked.value(f"1 - {share('30d')}") for share in (failed, at_door)))
    left = None if month is None else 1 - (1 - month) / (1 - promised)
    yield Figure(
        name="Error budget left",
        value=left,
        form=".0%",
        better="more",
        light=light(left, Limits(fine=0.25, act=0)),
        target="Of the failures that 30 days allow. At none, only repairs are released.",
    )
    buckets = f'http_request_duration_seconds_bucket{{route="/v1/predict",outcome="answered"}}[{window}]'
    p95, p95_before = (
        None if value is None else 1000 * value
        for value in asked.pair(f"histogram_quantile(0.95, sum by (le) (increase({buckets})))")
    )
    yield Figure(
        name="95 % of predictions take at most",
        value=p95,
        form=",.0f" if (p95 or 0) >= 10 else ",.1f",
        unit="ms",
        before=p95_before,
        least=max(5, 0.1 * (p95_before or 0)),
        better="less",
        light=light(p95, Limits(fine=slow, act=2 * slow)),
        target=f"Promised: {slow:.0f} ms.",
    )
    flights, flights_before = asked.pair(f"sum(increase(model_predictions_total[{window}]))")
    yield Figure(
        name="Flights scored",
        value=flights,
        form=",.0f",
        before=flights_before or None,
        least=0.05 * (flights_before or 0),
    )


def drift_figures(asked: Prometheus) -> Iterator[Figure]:
    """Yield how different inputs and scores are from training."""
    from mlops_course.monitoring import Figure, Limits, light
    from ops.grafana.story import TIMETABLE

    worst = f'topk(1, max by (feature) (model:feature_psi:1d{{feature=~"{TIMETABLE}"}}))'
    (value, before), which = asked.pair(worst), asked.labels(worst)
    yield Figure(
        name="Drift of the inputs",
        value=value,
        form=".2f",
        unit="PSI",
        before=before,
        least=0.02,
        better="less",
        light=light(value, Limits(fine=0.1, act=0.25)),
        target="Below 0.1 is little, above 0.25 much.",
        note=f"Largest: {which[0]['feature']}, over the last day. Weather is left out: it changes every day."
        if which
        else "",
    )
    value, before = asked.pair("max(model:score_psi:7d)")
    yield Figure(
        name="Drift of the scores",
        value=value,
        form=".2f",
        unit="PSI",
        before=before,
        least=0.05,
        better="less",
        light=light(value, Limits(fine=0.7, act=0.8)),
        target="Over a week. No week of the training months passed 0.77.",
    )


def alert_risks(asked: Prometheus) -> Iterator[Risk]:
    """Yield what fires now."""
    from mlops_course.monitoring import Risk

    for alert in asked.get("alerts")["alerts"]:
        if alert["state"] == "firing":
            labels, words = alert["labels"], alert["annotations"]
            text = words.get("summary", labels["alertname"])
            yield Risk(
                light="red" if labels.get("severity") == "page" else "yellow",
                text=f"{labels['alertname']}: {text}.".replace("..", "."),
                doing=words.get("action", ""),
            )


def watching_risks(asked: Prometheus, seen: float | None) -> Iterator[Risk]:
    """Yield what is not known because nobody looked."""
    from mlops_course.monitoring import Risk

    up = asked.value('max(up{job="service"})')
    if up is None:
        yield Risk(light="unknown", text="Prometheus does not watch the service now.", doing="Check its target.")
    elif up == 0:
        yield Risk(light="red", text="The service does not answer Prometheus now.", doing="Follow the playbook.")
    if seen is not None and seen < ENOUGH_SEEN:
        yield Risk(
            light="unknown", text=f"Only {seen:.1%} of the period was measured.".replace("%", "\N{NO-BREAK SPACE}%")
        )


def service_plots(asked: Prometheus) -> Iterator[Plot]:
    """Yield availability and p95 over time."""
    from mlops_course.blueprint import CRITERIA
    from mlops_course.monitoring import Plot, Point
    from ops.grafana.queries import failed

    promised, slow = CRITERIA["success_rate"].limit, CRITERIA["latency_p95_ms"].limit
    window = f"{round(asked.period / STEPS)}s"
    points = [Point(at, value) for at, value in asked.over_time(f"1 - {failed(window)}")]
    below = sum(point.value < promised for point in points if point.value is not None)
    known = sum(point.value is not None for point in points)
    yield Plot(
        title=f"Success was below the promise in {below} of {known} parts of the period"
        if known
        else "Success: no data",
        axis="predictions that succeed",
        lines={"share": points},
        limits={"promised": promised},
        percent=True,
    )
    buckets = f'http_request_duration_seconds_bucket{{route="/v1/predict",outcome="answered"}}[{window}]'
    times = asked.over_time(f"1000 * histogram_quantile(0.95, sum by (le) (increase({buckets})))")
    largest = max((value for _, value in times if value is not None), default=None)
    yield Plot(
        title="Time of a prediction: no data"
        if largest is None
        else f"95 % of predictions took at most {largest:.3g} ms",
        axis="p95, ms",
        lines={"p95": [Point(*one) for one in times]},
        limits={"promised": slow},
    )


def drift_plot(asked: Prometheus) -> Plot:
    """Return PSI over time."""
    from mlops_course.monitoring import Plot, Point
    from ops.grafana.story import TIMETABLE

    exprs = {
        "inputs (day)": f'max(model:feature_psi:1d{{feature=~"{TIMETABLE}"}})',
        "scores (week)": "max(model:score_psi:7d)",
    }
    lines = {name: [Point(*one) for one in asked.over_time(expr)] for name, expr in exprs.items()}
    largest = max((p.value for p in lines["inputs (day)"] if p.value is not None), default=None)
    title = "Drift: no data" if largest is None else f"The inputs' largest PSI was {largest:.2f}"
    return Plot(
        title=title, axis="PSI against training", lines=lines, limits={"inputs: much": 0.25, "scores: much": 0.8}
    )


def read_drift(files: Sequence[Path]) -> tuple[list[Figure], list[Risk]]:
    """Return what the reports of `python -m ops drift` say together. Raises `SummaryError` for other files."""
    from mlops_course.monitoring import DriftReport, drift_facts

    if not files:
        return [], []
    try:
        reports = [DriftReport.model_validate_json(file.read_bytes()) for file in files]
    except ValueError as error:
        raise SummaryError(f"not a drift report: {error}; give files that `python -m ops drift` wrote") from error
    if len({report.baseline for report in reports}) > 1:
        raise SummaryError("these drift reports have different baselines; give those of one")
    figure, risks = drift_facts(sorted(reports, key=lambda report: report.last))
    return [figure], risks


def read_quality(file: Path | None, serving: Collection[str]) -> tuple[list[Figure], list[Risk], list[Plot]]:
    """Return what the labels say about the latest weeks of the model that serves, beside the month before them."""
    from mlops_course.monitoring import quality_figures, quality_plot, quality_risks

    months, latest = parse_quality(file) if file else ([], [])
    mine = [one for one in latest if one.model_version in serving or not serving][:1]
    before = [m for one in mine for m in months if m.model_version == one.model_version and m.last_day < one.first_day]
    versions: dict[str, list[Quality]] = {one.model_version: [] for one in mine}
    for month in months:
        versions.setdefault(month.model_version, []).append(month)
    plots = [quality_plot(versions, metric) for metric in ("roc_auc", "recall_at_budget")] if versions else []
    return quality_figures([*before, *mine]), [risk for one in mine for risk in quality_risks(one)], plots


def parse_quality(file: Path) -> tuple[list[Quality], list[Quality]]:
    """Return the months, and the latest weeks, of each model version. Raises `SummaryError` for another file."""
    from mlops_course.monitoring import Quality

    try:
        report = json.loads(file.read_bytes())
        months, latest = ([Quality.model_validate(one) for one in report[part]] for part in ("months", "latest"))
    except (ValueError, KeyError, TypeError) as error:
        raise SummaryError(f"{file}: {error}; give the quality.json that `python -m ops quality` wrote") from error
    return months, latest


def collect(asked: Prometheus, said: str, drift: Sequence[Path], quality: Path | None) -> Summary:
    """Ask everybody who knows something, and put it together."""
    from mlops_course.monitoring import Summary

    seen, serving = asked.seen(), asked.labels("release_info")
    drift_figure, drift_risks = read_drift(drift)
    quality_figures, quality_risks, quality_plots = read_quality(quality, [one["model_version"] for one in serving])
    risks = [*watching_risks(asked, seen), *alert_risks(asked), *quality_risks, *drift_risks]
    order = ("red", "unknown", "yellow", "green")
    end = datetime.fromtimestamp(asked.end, UTC)
    return Summary(
        title=TITLE,
        release=" and ".join(sorted({one["release"] for one in serving})) or "not known",
        first=end - timedelta(seconds=asked.period),
        last=end,
        made_at=datetime.now(UTC),
        seen=seen,
        said=said,
        service=list(service_figures(asked)),
        model=[*drift_figures(asked), *drift_figure, *quality_figures],
        risks=sorted(risks, key=lambda risk: order.index(risk.light)),
        plots=[*service_plots(asked), drift_plot(asked), *quality_plots],
    )


readable = click.Path(path_type=Path, dir_okay=False, exists=True)


@click.command(short_help="Write the summary for everybody: one HTML page.")
@click.option("--prometheus", "url", default="http://127.0.0.1:9090", show_default=True, help="Its address.")
@click.option("--period", default="7d", show_default=True, callback=seconds_of, help="Up to now: 90m, 6h, 7d, 4w.")
@click.option("--quality", type=readable, help="What `ops quality` wrote.")
@click.option("--drift", type=readable, multiple=True, help="What `ops drift` wrote; again for each report.")
@click.option("--said", default="", help="What happened, in a few sentences: 'This week we deployed ...'.")
@click.option("--said-in", type=readable, help="The same, in a text file.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), default=ROOT / "build" / "summary")
def summary(
    url: str, period: int, quality: Path | None, drift: tuple[Path, ...], said: str, said_in: Path | None, output: Path
) -> None:
    """Write index.html, which needs no network, and summary.json, what it says.

    What cannot be known (no data, no labels, no reports) is said to be not known. An unreachable Prometheus is an
    error: no page is better than an empty one that looks new.
    """
    from mlops_course.monitoring import SIGNS, render_summary, three_answers

    if said and said_in:
        raise click.UsageError("give --said or --said-in, not both")
    words = said_in.read_text(encoding="utf-8").strip() if said_in else said
    asked = Prometheus(url.rstrip("/"), datetime.now(UTC).timestamp(), period)
    facts = collect(asked, words, drift, quality)
    output.mkdir(parents=True, exist_ok=True)
    (output / "summary.json").write_text(facts.model_dump_json(indent=2) + "\n", encoding="utf-8")
    (output / "index.html").write_text(render_summary(facts), encoding="utf-8")
    for question, shade, answer, reason in three_answers(facts):
        click.echo(f"{SIGNS[shade][0]} {question} {answer}. {reason}")
    click.echo(f"wrote {output / 'index.html'}")
