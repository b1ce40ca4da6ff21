"""What an operator runs: `python -m ops COMMAND`.

Nothing imports this package (the import layers in pyproject.toml say so), and importing it must stay
cheap: each command imports the libraries it needs inside its own functions.
"""

from pathlib import Path

# The project is installed in editable mode, so this file sits in the working tree.
ROOT = Path(__file__).resolve().parent.parent
