"""What the service brings into memory: nothing that trains, draws or reports."""

from __future__ import annotations

import json
import subprocess
import sys

from .conftest import environment

HEAVY = {"pandas", "sklearn", "scipy", "evidently", "skl2onnx", "onnx", "matplotlib", "joblib", "fastcore", "nbdev"}


def modules_after(code: str) -> set[str]:
    """Return the top-level modules that are loaded in a fresh process after running `code`."""
    show = "; import json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code + show], env=environment(), capture_output=True, check=True)
    return set(json.loads(done.stdout))


def test_the_service_imports_nothing_heavy() -> None:
    assert modules_after("import service.main, service.__main__") & HEAVY == set()


def test_onnxruntime_is_imported_when_the_model_is_loaded_and_not_before() -> None:
    assert "onnxruntime" not in modules_after("import service.main, service.__main__")


def test_the_module_of_the_chapter_imports_no_other_chapter() -> None:
    code = "import mlops_course.serving, sys; names = [n for n in sys.modules if n.startswith('mlops_course.')]"
    done = subprocess.run(
        [sys.executable, "-c", code + "; print(sorted(names))"], env=environment(), capture_output=True, check=True
    )
    assert done.stdout.decode().strip() == "['mlops_course.blueprint', 'mlops_course.serving']"
