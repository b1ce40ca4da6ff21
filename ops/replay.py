"""Send the real flights of 2013 through a running service, as a desk would have asked, and bring the outcomes late."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ops import ROOT
from ops.smoke import Failed, key_for, local_url

if TYPE_CHECKING:
    from mlops_course.monitoring import LabelStore, Recording, Send

STORE = ROOT / "build" / "labels.sqlite"
# What rules look at; the shortest that drift rules use comes first.
WINDOWS = ("1h", "6h", "1d", "3d")
# As fast as possible, the flights of this many replayed minutes travel together.
BATCH_MINUTES = 60

store_option = click.option(
    "--store",
    type=click.Path(path_type=Path, dir_okay=False),
    default=STORE,
    help="Where predictions and outcomes are kept. Default: build/labels.sqlite.",
)


class Speed(click.ParamType[float]):
    """A number above 0, or `max` (also 0) for as fast as possible."""

    name = "number or max"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return replayed seconds for each real second; 0 means no limit."""
        try:
            speed = 0.0 if value == "max" else float(value)
        except ValueError:
            speed = -1.0
        if not 0 <= speed < float("inf"):
            self.fail(f"{value!r} is not a speed; give replayed seconds a second, such as 60, or max", param, ctx)
        return speed


@contextmanager
def patient(url: str, patience: float) -> Iterator[Callable[..., Any]]:
    """Give a function that asks the service, and asks again while it is down or overloaded."""
    from mlops_course.release import asking

    with asking(url, key_for(url), timeout=30) as ask:

        def again(method: str, path: str, content: Any = None) -> Any:
            end = time.monotonic() + patience
            reply = ask(method, path, content)
            while reply.status in (0, 503) and time.monotonic() < end:
                time.sleep(0.5)
                reply = ask(method, path, content)
            return reply

        yield again


def moment(seconds: int) -> str:
    """Return a replayed moment for people."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def windows_at(speed: float) -> str:
    """Say how long a replayed day takes, and what the windows of rules become."""
    from mlops_course.monitoring import scaled_window

    windows = [f"{one} of flights is {scaled_window(one, speed)}" for one in WINDOWS if speed <= 3_600 or one != "1h"]
    return f"speed {speed:g}, for rules: {', '.join(windows)}"


def begin(recording: Recording, store: LabelStore) -> tuple[int, int]:
    """Return the bookmarks of the store, and say what is left to do."""
    from mlops_course.monitoring import bookmarks

    scored_to, known_to = bookmarks(store)
    if scored_to:
        left, whole = int((recording.scored_at > scored_to).sum()), len(recording)
        click.echo(f"flights scored up to {moment(scored_to)} are in the store: {left:,} of {whole:,} are left")
    return scored_to, known_to


def report(store: LabelStore) -> str:
    """Say what is in the store, one line a model version."""
    from mlops_course.monitoring import label_counts

    lines = []
    for (version,) in store.rows("SELECT DISTINCT model_version FROM predictions ORDER BY 1"):
        counts = label_counts(store, version)
        lines.append(f"  {version:12} " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    return "\n".join(lines)


@click.command(short_help="Send the flights of autumn 2013 through a running service, outcomes later.")
@click.option("--url", "urls", multiple=True, help="Where a service answers; repeat it and each gets every flight.")
@click.option("--from", "first", type=click.DateTime(["%Y-%m-%d"]), default="2013-09-01", show_default=True)
@click.option("--to", "last", type=click.DateTime(["%Y-%m-%d"]), default="2013-12-31", show_default=True)
@click.option("--speed", type=Speed(), default="60", show_default=True, help="Replayed seconds in a real one, or max.")
@click.option("--batch-minutes", type=click.IntRange(0, 240), help="Flights of so many replayed minutes together.")
@store_option
@click.option("--fresh", is_flag=True, help="Delete the store first, and begin anew.")
@click.option("--patience", default=60.0, show_default=True, help="Seconds to wait for a service that does not answer.")
@click.option("--keep-days", default=400, show_default=True, help="Replayed days that the store keeps.")
def replay(
    urls: tuple[str, ...],
    first: date,
    last: date,
    speed: float,
    batch_minutes: int | None,
    store: Path,
    fresh: bool,
    patience: float,
    keep_days: int,
) -> None:
    """Send flights in the order of their scoring (two hours before departure), at a chosen speed.

    At a speed each flight is one request, in its minute. With --speed max the flights of an hour travel as one batch
    (--batch-minutes 0: one by one). The recent delay at the origin is computed from the departures seen so far. Each
    outcome enters the store when the flight has landed. Stop it with Ctrl-C whenever you like: the same command goes on
    where it was. The key is found as by `smoke`. `python -m ops quality` reads the store.
    """
    from mlops_course.blueprint import data_folder, load_dataset
    from mlops_course.monitoring import LabelStore, ReplayError, forget, record

    if fresh:
        for path in store.parent.glob(f"{store.name}*"):
            path.unlink()
    minutes = batch_minutes if batch_minutes is not None else 0 if speed else BATCH_MINUTES
    try:
        recording = record(load_dataset(data_folder()), f"{first:%Y-%m-%d}", f"{last:%Y-%m-%d}")
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--from / --to") from error
    if speed:
        click.echo(windows_at(speed))
    with ExitStack() as opened:
        book = opened.enter_context(closing(LabelStore(store)))
        asks = [opened.enter_context(patient(url, patience)) for url in urls or (local_url(),)]
        try:
            run(recording, book, asks, speed, minutes)
        except ReplayError as error:
            raise Failed(f"{error}; the same command goes on from here") from error
        except KeyboardInterrupt:
            raise Failed("stopped; the same command goes on from here") from None
        if gone := forget(book, keep_days):
            click.echo(f"deleted {gone:,} rows older than {keep_days} days")
        click.echo(report(book))


def run(recording: Recording, store: LabelStore, asks: list[Any], speed: float, minutes: int) -> None:
    """Play what is left, with a progress bar."""
    from tqdm import tqdm

    from mlops_course.monitoring import paced, play, sender
    from mlops_course.monitoring import replay as replaying

    scored_to, known_to = begin(recording, store)
    sends: list[Send] = [sender(ask, batches=minutes > 0) for ask in asks]
    steps = paced(play(recording, minutes or 1, scored_to, known_to), speed)
    done = int((recording.scored_at <= scored_to).sum())
    with tqdm(total=len(recording), initial=done, unit=" flights", **bar_options()) as bar:
        for step in replaying(steps, sends, store):
            bar.set_postfix_str(moment(step.at), refresh=False)
            bar.update(len(step.requests))


def bar_options() -> dict[str, Any]:
    """Return tqdm's options: a moving bar on a terminal, a line now and then in a log."""
    from ops.course import OneLinePerUpdate

    if sys.stderr.isatty():
        return {"dynamic_ncols": True}
    return {"file": OneLinePerUpdate(sys.stderr), "mininterval": 10, "maxinterval": 10, "ncols": 100}
