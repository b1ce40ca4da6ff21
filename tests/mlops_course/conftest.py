"""What the tests of the chapters share: an object store on this machine, and real services."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import Thread

import pytest

from mlops_course.blueprint import MODEL_NAME, project_root
from mlops_course.release import asking


@pytest.fixture(scope="session")
def s3() -> Generator[str]:
    """Start an object store with the S3 interface, and return a bucket in it. Its variables are set while it runs."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    # One request at a time: this stand-in compares and writes in two steps, where S3 does it in one.
    server = make_server(
        "127.0.0.1",
        0,
        DomainDispatcherApplication(create_backend_app),
        threaded=False,
        request_handler=MotoRequestHandler,
    )
    Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        import fsspec

        fsspec.filesystem("s3").mkdir("tests")
        yield "s3://tests"
    server.shutdown()
    server.server_close()


@pytest.fixture
def shelf(artifacts_root: Path, tmp_path: Path) -> Path:
    """Return a copy of the shelf of models, without a ledger, that a test may change."""
    ignore = shutil.ignore_patterns("ledger.jsonl", ".*")
    return Path(shutil.copytree(artifacts_root / MODEL_NAME, tmp_path / "shelf", ignore=ignore))
