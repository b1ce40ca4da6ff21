"""The command line. A new command is one module with one click command and one line here."""

import click

from ops import (
    alert_drill,
    audit,
    bench,
    compose,
    course,
    dashboards,
    door,
    drift,
    image,
    lock,
    publish,
    push,
    quality,
    release,
    replay,
    roundtrip,
    scan,
    smoke,
    summary,
    synthetic,
    train,
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Run the course, train and approve models, release, check what runs."""


cli.add_command(course.course)
cli.add_command(train.train)
cli.add_command(train.approve)
cli.add_command(train.discard)
cli.add_command(train.ledger)
cli.add_command(release.release)
cli.add_command(release.promote)
cli.add_command(release.rollback)
cli.add_command(release.history)
cli.add_command(release.env)
cli.add_command(release.fetch)
cli.add_command(publish.publish)
cli.add_command(image.image)
cli.add_command(scan.scan)
cli.add_command(push.push)
cli.add_command(audit.audit)
cli.add_command(compose.up)
cli.add_command(compose.down)
cli.add_command(door.door)
cli.add_command(smoke.smoke)
cli.add_command(synthetic.synthetic)
cli.add_command(drift.drift)
cli.add_command(drift.calibrate_drift)
cli.add_command(replay.replay)
cli.add_command(quality.quality)
cli.add_command(bench.bench)
cli.add_command(dashboards.dashboards)
cli.add_command(summary.summary)
cli.add_command(lock.lock)
cli.add_command(roundtrip.roundtrip)
cli.add_command(alert_drill.alert_drill)

if __name__ == "__main__":
    cli(prog_name="python -m ops")
