"""The queries of the operator dashboard that are more than a rate.

`$name` is a variable of the dashboard, which Grafana replaces. `$__rate_interval` is the shortest window in which a
rate can be seen, `$__range` the period that is shown. Names with a colon are those of ops/prometheus/rules.
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
FLOOR = 0.0001  # the smallest share that PSI works with, as in the rules: the logarithm of 0 is not a number


def rate(metric: str, by: str, labels: str, window: str = RATE) -> str:
    """Return how fast a counter grows, a second, summed up to some labels."""
    return f"sum by ({by}) (rate({metric}{{{labels}}}[{window}]))"


def ratio(part: str, whole: str, on: str = "") -> str:
    """Return a share; nothing instead of 0 / 0."""
    match = f"on ({on}) group_left () " if on else ""
    return f"{part} / {match}({whole} > 0)"


def failed(window: str) -> str:
    """Return the share of predictions that ended in a server error."""
    kinds = (f'{PREDICT},status=~"5.."', PREDICT)
    return ratio(*(f"sum(increase(http_requests_total{{{labels}}}[{window}]))" for labels in kinds))


def burned(window: str) -> str:
    """Return how fast the error budget is spent in a window of the rules; at 1 it lasts exactly 30 days."""
    return f"max(source:prediction_errors:ratio_rate{window}) / {1 - CRITERIA['success_rate'].limit:.4g}"


def quantile(q: float, by: str, labels: str, metric: str = "http_request_duration_seconds") -> str:
    """Return an estimate of a quantile of a time, in seconds."""
    return f"histogram_quantile({q:g}, {rate(f'{metric}_bucket', f'{by}, le', labels)})"


def shares(of: str, labels: str = RELEASE) -> str:
    """Return the share of each bin in the chosen window, floored. Nothing for a release with too few flights."""
    return f"clamp_min(model:{of}:share$window{{{labels}}}, {FLOOR})"


def baseline(of: str, labels: str = RELEASE) -> str:
    """Return what shares are compared with: training ($baseline is 0), or the window before ($baseline is 1)."""
    training = f"model:{of}_expected:share{{{labels}}}"
    earlier = f"clamp_min(model:{of}:share$window{{{labels}}} offset $window, {FLOOR})"
    return f"(({training} and on () vector($baseline) == 0) or ({earlier} and on () vector($baseline) == 1))"


def change(of: str, labels: str = RELEASE) -> str:
    """Return by how much each bin's share changed, as a part of all."""
    return f"{shares(of, labels)} - {baseline(of, labels)}"


def psi(of: str, by: str, labels: str = RELEASE) -> str:
    """Return the population stability index of the chosen window against the chosen baseline."""
    seen, known = shares(of, labels), baseline(of, labels)
    return f"sum by ({by}, release) (({seen} - {known}) * ln({seen} / {known}))"


def per_flight(metric: str, by: str) -> str:
    """Return how often something is seen, as a share of the flights scored."""
    flights = f"sum(rate(model_predictions_total{{{RELEASE}}}[{RATE}]))"
    return f"{rate(metric, by, RELEASE)} / on () group_left () ({flights} > 0)"
