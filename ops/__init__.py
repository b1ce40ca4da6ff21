"""What an operator runs: `python -m ops COMMAND`.

Nothing imports this package (the import layers in pyproject.toml say so), and importing it must stay
cheap: each command imports the libraries it needs inside its own functions.
"""

import os
from pathlib import Path

import click

# The project is installed in editable mode, so this file sits in the working tree.
ROOT = Path(__file__).resolve().parent.parent
# Where `up` writes the API key of the containers on this machine.
KEY_FILE = ROOT / ".secrets" / "API_KEY"


def setting(name: str, default: str = "") -> str:
    """Return a variable that Docker Compose reads too: from the environment, else from .env, as Compose does."""
    from dotenv import dotenv_values

    return os.environ.get(name) or dotenv_values(ROOT / ".env").get(name) or default


# Every command that reads or writes models takes this option.
artifacts_option = click.option(
    "--artifacts",
    type=click.Path(path_type=Path, file_okay=False),
    default=ROOT / "artifacts",
    help="Where models are kept. Default: artifacts/ in the project.",
)

# Every command that reads or writes the ledger takes this option.
store_option = click.option(
    "--store",
    "store_url",
    help="Where models, channels and ledger are kept: a folder or s3://bucket/name. "
    "Default: artifacts/flight-disruption in the project.",
)
