"""`python -m service`: serve, or say on stderr what is wrong with the configuration and end with code 2."""

import sys

from mlops_course.serving import ConfigError
from service.app import create_app
from service.server import run


def main() -> int:
    """Run until a signal stops the server. Returns the exit code."""
    try:
        run(create_app())
    except ConfigError as error:
        sys.stderr.write(f"The service did not start; its configuration is not usable:\n{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
