"""The alert rules of ops/prometheus for other places than production: with shorter windows, and other targets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ops import ROOT

PROMETHEUS = ROOT / "ops" / "prometheus"

# A rate needs two samples, and a few more to be a rate. `for` has to outlive one scrape that failed.
LEAST_RANGE_S, LEAST_FOR_S = 5.0, 3.0
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
DURATION = re.compile(r"(?P<before>\[|offset |for: |interval: )(?P<number>\d+)(?P<unit>[smhd])\b")


def shorten(
    text: str,  # of a file of rules
    factor: float,  # an hour becomes 3600 / factor seconds
) -> str:
    """Return the same rules for a clock that runs `factor` times as fast, for drills that nobody waits an hour for.

    Windows (`[1h]`), `offset` and `for` are divided by the factor. Windows stay at least 5 s long and a `for` above
    zero at least 3 s, because Prometheus still asks once a second. Groups are evaluated every second. Limits, ratios
    and minimum counts stay as they are, and so do names such as `ratio_rate1h`.
    """

    def changed(found: re.Match[str]) -> str:
        before, seconds = found["before"], int(found["number"]) * SECONDS[found["unit"]]
        if before == "interval: ":
            return "interval: 1s"
        least = LEAST_RANGE_S if before == "[" else LEAST_FOR_S if before == "for: " and seconds else 0.0
        return f"{before}{round(1000 * max(least, seconds / factor))}ms"

    return DURATION.sub(changed, text)


def configure(
    folder: Path,  # where to write the configuration
    factor: float,  # as for `shorten`
    targets: dict[str, str | None],  # job -> host:port; None keeps a job's targets as they are, other jobs are dropped
    alertmanager: str | None = None,  # host:port
) -> Path:
    """Write prometheus.yml and its rules, with short windows, a scrape every second and these targets."""
    import yaml

    config: dict[str, Any] = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    managers = [{"static_configs": [{"targets": [alertmanager]}]}] if alertmanager else []
    config["alerting"] = {"alertmanagers": managers}
    config["scrape_configs"] = [job for job in config["scrape_configs"] if job["job_name"] in targets]
    for job in config["scrape_configs"]:
        if place := targets[job["job_name"]]:
            for kind in ("dns_sd_configs", "file_sd_configs"):
                job.pop(kind, None)
            job["static_configs"] = [{"targets": [place]}]
    rules = folder / "rules"
    rules.mkdir(parents=True, exist_ok=True)
    for file in (PROMETHEUS / "rules").glob("*.yml"):
        (rules / file.name).write_text(shorten(file.read_text(encoding="utf-8"), factor), encoding="utf-8")
    target = folder / "prometheus.yml"
    target.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return target
