"""The usage guide: every snippet is run against a real server, in order, and what it prints is compared.

A block of bash or python may be followed by a block of json or text: that is what it must print. Decimal numbers may
differ a little, because training on another processor rounds differently.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mlops_course.blueprint import COLUMNS
from mlops_course.serving import ERRORS, Prediction, PredictRequest, Service, Settings

from .conftest import Running, environment

TOLERANCE = 0.005  # of a decimal number in an output
BLOCK = re.compile(r"^```(bash|python|json|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Snippet(NamedTuple):
    """One block that is run, and what it must print, if the guide says so."""

    language: str
    code: str
    expected: tuple[str, str] | None


@pytest.fixture(scope="session")
def guide(root: Path) -> str:
    """Return the text of the guide."""
    return (root / "docs" / "api.md").read_text()


def snippets(text: str) -> list[Snippet]:
    """Return every block that is run, with the output block that follows it."""
    blocks = BLOCK.findall(text)
    found = []
    for number, (language, code) in enumerate(blocks):
        if language in ("bash", "python"):
            after = blocks[number + 1] if number + 1 < len(blocks) else ("", "")
            found.append(Snippet(language, code, after if after[0] in ("json", "text") else None))
    return found


def assert_same(printed: Any, stated: Any) -> None:
    """Compare two JSON values; decimal numbers may differ by the tolerance."""
    assert type(printed) is type(stated)
    if isinstance(stated, dict):
        assert list(printed) == list(stated)
        for key, value in stated.items():
            assert_same(printed[key], value)
    elif isinstance(stated, list):
        assert len(printed) == len(stated)
        for one, two in zip(printed, stated, strict=True):
            assert_same(one, two)
    else:
        assert printed == (pytest.approx(stated, abs=TOLERANCE) if isinstance(stated, float) else stated)


def as_values(text: str) -> list[Any]:
    """Split a text into its words and its decimal numbers."""
    parts = re.split(r"(\b\d+\.\d+(?!\.?\d))", text.strip())
    return [float(part) if re.fullmatch(r"\d+\.\d+", part) else part for part in parts]


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_every_snippet_prints_what_the_guide_says(serve: Callable[..., Running], guide: str, tmp_path: Path) -> None:
    running = serve()
    found = snippets(guide)
    assert [s.language for s in found].count("python") == 1
    assert len(found) >= 5
    for snippet in found:
        code = snippet.code.replace("localhost:8000", f"127.0.0.1:{running.port}")
        command = (
            ["bash", "-euo", "pipefail", "-c", code] if snippet.language == "bash" else [sys.executable, "-c", code]
        )
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, check=False, timeout=60)
        assert done.returncode == 0, f"{snippet.code}\n{done.stderr.decode()}"
        if snippet.expected is None:
            continue
        language, stated = snippet.expected
        if language == "json":
            assert_same(json.loads(done.stdout), json.loads(stated))
        else:
            assert_same(as_values(done.stdout.decode()), as_values(stated))


def test_the_comparison_would_notice() -> None:
    assert_same({"p": 0.4731}, {"p": 0.4732})
    with pytest.raises(AssertionError):
        assert_same({"p": 0.5}, {"p": 0.4732})
    with pytest.raises(AssertionError):
        assert_same({"p": 0.4732, "q": 1}, {"p": 0.4732})
    with pytest.raises(AssertionError):
        assert_same(as_values("disrupted 0.4732"), as_values("on_time 0.4732"))


def test_the_guide_names_every_field_with_its_range_and_unit(guide: str) -> None:
    rows = {line.split("|")[1].strip(" `"): line for line in guide.splitlines() if line.startswith("| `")}
    for name in (*PredictRequest.model_fields, *Prediction.model_fields):
        assert name in rows
    for name, column in COLUMNS.items():
        if name in PredictRequest.model_fields and column.kind == "number":
            cells = [cell.strip() for cell in rows[name].split("|")]
            assert cells[3:6] == [f"{column.low:g} to {column.high:g}", column.unit, "yes" if column.nullable else "no"]


def test_the_guide_names_every_error(guide: str) -> None:
    for error in ERRORS:
        assert re.search(rf"^\| {error.status} \| `{error.kind}` \|", guide, re.MULTILINE), error.kind


def test_the_guide_names_every_route(guide: str, app: Service) -> None:
    for path in app.openapi()["paths"]:
        assert path in guide


def test_the_guide_names_every_setting_with_its_default(guide: str) -> None:
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None else f"`{field.default}`"
        assert re.search(rf"^\| `{name.upper()}` \| {re.escape(default)} ?\|", guide, re.MULTILINE), name
