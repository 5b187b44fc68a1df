"""Mirrors as people run them: nginx with its own limits and faults, in the clear and over TLS."""

from __future__ import annotations

import datetime
import gzip
import ipaddress
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from omnistore.testing.tiny_gguf import TinyGGUF, TinyTensor

if TYPE_CHECKING:
    from tests.system.conftest import StartSeed

Run = Callable[..., subprocess.CompletedProcess[str]]
NAME = "six.gguf"
NGINX = shutil.which("nginx", path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin")))
pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed (Debian: nginx-light)")

CONFIG = """
daemon off;
master_process off;
pid {top}/nginx.pid;
error_log {top}/error.log;
events {{ worker_connections 64; }}
http {{
    access_log {top}/access.log;
    client_body_temp_path {top}/t1; proxy_temp_path {top}/t2; fastcgi_temp_path {top}/t3;
    uwsgi_temp_path {top}/t4; scgi_temp_path {top}/t5;
    default_type application/octet-stream;
    limit_conn_zone $server_port zone=busy:1m;
    server {{
        listen 127.0.0.1:{port};
        listen 127.0.0.1:{tls} ssl;
        ssl_certificate {top}/leaf.pem;
        ssl_certificate_key {top}/leaf.key;
        root {top}/web;
        location /slow/ {{ alias {top}/web/; limit_rate 2m; }}
        location /cut/ {{ limit_rate 1m; access_log {top}/cut.log; }}
        location /few/ {{ alias {top}/web/; limit_conn busy 1; }}
        location /brief/ {{ alias {top}/web/; keepalive_requests 1; }}
        location /gzip/ {{ alias {top}/web/; gzip on; gzip_types *; gzip_proxied any; gzip_min_length 0; }}
        location /encoded/ {{ alias {top}/web/; gzip_static always; }}
        location /whole/ {{ alias {top}/web/; max_ranges 0; }}
        location /moved/ {{ rewrite ^/moved/(.*)$ /$1 redirect; }}
        location /away/ {{ rewrite ^/away/(.*)$ http://127.0.0.1:{port}/$1 permanent; }}
        location /round/ {{ rewrite ^ $uri redirect; }}
    }}
}}
"""


@dataclass
class Mirror:
    top: Path
    port: int
    tls: int
    cid: str
    peer: str
    """A node that knows what the model is, and whose file is gone."""

    @property
    def file(self) -> Path:
        return self.top / "web" / NAME

    def url(self, path: str = "") -> str:
        return f"http://127.0.0.1:{self.port}/{path}{NAME}"

    def secure(self) -> str:
        return f"https://127.0.0.1:{self.tls}/{NAME}"

    def pin(self, omni: Run, *urls: str, **environ: str) -> subprocess.CompletedProcess[str]:
        asked = [option for url in urls for option in ("--from", url)]
        return omni("pin", self.cid, "--peer", self.peer, *asked, "--no-mdns", "--json", **environ)


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as held:
        return int(held.getsockname()[1])


def make_certificates(top: Path) -> None:
    """An authority nobody knows, and the server's certificate by it."""
    now = datetime.datetime.now(datetime.UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in ("nobody's CA", "127.0.0.1")
    ]
    loopback = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    for number, (name, key) in enumerate(zip(("ca", "leaf"), keys, strict=True)):
        made = (
            x509.CertificateBuilder()
            .subject_name(names[number])
            .issuer_name(names[0])
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=number == 0, path_length=None), critical=True)
            .add_extension(loopback, critical=False)
            .sign(keys[0], hashes.SHA256())
        )
        (top / f"{name}.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private = keys[1].private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (top / "leaf.key").write_bytes(private)


def serve(top: Path, port: int, tls: int) -> subprocess.Popen[bytes]:
    config = top / "nginx.conf"
    config.write_text(CONFIG.format(top=top, port=port, tls=tls))
    process = subprocess.Popen([str(NGINX), "-p", str(top), "-e", str(top / "error.log"), "-c", str(config)])
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return process
        except OSError:
            if process.poll() is not None:
                break
            time.sleep(0.05)
    process.kill()
    process.wait()
    raise AssertionError((top / "error.log").read_text())


@pytest.fixture
def mirror(tmp_path: Path, omni: Run, start_seed: StartSeed) -> Iterator[Mirror]:
    """A mirror with 13 MB of weights in seven tensors, beside a peer that has but their description."""
    top, home = tmp_path / "nginx", tmp_path / "publisher"
    (top / "web").mkdir(parents=True)
    file, metadata = tmp_path / NAME, {"general.architecture": "llama", "llama.block_count": 6}
    tensors = [TinyTensor(f"blk.{n}.ffn_up.weight", shape=(2048, 256)) for n in range(6)]
    tensors.append(TinyTensor("token_embd.weight", shape=(1001, 300)))
    file.write_bytes(TinyGGUF(tensors, metadata).build())
    cid = omni("add", file, home=home).stdout.split()[-1]
    peer = start_seed(home).addr
    shutil.copyfile(file, top / "web" / NAME)
    # Emptied first: the seed may have it open.
    os.truncate(file, 0)
    file.unlink()
    make_certificates(top)
    port, tls = free_port(), free_port()
    process = serve(top, port, tls)
    yield Mirror(top, port, tls, cid, peer)
    process.terminate()
    process.wait(10)


def whole(run: subprocess.CompletedProcess[str], file: Path) -> dict[str, Any]:
    """The report of a fetch that got everything."""
    assert run.returncode == 0, run.stderr
    done: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    assert Path(done["path"]).read_bytes() == file.read_bytes()
    return done


def test_all_of_a_model_comes_from_nginx(mirror: Mirror, omni: Run, tmp_path: Path) -> None:
    for number, way in enumerate(["", "slow/", "few/", "brief/", "gzip/", "moved/", "away/"]):
        url = mirror.url(way)
        run = mirror.pin(omni, url, OMNI_HOME=str(tmp_path / f"home{number}"))
        done = whole(run, mirror.file)
        assert done["peers"][url] == done["bytes_fetched"] > 13_000_000, way
        assert not done["dropped"], way


def test_mirrors_of_no_use_are_named_and_another_gives_all(mirror: Mirror, omni: Run) -> None:
    web, data = mirror.file.parent, mirror.file.read_bytes()
    (web / f"{NAME}.gz").write_bytes(gzip.compress(data, 1))
    for name, size in (("short", 5_000_000), ("empty", 0)):
        (web / name).mkdir()
        (web / name / NAME).write_bytes(data[:size])
    reasons = {
        "absent/": "answered 404 to a range request",
        "encoded/": "encoded (gzip)",
        "whole/": "does not answer range requests",
        "round/": "redirects more than 5 times",
        "short/": "has a file of 5000000 bytes",
        "empty/": "has a file of 0 bytes",
    }
    good = mirror.url("slow/")
    run = mirror.pin(omni, *map(mirror.url, reasons), good)
    done = whole(run, mirror.file)
    for way, reason in reasons.items():
        bad = mirror.url(way)
        assert reason in done["dropped"].get(bad, ""), (way, done["dropped"])
        assert f"dropped {bad}: " in run.stderr
    assert good not in done["dropped"]


def test_a_file_that_is_truncated_while_it_is_fetched(mirror: Mirror, omni: Run) -> None:
    kept, victim = mirror.file, mirror.file.parent / "cut" / NAME
    victim.parent.mkdir()
    shutil.copyfile(kept, victim)
    served = mirror.top / "cut.log"

    def cut() -> None:
        # The first request it logged was for the magic number; weights follow, slowly.
        while not (served.exists() and served.stat().st_size):
            time.sleep(0.002)
        os.truncate(victim, 1000)

    cutting = threading.Thread(target=cut, daemon=True)
    cutting.start()
    bad, good = mirror.url("cut/"), mirror.url("slow/")
    done = whole(mirror.pin(omni, bad, good), kept)
    cutting.join(10)
    assert "has a file of 1000 bytes" in done["dropped"][bad] and good not in done["dropped"]


def test_a_certificate_of_an_authority_nobody_knows(mirror: Mirror, omni: Run) -> None:
    # Refused, with what to do about it in the same line; then done.
    run = mirror.pin(omni, mirror.secure(), mirror.url("slow/"), SSL_CERT_FILE="", SSL_CERT_DIR="")
    reason = whole(run, mirror.file)["dropped"][mirror.secure()]
    assert "certificate is not trusted: unable to get local issuer certificate" in reason
    assert "SSL_CERT_FILE" in reason and f"dropped {mirror.secure()}: {reason}\n" in run.stderr


def test_an_authority_named_in_the_environment(mirror: Mirror, omni: Run) -> None:
    run = mirror.pin(omni, mirror.secure(), SSL_CERT_FILE=str(mirror.top / "ca.pem"))
    done = whole(run, mirror.file)
    assert done["peers"][mirror.secure()] == done["bytes_fetched"] and not done["dropped"]


def test_a_certificate_for_another_host_and_none_at_all(mirror: Mirror, omni: Run) -> None:
    elsewhere = mirror.secure().replace("127.0.0.1", "localhost")
    plain = mirror.url().replace("http:", "https:")
    authority = str(mirror.top / "ca.pem")
    run = mirror.pin(omni, elsewhere, plain, mirror.url("slow/"), SSL_CERT_FILE=authority)
    dropped = whole(run, mirror.file)["dropped"]
    assert "Hostname mismatch" in dropped[elsewhere]
    assert "does not speak TLS" in dropped[plain]


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_certificates_that_can_not_be_read(mirror: Mirror, omni: Run, content: str | None) -> None:
    named = mirror.top / "authorities.pem"
    if content is not None:
        named.write_text(content)
    run = mirror.pin(omni, mirror.secure(), SSL_CERT_FILE=str(named))
    assert run.returncode == 2 and str(named) in run.stderr and "PEM" in run.stderr
    assert "bug" not in run.stderr
