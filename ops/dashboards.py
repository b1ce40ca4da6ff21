"""Write Grafana's dashboards. What they ask and show is described in ops/grafana."""

import click

from ops import ROOT


@click.command(short_help="Write Grafana's dashboards from the code that describes them.")
def dashboards() -> None:
    """Write ops/grafana/dashboards/operator.json. Change ops/grafana/story.py or dashboard.py, never the JSON."""
    from ops.grafana.dashboard import TARGET, render

    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(render(), encoding="utf-8")
    click.echo(f"wrote {TARGET.relative_to(ROOT)}")
