"""Run the chapters in order through papermill and say what each of them built."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from ops import ROOT, artifacts_option

if TYPE_CHECKING:
    from nbformat import NotebookNode

CHAPTER_GLOB = "[0-9][0-9]_*.ipynb"
# Far above any cell of the course: a cell that takes this long is stuck, and CI should say which one it is.
CELL_TIMEOUT_S = 900
# Cells that papermill adds to its copy. They are not in the chapter, so they do not count in cell numbers.
ADDED_TAGS = {"injected-parameters", "papermill-error-cell-tag"}


class ChapterError(click.ClickException):
    """A chapter did not do what the course needs; the message names chapter and fix, the exit code is 1."""


@dataclass(frozen=True)
class Result:
    """One row of the closing table: wall time in seconds, paths relative to the build folder."""

    chapter: str
    built: str
    numbers: dict[str, str]
    seconds: float
    notebook: str
    html: str


class OneLinePerUpdate:
    """A text stream for tqdm where nobody watches a terminal.

    In a log file the carriage returns of a progress bar pile up into one endless line, so each update
    becomes a line of its own.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            self.stream.write(line + "\n")

    def flush(self) -> None:
        self.stream.flush()


def find_chapters(folder: Path, selection: str | None) -> list[Path]:
    """Return the chapters in `folder` in reading order, all or those that `selection` names ("1" or "1,3").

    Raises `click.BadParameter` (exit code 2) when there are none, or when a number names no chapter.
    """
    found = {int(path.name[:2]): path for path in sorted(folder.glob(CHAPTER_GLOB))}
    if not found:
        raise click.BadParameter(f"no notebook named like 01_name.ipynb in {folder}", param_hint="--chapters-dir")
    if selection is None:
        return list(found.values())
    have = ", ".join(str(number) for number in found)
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", selection):
        raise click.BadParameter(
            f"{selection!r} is not a list of chapter numbers such as 1,3 (there are: {have})", param_hint="--chapters"
        )
    wanted = {int(number) for number in selection.split(",")}
    if unknown := sorted(wanted - found.keys()):
        missing = ", ".join(str(number) for number in unknown)
        raise click.BadParameter(f"no chapter {missing} (there are: {have})", param_hint="--chapters")
    return [path for number, path in found.items() if number in wanted]


def tags(cell: NotebookNode) -> set[str]:
    """Return the tags of a cell; a cell without tags gives an empty set."""
    return set(cell.metadata.get("tags", []))


def check_tags(path: Path) -> None:
    """Refuse a chapter that papermill would run wrongly, before any time is spent on running.

    Without a `parameters` cell papermill puts the values at the very top, where the chapter's own assignments
    override them without a word. nbdev-clean deletes these tags when pyproject.toml does not allow them.
    """
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    present = set().union(*(tags(cell) for cell in notebook.cells))
    for tag in ("parameters", "headline"):
        if tag not in present:
            raise ChapterError(f"{path.name} has no cell tagged {tag!r}. Add the tag in the cell's properties.")


def check_exported() -> None:
    """Refuse to run chapters whose code is not in the package yet.

    Later chapters, and processes that a chapter starts, import the package: they would use the old code.
    """
    from ops.roundtrip import PACKAGE, differences

    stale = [name for name in differences(ROOT) if name.startswith(PACKAGE) and name.endswith(".py")]
    if modules := [name for name in stale if not name.endswith("_modidx.py")]:
        raise ChapterError(
            f"{', '.join(modules)} is not what the chapters export: a chapter was edited, or the module was. "
            "Run `make export`, then this command again."
        )


def read_headline(notebook: NotebookNode, name: str) -> tuple[str, dict[str, str]]:
    """Return what an executed chapter built and its headline numbers.

    They are the `application/json` of the last output of the cell tagged `headline`:
    `{"built": "text", "numbers": {"name": "text"}}`. Raises `ChapterError` when that is not there.
    """
    shape = '{"built": "text", "numbers": {"name": "text"}}'
    cell = next(cell for cell in notebook.cells if "headline" in tags(cell))
    outputs = cell.get("outputs", [])
    data = outputs[-1].get("data", {}).get("application/json") if outputs else None
    if data is None:
        raise ChapterError(
            f"{name}: the last output of its headline cell is not application/json. "
            f"End the cell with display(JSON(...)) of {shape}."
        )
    content: dict[str, Any] = data if isinstance(data, dict) else {}
    built, numbers = content.get("built"), content.get("numbers")
    texts = [built, *numbers.keys(), *numbers.values()] if isinstance(numbers, dict) else []
    # Three texts at least: what was built, and one number with its name.
    if len(texts) < 3 or not all(isinstance(text, str) and text for text in texts):
        raise ChapterError(f"{name}: its headline is {json.dumps(data)}, expected {shape} with text in every place.")
    return str(built), dict(numbers or {})


def describe_failure(executed: Path, error: str) -> str:
    """Return the text about a failed chapter: the chapter, the cell's number and source, and the error."""
    import nbformat

    notebook = nbformat.read(executed, as_version=4)
    cells = [cell for cell in notebook.cells if not tags(cell) & ADDED_TAGS]
    # A run stops at the cell that failed, whatever the reason: it is the last one that was started.
    started = [i for i, cell in enumerate(cells) if cell.metadata.get("papermill", {}).get("start_time")]
    if not started:
        return f"{executed.stem} failed before its first cell.\n\n{error}"
    cell = cells[started[-1]]
    tracebacks = ["\n".join(out.traceback) for out in cell.get("outputs", []) if out.output_type == "error"]
    source = "\n".join(f"    {line}" for line in cell.source.splitlines())
    detail = tracebacks[-1] if tracebacks and tracebacks[-1] else error
    return f"{executed.stem}: cell {started[-1] + 1} of {len(cells)} failed.\n\n{source}\n\n{detail}"


def write_html(notebook: NotebookNode, target: Path, chapters_dir: Path) -> None:
    """Write the executed notebook as one HTML file that carries its pictures inside.

    What only the tools need is left out: the export target, the injected parameters and the cell numbers.
    """
    from nbconvert import HTMLExporter
    from nbformat.v4 import new_notebook

    shown = [
        cell for cell in notebook.cells if not tags(cell) & ADDED_TAGS and not cell.source.startswith("#| default_exp")
    ]
    heading = next((cell.source for cell in shown if cell.source.startswith("# ")), target.stem)
    exporter = HTMLExporter(embed_images=True, exclude_input_prompt=True, exclude_output_prompt=True)
    resources = {"metadata": {"name": heading.splitlines()[0].lstrip("# "), "path": str(chapters_dir)}}
    page, _ = exporter.from_notebook_node(new_notebook(cells=shown, metadata=notebook.metadata), resources)
    target.write_text(page, encoding="utf-8")


def progress_options(name: str) -> dict[str, Any]:
    """Return tqdm's options for one chapter: a moving bar on a terminal, a line now and then in a log."""
    common = {"desc": name, "unit": " cells", "bar_format": "{desc}: {percentage:3.0f}% {bar:20} {n}/{total} {elapsed}"}
    if sys.stderr.isatty():
        return common
    plain = {"bar_format": "{desc}: {n}/{total} cells, {elapsed}", "mininterval": 10}
    return common | plain | {"file": OneLinePerUpdate(sys.stderr)}


def register_engine() -> str:
    """Teach papermill to write a notebook once, at the end, and return the engine's name.

    By itself papermill writes the whole notebook before and after every cell, which takes longer than most cells.
    """
    from papermill.engines import NBClientEngine, papermill_engines

    class WriteOnceEngine(NBClientEngine):  # type: ignore[misc]  # papermill has no types
        """Papermill's own engine, without its writing in between."""

        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> None:
            """Run the cells. What papermill does next, also after an error, writes the notebook."""
            target, nb_man.output_path = nb_man.output_path, None
            try:
                super().execute_managed_notebook(nb_man, kernel_name, **options)
            finally:
                nb_man.output_path = target

    papermill_engines.register("write-once", WriteOnceEngine)
    return "write-once"


def run_chapter(path: Path, out: Path, parameters: dict[str, str]) -> NotebookNode:
    """Execute one chapter in its own folder and return it.

    The executed copy is written to `out` even when a cell fails. Raises `ChapterError` with the cell and
    its error.
    """
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    try:
        notebook: NotebookNode = papermill.execute_notebook(
            path,
            out,
            parameters=parameters,
            engine_name=register_engine(),
            # Both are given because nbdev-clean removes the notebook's own record of its language.
            kernel_name="python3",
            language="python",
            cwd=path.parent,
            progress_bar=progress_options(path.stem),
            execution_timeout=CELL_TIMEOUT_S,
            # Else each kernel warns that it talks to us unencrypted.
            config=Config(KernelManager={"transport_encryption": "auto"}),
        )
    except (PapermillExecutionError, DeadKernelError, CellTimeoutError) as err:
        raise ChapterError(describe_failure(out, str(err))) from err
    # sys.exit(0) in a cell ends a notebook early, which papermill calls a success. A chapter reaches its end.
    if notebook.metadata.papermill.exception:
        raise ChapterError(describe_failure(out, "The cell left the notebook before its end."))
    return notebook


def quiet_environment() -> None:
    """Silence what the tools print about themselves; warnings from the chapters' own code stay visible."""
    # debugpy: "frozen modules are being used", once per kernel. Nobody debugs these kernels.
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    # jupyter_core: announces a change of its folders, once per process.
    os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")


def print_table(results: list[Result], build: Path) -> None:
    """Print the closing table and where the pages are; keep what was printed in BUILD/course.txt."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    # Without a terminal rich assumes 80 columns, which breaks the numbers over too many lines.
    console = Console(width=None if sys.stdout.isatty() else 120, record=True)
    table = Table(box=box.SIMPLE_HEAD, show_footer=True)
    table.add_column("Chapter", footer="total")
    table.add_column("Built", ratio=1)
    table.add_column("Headline numbers", ratio=1)
    table.add_column("Seconds", footer=f"{sum(result.seconds for result in results):.1f}", justify="right")
    for result in results:
        numbers = "\n".join(f"{name}: {text}" for name, text in result.numbers.items())
        table.add_row(result.chapter, result.built, numbers, f"{result.seconds:.1f}")
    console.print(table)
    console.print(
        f"Executed notebooks and HTML pages: {build / 'chapters'}", markup=False, highlight=False, soft_wrap=True
    )
    (build / "course.txt").write_text(console.export_text(), encoding="utf-8")


def write_summary(results: list[Result], target: Path) -> None:
    """Write the closing table as JSON, for tools."""
    total = round(sum(result.seconds for result in results), 3)
    summary = {"chapters": [asdict(result) for result in results], "total_seconds": total}
    target.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@click.command(short_help="Run the chapters and print what each built.")
@click.option("--chapters", "selection", metavar="N[,N...]", help="Only these chapter numbers, such as 1,3.")
@artifacts_option
@click.option("--build", type=click.Path(path_type=Path, file_okay=False), default=ROOT / "build")
@click.option(
    "--chapters-dir", type=click.Path(path_type=Path, file_okay=False), default=ROOT / "chapters", hidden=True
)
def course(selection: str | None, artifacts: Path, build: Path, chapters_dir: Path) -> None:
    """Run the chapters in order on the full data.

    Each chapter gets the parameters `artifacts_root` and `build_root`. The executed notebooks and their HTML
    pages go to BUILD/chapters, the closing table also to BUILD/course.json and BUILD/course.txt. A failing cell
    stops the run with exit code 1.
    """
    quiet_environment()
    artifacts, build, chapters_dir = artifacts.resolve(), build.resolve(), chapters_dir.resolve()
    paths = find_chapters(chapters_dir, selection)
    for path in paths:
        check_tags(path)
    if chapters_dir == ROOT / "chapters":
        check_exported()
    pages = build / "chapters"
    pages.mkdir(parents=True, exist_ok=True)
    # What an earlier run left must not pass for the result of one that failed.
    for old in [build / "course.json", build / "course.txt", *(pages / path.name for path in paths)]:
        old.unlink(missing_ok=True)
        old.with_suffix(".html").unlink(missing_ok=True)

    results = []
    for path in paths:
        started = time.perf_counter()
        out = pages / path.name
        notebook = run_chapter(path, out, {"artifacts_root": str(artifacts), "build_root": str(build)})
        built, numbers = read_headline(notebook, path.stem)
        html = out.with_suffix(".html")
        write_html(notebook, html, chapters_dir)
        seconds = round(time.perf_counter() - started, 3)
        notebook_path, html_path = out.relative_to(build).as_posix(), html.relative_to(build).as_posix()
        results.append(Result(path.stem, built, numbers, seconds, notebook_path, html_path))
    write_summary(results, build / "course.json")
    print_table(results, build)
