"""Real image registries that want a login: user and password, and tokens, as GitHub's registry gives them out."""

from __future__ import annotations

import base64
import datetime
import json
import subprocess
import threading
import time
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from mlops_course.release import ReleaseError, image_labels, tag_image, tagged_digest

from .conftest import docker

USER, PASSWORD = "ann", "k7Qz9-mR2vXw8-Lp4tNb6"  # only here; not a secret
# What `htpasswd -nbB` makes of them.
HTPASSWD = "ann:$2y$05$abcdefghijklmnopqrstuu/5rNm2wPLolCRlC76VJHJzSxGceK.Du\n"


def url_safe(data: bytes) -> str:
    """Return base64 as JSON web tokens write it."""
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


class TokenServer:
    """Gives tokens to ann for what she asks, as the specification of Docker's token authentication says."""

    def __init__(self, folder: Path) -> None:
        self.key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "issuer")])
        now = datetime.datetime.now(datetime.UTC)
        made = x509.CertificateBuilder(name, name, self.key.public_key(), x509.random_serial_number())
        made = made.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
        self.certificate = made.sign(self.key, hashes.SHA256())
        self.bundle = folder / "issuer.crt"
        self.bundle.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))
        self.scopes: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = parse_qs(urlsplit(self.path).query)
                right = self.headers.get("Authorization") == f"Basic {outer.login()}"
                body = json.dumps({"token": outer.token(asked.get("scope", []))} if right else {}).encode()
                self.send_response(200 if right else 401)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.realm = f"http://127.0.0.1:{self.server.server_port}/token"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @staticmethod
    def login() -> str:
        return base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()

    def token(self, scopes: list[str]) -> str:
        self.scopes += scopes
        wanted = [scope.split(":") for text in scopes for scope in text.split()]
        access = [{"type": kind, "name": name, "actions": what.split(",")} for kind, name, what in wanted]
        now = int(time.time())
        der = base64.b64encode(self.certificate.public_bytes(serialization.Encoding.DER)).decode()
        parts: list[dict[str, object]] = [
            {"typ": "JWT", "alg": "RS256", "x5c": [der]},
            {
                "iss": "issuer",
                "sub": USER,
                "aud": "registry",
                "jti": str(time.time_ns()),
                "access": access,
                "nbf": now - 60,
                "iat": now - 60,
                "exp": now + 300,
            },
        ]
        text = ".".join(url_safe(json.dumps(part).encode()) for part in parts)
        return f"{text}.{url_safe(self.key.sign(text.encode(), padding.PKCS1v15(), hashes.SHA256()))}"


@pytest.fixture(scope="module", params=["basic", "token"])
def guarded(request: pytest.FixtureRequest, engine: None, tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """Run a registry that wants a login, push a small image to it with Docker's own login, and give its name."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "htpasswd").write_text(HTPASSWD)
    tokens = TokenServer(folder)
    ways = {
        "basic": {"HTPASSWD_REALM": "registry", "HTPASSWD_PATH": "/auth/htpasswd"},
        "token": {
            "TOKEN_REALM": tokens.realm,
            "TOKEN_SERVICE": "registry",
            "TOKEN_ISSUER": "issuer",
            "TOKEN_ROOTCERTBUNDLE": "/auth/issuer.crt",
        },
    }
    settings = [f"--env=REGISTRY_AUTH_{name}={value}" for name, value in ways[request.param].items()]
    places = [f"--volume={folder}:/auth:ro", "--publish=127.0.0.1::5000"]
    container = docker("run", "--detach", "--rm", *places, *settings, "registry:2")
    host = docker("port", container, "5000/tcp").splitlines()[0]
    try:
        end = time.monotonic() + 30
        while True:
            try:
                assert httpx.get(f"http://{host}/v2/").status_code == 401
                break
            except httpx.TransportError:
                assert time.monotonic() < end, docker("logs", container)
                time.sleep(0.1)
        config, tag = ["--config", str(folder / "docker")], f"{host}/ann/small:one"
        login = ["docker", *config, "login", "--username", USER, "--password-stdin", host]
        subprocess.run(login, input=PASSWORD, text=True, capture_output=True, check=True)
        (folder / "Dockerfile").write_text("FROM scratch\nCOPY htpasswd /\nLABEL what=small\n")
        docker("build", "--quiet", "--tag", tag, str(folder))
        docker(*config, "push", "--quiet", tag)
        yield docker("image", "inspect", "--format", "{{index .RepoDigests 0}}", tag)
        docker("image", "rm", "--force", tag)
    finally:
        docker("rm", "--force", "--volumes", container)
        tokens.server.shutdown()
        tokens.server.server_close()


def test_with_a_login_images_are_read_and_tags_are_moved(guarded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGISTRY_USER", USER)
    monkeypatch.setenv("REGISTRY_PASSWORD", PASSWORD)
    digest = guarded.partition("@")[2]
    assert tagged_digest(guarded, "one") == digest
    assert tagged_digest(guarded, "staging") is None
    assert image_labels(guarded) == {"what": "small"}
    assert tag_image(guarded, "staging")
    assert tagged_digest(guarded, "staging") == digest


@pytest.mark.parametrize("password", ["", "wrong"])
def test_without_the_right_login_it_is_said_what_to_set(
    guarded: str, password: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGISTRY_USER", USER if password else "")
    monkeypatch.setenv("REGISTRY_PASSWORD", password)
    with pytest.raises(ReleaseError, match="refuses ann/small: set REGISTRY_USER and REGISTRY_PASSWORD"):
        tagged_digest(guarded, "one")
