"""Run one script with several sets of libraries and record what each gave: `python -m ops.pinning.run`.

Each set is installed into a new environment that is deleted afterwards, so this needs a package index and a
few hundred megabytes. The chapters read only the result, chapters/data/pinning.json. The dated sets and the
locked one give the same record every time; the unpinned one gives whatever its day gives, which is the point.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ops import ROOT

SCRIPT = ROOT / "ops" / "pinning" / "script.py"
DATA = ROOT / "chapters" / "data" / "flights.parquet"
RESULT = ROOT / "chapters" / "data" / "pinning.json"

LIBRARIES = ("numpy", "pandas", "pyarrow", "scikit-learn", "scipy")
# Releases that were current in that spring and have wheels for Python 3.11.
SETS = {
    "spring 2023": ("numpy==1.24.3", "pandas==2.0.1", "pyarrow==12.0.0", "scikit-learn==1.2.2", "scipy==1.10.1"),
    "spring 2024": ("numpy==1.26.4", "pandas==2.2.2", "pyarrow==16.0.0", "scikit-learn==1.4.2", "scipy==1.13.0"),
    "unpinned": LIBRARIES,
}
LOCKED = "locked"  # the environment that runs this module, installed from requirements.lock

UV = (sys.executable, "-m", "uv", "--quiet")


def make_environment(folder: Path, requirements: Sequence[str]) -> Path:
    """Install `requirements` from wheels into a new environment in `folder`; return its interpreter.

    Raises subprocess.CalledProcessError when the set cannot be installed.
    """
    home = folder / "environment"
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    # Run from `folder`, out of reach of this project's own uv settings.
    subprocess.run([*UV, "venv", "--python", sys.executable, str(home)], cwd=folder, check=True)
    install = [*UV, "pip", "install", "--only-binary", ":all:", "--python", str(python)]
    subprocess.run([*install, *requirements], cwd=folder, check=True)
    return python


def installed(python: Path) -> dict[str, str]:
    """Return the version of each of LIBRARIES in the environment of `python`."""
    command = [*UV, "pip", "list", "--format", "json", "--python", str(python)]
    listed = subprocess.run(command, check=True, capture_output=True, text=True)
    versions = {package["name"]: package["version"] for package in json.loads(listed.stdout)}
    return {name: versions[name] for name in LIBRARIES}


def run_script(python: Path) -> dict[str, Any]:
    """Run the script with `python`; return what it printed, its warnings and its error, if it had one."""
    # One thread and a fixed hash seed, so that the machine cannot be the reason for a difference.
    fixed = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [str(python), str(SCRIPT)], cwd=ROOT, env=kept | fixed, capture_output=True, text=True, check=False
    )
    noise = done.stderr.strip().splitlines()
    return {
        "printed": json.loads(done.stdout) if done.returncode == 0 else None,
        # "<file>:<line>: FutureWarning: <message>", without the place, which differs between machines.
        "warnings": [line[line.index("FutureWarning: ") :] for line in noise if "FutureWarning: " in line],
        "error": noise[-1] if done.returncode != 0 else None,
    }


def record(name: str, requirements: Sequence[str]) -> dict[str, Any]:
    """Run the script in the set called `name` and return its entry for the result file."""
    with tempfile.TemporaryDirectory() as folder:
        # The interpreter's path is not resolved: an environment's `python` is a link out of it.
        python = Path(sys.executable) if name == LOCKED else make_environment(Path(folder), requirements)
        entry = {"name": name, "asked_for": list(requirements), "installed": installed(python)}
        return entry | run_script(python)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal text."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    """Run every set, print a line for each and write the result file."""
    entries = []
    for name, requirements in {**SETS, LOCKED: ("requirements.lock",)}.items():
        entry = record(name, requirements)
        print(f"{name}: {entry['error'] or json.dumps(entry['printed'])}", flush=True)
        entries.append(entry)
    result = {"script_sha256": sha256(SCRIPT), "data_sha256": sha256(DATA), "sets": entries}
    partial = RESULT.with_name(RESULT.name + ".partial")
    partial.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(RESULT)


if __name__ == "__main__":
    main()
