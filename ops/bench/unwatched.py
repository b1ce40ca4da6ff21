"""The same service without metrics and logs: the difference is what watching costs. Run as a script."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from mlops_course.serving import NullObserver, build_app, load_settings
from service.server import run

if __name__ == "__main__":
    run(build_app(load_settings(), NullObserver()))
