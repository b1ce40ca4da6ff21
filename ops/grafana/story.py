"""What the operator dashboard asks, from top to bottom: what users notice first, what may explain it below.

Each panel answers the question in its title; one that answers none does not belong here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mlops_course.blueprint import ALERT_BUDGET, CRITERIA
from ops.grafana.queries import (
    DOOR,
    ORIGIN,
    PREDICT,
    RATE,
    RELEASE,
    burned,
    change,
    failed,
    per_flight,
    psi,
    quantile,
    rate,
    ratio,
)

LIMIT_MS = round(CRITERIA["latency_p95_ms"].limit)
LIMIT_S = LIMIT_MS / 1000
SUCCESS = CRITERIA["success_rate"].limit
ROLLBACK_ERRORS = 0.02
GAP = CRITERIA["calibration_error"].limit
# What a timetable decides: features whose days are alike, so that a change means something.
TIMETABLE = "carrier|origin|dest|distance_miles|minute_of_day"
FEATURE = f'{RELEASE},feature="$feature"'

Kind = Literal["lines", "areas", "value", "bars"]
Steps = tuple[tuple[float | None, str], ...]  # (from this value on, colour); None: from the lowest


UP_IS_BAD = {
    "errors": ((None, "green"), (1 - SUCCESS, "yellow"), (ROLLBACK_ERRORS, "red")),
    "seconds": ((None, "green"), (LIMIT_S, "red")),
    "full": ((None, "green"), (0.8, "yellow"), (0.95, "red")),
}


@dataclass(frozen=True)
class Query:
    """One expression, and the name of its series."""

    expr: str
    name: str  # {{label}} is replaced
    limit: bool = False  # drawn as a dashed line that others are compared with


@dataclass(frozen=True)
class Chart:
    """One panel: a question and what answers it."""

    title: str
    description: str  # how to read it, and what to do
    unit: str  # of Grafana
    queries: Sequence[Query]
    kind: Kind = "lines"
    steps: Steps | None = None
    width: int = 8  # of 24 columns
    axis: str = ""  # what the axis shows; the unit follows from `unit`
    low: float | None = 0
    high: float | None = None
    decimals: int | None = None
    words: dict[str, tuple[str, str]] = field(default_factory=dict)  # value: (text, colour)
    nothing: str = "no data"  # what is shown then

    @property
    def height(self) -> int:
        """Rows of the grid."""
        return 4 if self.kind == "value" else 8


def users() -> Iterator[Chart]:
    """Can people get predictions?"""
    yield Chart(
        "Can predictions be had now?",
        "The service answers Prometheus, and its verified model is loaded. 'no' or no data: start with the "
        "playbook's first response.",
        "none",
        [Query('min(up{job="service"}) * min(model_ready{job="service"})', "ready")],
        kind="value",
        steps=((None, "red"), (1, "green")),
        width=4,
        words={"0": ("no", "red"), "1": ("yes", "green")},
    )
    yield Chart(
        "How many predictions succeeded?",
        "Share of the predictions in the period shown that did not end in a server error. Promised: 99.9 % over 30 "
        "days.",
        "percentunit",
        [Query(f"1 - {failed('$__range')}", "succeeded")],
        kind="value",
        steps=((None, "red"), (1 - ROLLBACK_ERRORS, "yellow"), (SUCCESS, "green")),
        width=4,
        decimals=3,
        nothing="no predictions",
    )
    yield Chart(
        "How much error budget is left?",
        "Of the 0.1 % of failed predictions that 30 days allow. Below zero the promise is broken: release nothing "
        "but repairs.",
        "percentunit",
        [Query(f"1 - {burned('30d')}", "left of 30 days")],
        kind="value",
        steps=((None, "red"), (0, "yellow"), (0.5, "green")),
        width=4,
        low=None,
        decimals=0,
        nothing="no predictions",
    )
    yield Chart(
        "Are predictions in time?",
        f"Share of answered /v1/predict requests within {LIMIT_MS} ms in the period shown. Promised: 95 %.",
        "percentunit",
        [
            Query(
                ratio(
                    *(
                        f'sum(increase(http_request_duration_seconds_{part}{{route="/v1/predict",outcome="answered"{le}}}'
                        "[$__range]))"
                        for part, le in (("bucket", f',le="{LIMIT_S:g}"'), ("count", ""))
                    )
                ),
                "in time",
            )
        ],
        kind="value",
        steps=((None, "red"), (0.95, "green")),
        width=4,
        decimals=2,
        nothing="no predictions",
    )
    yield Chart(
        "How many alerts fire?",
        "Alerts that fire now; Alertmanager lists them, and each links to its section of the playbook.",
        "none",
        [Query('count(ALERTS{alertstate="firing"}) or vector(0)', "firing")],
        kind="value",
        steps=((None, "green"), (1, "red")),
        width=4,
    )
    yield Chart(
        "Which release answers?",
        "Commit of the service, version of the model, fingerprint of the settings. More than one during a rollout.",
        "none",
        [Query('count by (release, model_version) (release_info{job="service"})', "{{release}}")],
        kind="value",
        steps=((None, "blue"),),
        width=4,
    )
    yield Chart(
        "Do predictions fail?",
        "Share of predictions that end in a server error, by release. Yellow: more than the promise allows. Red: "
        "with it for ten minutes after a deployment, roll back.",
        "percentunit",
        [
            Query(
                ratio(
                    rate("http_requests_total", "release", f'{PREDICT},{RELEASE},status=~"5.."'),
                    rate("http_requests_total", "release", f"{PREDICT},{RELEASE}"),
                    "release",
                ),
                "{{release}}",
            )
        ],
        steps=UP_IS_BAD["errors"],
        axis="failed predictions",
        nothing="no predictions",
        width=6,
    )
    yield Chart(
        "How fast is the error budget spent?",
        "At 1 it lasts exactly 30 days. At 14.4 over an hour, two days' worth is gone: somebody is called. At 6 "
        "over six hours as well. The worse of service and door counts.",
        "none",
        [Query(burned(window), f"last {window}") for window in ("1h", "6h", "3d")],
        steps=((None, "green"), (1, "yellow"), (6, "orange"), (14.4, "red")),
        axis="times too fast",
        width=6,
        nothing="no predictions",
    )
    yield Chart(
        "What do clients get at the door?",
        "Envoy's answers by class. Only Envoy sees a service that is dead or hangs: 5xx here and none on the left "
        "means that the service cannot be reached.",
        "reqps",
        [
            Query(
                rate("envoy_http_downstream_rq_xx", "envoy_response_code_class", DOOR),
                "{{envoy_response_code_class}}xx",
            )
        ],
        axis="answers",
        width=6,
    )
    yield Chart(
        "Which answers are not 200?",
        "By status: 401 key, 408 slow body, 413 too large, 415 type, 422 bad input, 499 the client left, 500 a bug "
        "of ours, 503 overloaded or not ready.",
        "reqps",
        [Query(rate("http_requests_total", "status", f'{PREDICT},{RELEASE},status!="200"'), "{{status}}")],
        kind="areas",
        axis="answers",
        width=6,
    )


def speed() -> Iterator[Chart]:
    """Is it getting slower?"""
    one = f'route="/v1/predict",outcome="answered",{RELEASE}'
    yield Chart(
        "How long does one prediction take?",
        f"Answered /v1/predict requests, measured in the service. The red line: 95 % have to be below {LIMIT_MS} ms. "
        "p50 is the usual client, p99 the unlucky one.",
        "s",
        [Query(quantile(q / 100, "release", one), f"p{q} {{{{release}}}}") for q in (50, 95, 99)],
        steps=UP_IS_BAD["seconds"],
        axis="time",
        width=12,
        nothing="no predictions",
    )
    yield Chart(
        "Which route is slow, in which release?",
        "p95 of every request with a promise about its time, refused ones included. A batch has up to 1,000 "
        "flights. Slower exactly at a release mark: compare the stages below.",
        "s",
        [Query(quantile(0.95, "route, release", RELEASE), "{{route}} {{release}}")],
        steps=UP_IS_BAD["seconds"],
        axis="p95",
        width=12,
        nothing="no requests",
    )


def traffic() -> Iterator[Chart]:
    """Did the traffic change?"""
    yield Chart(
        "How many requests come, and to what?",
        "By route, whatever the answer. 'unmatched' are paths that do not exist.",
        "reqps",
        [Query(rate("http_requests_total", "route", RELEASE), "{{route}}")],
        kind="areas",
        axis="requests",
    )
    yield Chart(
        "Is this the usual traffic?",
        "Predictions, now and as long ago as chosen above. Half of the usual: ask the clients before the machines.",
        "reqps",
        [
            Query(f"sum(rate(model_predictions_total[{RATE}]))", "now"),
            Query(f"sum(rate(model_predictions_total[{RATE}] offset $compare))", "$compare before", limit=True),
        ],
        axis="flights scored",
    )
    yield Chart(
        "What is wrong with refused requests?",
        "Mistakes in requests that got 422, by field and reason: one field means one broken client or pipeline, "
        "many fields a new client. Nothing is shown while there is none.",
        "reqps",
        [
            Query(
                f"topk(10, {rate('model_validation_failures_total', 'field, reason', RELEASE)} > 0)",
                "{{field}}: {{reason}}",
            )
        ],
        kind="areas",
        axis="mistakes",
        nothing="none",
    )


def capacity() -> Iterator[Chart]:
    """Is it near its limits?"""
    own = 'job="service"'
    yield Chart(
        "Is the processor busy?",
        "Cores used by each process; one works on one core. The dashed line is the container's limit. At the line "
        "with slow answers: more containers, or back to the release before.",
        "none",
        [
            Query(f"sum by (instance) (rate(process_cpu_seconds_total{{{own}}}[{RATE}]))", "{{instance}}"),
            Query(f"max(cgroup_cpu_quota_cores{{{own}}})", "limit", limit=True),
        ],
        axis="cores",
        width=6,
    )
    yield Chart(
        "Is there enough memory?",
        "Resident memory of each process. At the dashed line the container is killed. Growth that does not end is a "
        "leak.",
        "bytes",
        [
            Query(f"process_resident_memory_bytes{{{own}}}", "{{instance}}"),
            Query(f"max(cgroup_memory_limit_bytes{{{own}}})", "limit", limit=True),
        ],
        axis="memory",
        width=6,
    )
    yield Chart(
        "Was it restarted?",
        "Starts of a process within half an hour. One at a release mark is a deployment; three are a crash loop.",
        "none",
        [Query(f"sum by (instance) (changes(process_start_time_seconds{{{own}}}[30m]))", "{{instance}}")],
        steps=((None, "green"), (1, "yellow"), (3, "red")),
        axis="restarts in half an hour",
        width=6,
        decimals=0,
    )
    yield Chart(
        "Does the system hold the processor back?",
        "Share of the scheduler's periods in which the container had used up its processor time and had to wait. "
        "Matters when answers are slow at the same time.",
        "percentunit",
        [
            Query(
                ratio(
                    f"sum by (instance) (rate(cgroup_cpu_throttled_periods_total{{{own}}}[{RATE}]))",
                    f"sum by (instance) (rate(cgroup_cpu_periods_total{{{own}}}[{RATE}]))",
                    "instance",
                ),
                "{{instance}}",
            )
        ],
        steps=((None, "green"), (0.25, "red")),
        axis="periods",
        width=6,
        nothing="no container",
    )
    yield Chart(
        "Do requests queue?",
        "Requests and batches in work, as a share of what is admitted. At 100 % the next one gets 503 with "
        "Retry-After.",
        "percentunit",
        [
            Query("max(service_requests_waiting / service_requests_waiting_limit)", "requests"),
            Query("max(service_batches_in_flight / service_batches_in_flight_limit)", "batches"),
        ],
        steps=UP_IS_BAD["full"],
        axis="of the limit",
    )
    yield Chart(
        "Is the event loop late?",
        "How late a timer fires in the process: everything waits that long. Steadily above 50 ms: something blocks "
        "the loop, or there is more traffic than one process can take.",
        "s",
        [
            Query(
                f"histogram_quantile({q / 100:g}, {rate('service_event_loop_lag_seconds_bucket', 'le', own)})", f"p{q}"
            )
            for q in (50, 99)
        ],
        steps=((None, "green"), (0.05, "yellow"), (0.1, "red")),
        axis="lag",
    )
    yield Chart(
        "Are there enough file descriptors?",
        "Open connections and files, as a share of the limit.",
        "percentunit",
        [Query(f"process_open_fds{{{own}}} / process_max_fds{{{own}}}", "{{instance}}")],
        steps=UP_IS_BAD["full"],
        axis="of the limit",
    )


def inference() -> Iterator[Chart]:
    """Where does the time go, inside?"""
    yield Chart(
        "Where does the time of a prediction go?",
        "Mean time in each stage; together the time in our code. A batch counts as one request, so batches raise it.",
        "s",
        [
            Query(
                ratio(
                    rate("model_stage_duration_seconds_sum", "stage", RELEASE),
                    rate("model_stage_duration_seconds_count", "stage", RELEASE),
                    "stage",
                ),
                "{{stage}}",
            )
        ],
        kind="areas",
        axis="mean time",
        nothing="no predictions",
    )
    yield Chart(
        "Which stage is slow at times?",
        "p95 of each stage. 'model' alone: the model or a neighbour on the machine; 'validate' alone: large "
        "batches; all at once: the processor.",
        "s",
        [Query(quantile(0.95, "stage", RELEASE, "model_stage_duration_seconds"), "{{stage}}")],
        axis="p95",
        nothing="no predictions",
    )
    yield Chart(
        "Could a model not be loaded?",
        "Loads that were refused: wrong digest, changed file, golden request not repeated. The log says which. The "
        "release that serves goes on.",
        "none",
        [Query("sum by (instance) (increase(model_load_failures_total[1h]))", "{{instance}}")],
        steps=((None, "green"), (0.5, "red")),
        axis="failures in an hour",
        width=4,
        decimals=0,
    )
    yield Chart(
        "How long did loading take?",
        "Last load of the model, by step. A start is ready after the sum.",
        "s",
        [Query("max by (step) (model_load_duration_seconds)", "{{step}}")],
        kind="bars",
        steps=((None, "blue"), (10, "yellow")),
        width=4,
    )


def inputs() -> Iterator[Chart]:
    """Did the inputs change?"""
    judged = f'{RELEASE},feature=~"{TIMETABLE}"'
    yield Chart(
        "Did what a timetable decides change?",
        "PSI of the chosen window against the chosen baseline. In training it never passed 0.05 on any day. Yellow: "
        "find out. Red, two at once: suspect the pipeline. A step at a release mark is ours; a slope is the world.",
        "none",
        [Query(f"max by (feature) ({psi('feature_bin', 'feature', judged)})", "{{feature}}")],
        steps=((None, "green"), (0.1, "yellow"), (0.25, "red")),
        axis="PSI",
        nothing="fewer than 500 flights",
    )
    yield Chart(
        "Which inputs differ most, weather included?",
        "PSI of the chosen window against the chosen baseline, the eight largest. A day's weather is never half a "
        "year's: 1 to 8 is usual, so nothing is judged here. What it does to the scores is below.",
        "none",
        [Query(f"topk(8, max by (feature) ({psi('feature_bin', 'feature')}))", "{{feature}}")],
        kind="bars",
        steps=((None, "blue"),),
        decimals=2,
        nothing="fewer than 500 flights",
    )
    yield Chart(
        "Which values of $feature became more or less frequent?",
        "Each bin's share in the chosen window minus its share in the baseline, in percentage points. Bins of "
        "numbers are counted from the lowest.",
        "percentunit",
        [Query(f"sort_desc(max by (bin) ({change('feature_bin', FEATURE)}))", "{{bin}}")],
        kind="bars",
        steps=((None, "blue"),),
        low=None,
        decimals=1,
        nothing="fewer than 500 flights",
    )
    yield Chart(
        "Is more missing than in training?",
        "Share of flights without the value, minus that share in training. A step: a source of weather or of delays "
        "has stopped; the model answers, but knows less. Pressure and the recent delay have gaps of hours in "
        "training too.",
        "percentunit",
        [
            Query(
                f"{per_flight('model_missing_values_total', 'feature')} "
                f"- on (feature) max by (feature) (model_missing_expected_share{{{RELEASE}}})",
                "{{feature}}",
            )
        ],
        steps=((None, "green"), (0.1, "yellow")),
        axis="missing, above training",
        low=None,
        nothing="no predictions",
    )
    yield Chart(
        "Do values come that training never saw?",
        "Share of flights with an unknown carrier, airport or destination; the model treats them as 'other'. The "
        "drift report names them.",
        "percentunit",
        [Query(per_flight("model_unknown_categories_total", "feature"), "{{feature}}")],
        steps=((None, "green"), (0.01, "yellow")),
        axis="unknown",
        nothing="no predictions",
    )
    yield Chart(
        "Where do the flights leave?",
        "Flights scored by origin. Many changes are those of one airport only.",
        "reqps",
        [Query(rate("model_predictions_total", "origin", f"{RELEASE},{ORIGIN}"), "{{origin}}")],
        kind="areas",
        axis="flights scored",
    )


def predictions() -> Iterator[Chart]:
    """Did the predictions change?"""
    chosen = f"{RELEASE},{ORIGIN}"
    yield Chart(
        "Do the scores look like in the baseline?",
        "PSI of the published probabilities by origin, chosen window against chosen baseline. One airport alone: "
        "look at its weather and traffic. All at once: an input, or the model.",
        "none",
        [Query(f"max by (origin) ({psi('score_bin_by_origin', 'origin', chosen)})", "{{origin}}")],
        axis="PSI",
        width=6,
        nothing="fewer than 500 flights",
    )
    yield Chart(
        "Do scores and delays of a week leave training's range?",
        "PSI of the last seven days against training. They follow the weather from day to day; no week of training "
        "passed 0.77 (scores) and 0.56 (recent delay).",
        "none",
        [
            Query(f"max(model:score_psi:7d{{{RELEASE}}})", "scores"),
            Query(f'max(model:feature_psi:7d{{{RELEASE},feature="recent_origin_delay_min"}})', "recent delay"),
        ],
        steps=((None, "green"), (0.7, "yellow"), (0.8, "red")),
        axis="PSI, last week",
        width=6,
        nothing="fewer than 500 flights",
    )
    yield Chart(
        "How many flights are warned?",
        f"Share of flights called disrupted, by origin. The desk can work on {ALERT_BUDGET:.0%} (the line); far more "
        "and it ignores warnings, none at all and something is broken.",
        "percentunit",
        [
            Query(
                ratio(
                    rate("model_predictions_total", "origin", f'{chosen},decision="disrupted"'),
                    rate("model_predictions_total", "origin", chosen),
                    "origin",
                ),
                "{{origin}}",
            )
        ],
        steps=((None, "green"), (ALERT_BUDGET, "yellow")),
        axis="warned",
        width=6,
        nothing="no predictions",
    )
    yield Chart(
        "Which risk does the model see?",
        "Mean probability by origin. It is calibrated on average, so it also estimates the share of disrupted "
        "flights before their labels come, as long as the world works as in training.",
        "percentunit",
        [
            Query(
                ratio(
                    rate("model_score_sum_total", "origin", chosen),
                    rate("model_predictions_total", "origin", chosen),
                    "origin",
                ),
                "{{origin}}",
            )
        ],
        axis="mean probability",
        width=6,
        nothing="no predictions",
    )


def quality() -> Iterator[Chart]:
    """Was the model right, as far as the outcomes are known?"""
    for metric, title, text, unit, steps in (
        (
            "roc_auc",
            "Does it still rank flights well?",
            "ROC AUC, the chance that a disrupted flight ranks above another.",
            "none",
            None,
        ),
        (
            "recall_at_budget",
            "Does the desk warn the right flights?",
            "Of the disrupted flights, the share among the riskiest quarter of each day.",
            "percentunit",
            None,
        ),
        (
            "false_warnings_per_1000",
            "How many warnings are needless?",
            "Warned within the budget and not disrupted, for each 1,000 flights.",
            "none",
            None,
        ),
        (
            "promise_gap",
            "Do the probabilities keep their word?",
            "Mean promised risk minus the share that was disrupted. Beyond the lines: recalibrate.",
            "percentunit",
            ((None, "red"), (-GAP, "green"), (GAP, "red")),
        ),
    ):
        one = f'metric="{metric}"'
        yield Chart(
            title,
            f"{text} The last four weeks whose labels are all due, with their 95 % interval (low, high); dashed: what "
            "the release promised, and an estimate without labels, which cannot see that the world changed.",
            unit,
            [
                Query(f"model_quality{{{one}}}", "{{model_version}}"),
                Query(f"model_quality_low{{{one}}}", "{{model_version}} low"),
                Query(f"model_quality_high{{{one}}}", "{{model_version}} high"),
                Query(f"model_quality_reference{{{one}}}", "{{model_version}} promised", limit=True),
                Query(f"model_quality_estimate{{{one}}}", "{{model_version}} estimated", limit=True),
            ],
            steps=steps,
            axis=metric,
            width=12,
            low=None,
            nothing="no labels yet",
        )
    yield Chart(
        "Which measures broke their rule?",
        "Off by more than matters and by more than chance. The answer to a 1 is in the quality report: segments "
        "first, then retraining or recalibration.",
        "none",
        [Query("model_quality_regressed", "{{model_version}} {{metric}}")],
        kind="bars",
        steps=((None, "green"), (1, "red")),
        width=12,
        high=1,
        nothing="no verdict yet",
    )
    yield Chart(
        "Are the labels there?",
        "Share of the flights that have landed whose outcome is known. Below 98 % there is no verdict: the outcomes "
        "that come first are those of flights in time.",
        "percentunit",
        [Query("model_label_coverage", "{{model_version}}")],
        steps=((None, "red"), (0.98, "green")),
        axis="with a label",
        width=12,
        high=1,
        nothing="no labels yet",
    )


ROWS = (
    ("Users: can they get predictions?", users),
    ("Speed: is it getting slower?", speed),
    ("Traffic: did it change?", traffic),
    ("Capacity: is it near its limits?", capacity),
    ("Inference: where does the time go?", inference),
    ("Inputs: did they change?", inputs),
    ("Predictions: did they change?", predictions),
    ("Quality: was the model right?", quality),
)
