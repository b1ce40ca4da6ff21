"""The queries of the operator dashboard that are more than a rate.

`$name` is a variable of the dashboard, which Grafana replaces. `$__rate_interval` is the shortest window in which a
rate can be seen, `$__range` the period that is shown.
"""

from __future__ import annotations

from mlops_course.blueprint import CRITERIA

# Every label of this kind limits a query to what was chosen above the dashboard.
RELEASE = 'release=~"$release"'
ORIGIN = 'origin=~"$origin"'
# What was promised is about predictions: not about /health, and not about pages that do not exist.
PREDICT = 'route=~"/v1/predict(/batch)?",method="POST"'
DOOR = 'envoy_http_conn_manager_prefix="door"'
RATE = "$__rate_interval"
FLOOR = 0.0001  # the smallest share that PSI works with: the logarithm of 0 is not a number
ENOUGH = 200  # flights; with fewer, PSI is mostly chance


def increase(metric: str, by: str, window: str, labels: str = RELEASE, before: str = "") -> str:
    """Return how much a counter grew in a window, summed up to some labels."""
    return f"sum by ({by}) (increase({metric}{{{labels}}}[{window}]{f' offset {before}' if before else ''}))"


def rate(metric: str, by: str, labels: str, window: str = RATE) -> str:
    """Return how fast a counter grows, a second, summed up to some labels."""
    return f"sum by ({by}) (rate({metric}{{{labels}}}[{window}]))"


def ratio(part: str, whole: str, on: str = "") -> str:
    """Return a share; nothing instead of 0 / 0."""
    match = f"on ({on}) group_left " if on else ""
    return f"{part} / {match}({whole} > 0)"


def failed(window: str) -> str:
    """Return the share of predictions that ended in a server error."""
    parts = (
        f"sum(increase(http_requests_total{{{labels}}}[{window}]))" for labels in (f'{PREDICT},status=~"5.."', PREDICT)
    )
    return ratio(*parts)


def budget_left(days: int = 30) -> str:
    """Return the share of the error budget that is left, below zero when it is overdrawn."""
    return f"1 - ({failed(f'{days}d')}) / {1 - CRITERIA['success_rate'].limit:.4g}"


def quantile(q: float, by: str, labels: str, metric: str = "http_request_duration_seconds") -> str:
    """Return an estimate of a quantile of a time, in seconds."""
    return f"histogram_quantile({q:g}, {rate(f'{metric}_bucket', f'{by}, le', labels)})"


def shares(metric: str, by: str, labels: str = RELEASE, before: str = "") -> str:
    """Return the share of each bin in the chosen window, floored; `before` moves the window back.

    Nothing is returned for a release with too few flights: what is compared then would be chance.
    """
    counts = increase(metric, f"{by}, bin", "$window", labels, before)
    whole = increase(metric, by, "$window", labels, before)
    return f"clamp_min({counts} / on ({by}) group_left ({whole} >= {ENOUGH}), {FLOOR})"


def expected(metric: str, counter: str, by: str, labels: str = RELEASE) -> str:
    """Return what the shares are compared with: training ($baseline is 0), or the window before ($baseline is 1)."""
    names = f"{by}, bin"
    training = f"clamp_min(max by ({names}) ({metric}{{{labels}}}), {FLOOR})"
    earlier = shares(counter, by, labels, before="$window")
    return f"(({training} and on () (vector($baseline) == 0)) or ({earlier} and on () (vector($baseline) == 1)))"


def change(counter: str, gauge: str, by: str, labels: str = RELEASE) -> str:
    """Return by how much each bin's share changed, as a part of all."""
    return f"{shares(counter, by, labels)} - {expected(gauge, counter, by, labels)}"


def psi(counter: str, gauge: str, by: str, labels: str = RELEASE) -> str:
    """Return the population stability index of the chosen window against the chosen baseline."""
    seen, known = shares(counter, by, labels), expected(gauge, counter, by, labels)
    return f"sum by ({by}) (({seen} - {known}) * ln({seen} / {known}))"


def per_flight(metric: str, by: str) -> str:
    """Return how often something is seen, as a share of the flights scored."""
    return (
        f"{rate(metric, by, RELEASE)} / on () group_left (sum(rate(model_predictions_total{{{RELEASE}}}[{RATE}])) > 0)"
    )
