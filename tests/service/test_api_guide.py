"""The usage guide: every snippet is run against a real server, in order, and what it prints is compared.

A block of bash or python may be followed by a block of json or text: that is what it must print. Decimal numbers may
differ a little, because training on another processor rounds differently.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mlops_course.blueprint import COLUMNS
from mlops_course.serving import ERRORS, Prediction, PredictRequest, Service, Settings

from .conftest import Running, environment

TOLERANCE = 0.005  # of a decimal number in an output
IDENTITY = {"digest", "git_sha", "trained_at", "service_version", "service_git_sha", "config"}  # other in each release
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
            if key not in IDENTITY:
                assert_same(printed[key], value)
            assert type(printed[key]) is type(value)
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


def test_the_guide_names_what_only_the_router_answers(guide: str, root: Path) -> None:
    """`tests/service/test_door.py` knows the same two; statuses and kinds come from Envoy's configuration here."""
    said = re.findall(r"problem:([a-z-]+)", (root / "ops" / "envoy" / "envoy.yaml").read_text())
    rows = {(kind, status) for status, kind in re.findall(r"^\| (\d{3}) \| `([a-z-]+)` \|", guide, re.MULTILINE)}
    service = {(error.kind, str(error.status)) for error in ERRORS}
    assert rows - service == {("unavailable", "503"), ("timeout", "504")}
    assert {kind for kind, _ in rows - service} == set(said) - {error.kind for error in ERRORS}


def test_the_guide_names_every_route(guide: str, app: Service) -> None:
    for path in app.openapi()["paths"]:
        assert path in guide


def test_the_guide_names_every_setting_with_its_default(guide: str) -> None:
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None else f"`{field.default}`"
        assert re.search(rf"^\| `{name.upper()}` \| {re.escape(default)} ?\|", guide, re.MULTILINE), name


def test_the_guide_says_what_is_required_outside_dev(guide: str) -> None:
    rows = {r.split("|")[1].strip(" `"): r.split("|")[3].strip() for r in guide.splitlines() if r.startswith("| `")}
    required = {"GIT_SHA", "MODEL_URI", "MODEL_DIGEST", "API_KEY"}
    assert {name.upper() for name in Settings.model_fields if rows[name.upper()] == "yes"} == required


@pytest.fixture(scope="session")
def python_client(guide: str) -> dict[str, Any]:
    """Return the names that the guide's Python client defines."""
    code = next(s.code for s in snippets(guide) if s.language == "python")
    names: dict[str, Any] = {}
    exec(code.partition("with open(")[0], names)  # noqa: S102 - our own guide
    return names


@pytest.mark.parametrize("kind", ["a page of a router", "no connection"])
def test_the_guides_client_tries_again_with_the_same_id(
    python_client: dict[str, Any], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    ids: list[str] = []

    def broken(request: Any, timeout: float) -> Any:
        ids.append(request.get_header("X-request-id"))
        if kind == "no connection":
            raise urllib.error.URLError("refused")
        raise urllib.error.HTTPError(request.full_url, 503, "busy", Message(), io.BytesIO(b"<html>upstream</html>"))

    monkeypatch.setattr(urllib.request, "urlopen", broken)
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(ConnectionError):
        python_client["predict"]({})
    assert len(ids) == 4
    assert len(set(ids)) == 1
