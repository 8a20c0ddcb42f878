"""A real nginx with a site of deploy/nginx, or with the guide's block, on loopback ports of the tests' own."""

from __future__ import annotations

import ctypes
import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path

from http_support import START_S, wait_for
from support import ROOT, require_service

DEPLOY = ROOT / "deploy" / "nginx"
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1

# What surrounds a site: the distribution's nginx.conf, with its folders moved.
MAIN = """
daemon off; worker_processes 1; pid nginx.pid; error_log stderr warn;
events {}
http {
    access_log off;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path a; uwsgi_temp_path b; scgi_temp_path c;
    include conf.d/*.conf;
}
"""


def guide_block(page: str = "docs/deployment.md") -> str:
    """The guide's nginx.conf, as the documentation shows it."""
    found = re.search(r"\*\*nginx\.conf:\*\*\n```nginx\n(.*?)^```$", (ROOT / page).read_text("utf-8"), re.M | re.S)
    assert found, f"{page} does not show the guide's nginx.conf"
    return found[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed one for your-domain.com and this machine."""
    cert, key = folder / "fullchain.pem", folder / "privkey.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=your-domain.com", "-addext", "subjectAltName=DNS:your-domain.com,DNS:localhost,IP:127.0.0.1",
         "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    return cert, key


class Nginx:
    """``site``: a file of deploy/nginx, or ``guide``. ``changes``: more texts to replace, which must be there."""

    def __init__(self, folder: Path, site: str, server_url: str, changes: dict[str, str] | None = None) -> None:
        require_service("nginx", shutil.which("nginx") is not None, "make services installs it")
        self.folder = folder
        self.port, self.tls_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.tls_url = f"https://127.0.0.1:{self.tls_port}"
        address = server_url.removeprefix("http://")
        self._changes = {
            "listen 80;": f"listen 127.0.0.1:{self.port};",
            **({"localhost:5000": address} if site == "guide" else {"127.0.0.1:5000": address}),
            **({} if site == "guide" else {"/var/log/nginx/access.log": str(folder / "access.log")}),
            **(changes or {}),
        }
        if "tls" in site:
            cert, key = certificate(folder)
            self.ca = str(cert)
            live = "/etc/letsencrypt/live/your-domain.com"
            self._changes |= {f"{live}/fullchain.pem": str(cert), f"{live}/privkey.pem": str(key)}
            self._changes |= {"listen 443": f"listen 127.0.0.1:{self.tls_port}", "/var/www/html": str(folder / "html")}
        self._place(site)
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command(), cwd=folder, stdout=log, stderr=log,
                preexec_fn=lambda: _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
            )  # fmt: skip
        wait_for(self._listens, START_S, "nginx listens")

    def command(self, *more: str) -> list[str]:
        return ["nginx", "-p", str(self.folder), "-c", "nginx.conf", "-e", "stderr", *more]

    def _place(self, site: str) -> None:
        """The files where the documentation copies them to, with ports and paths that are the tests'."""
        left = dict(self._changes)

        def changed(text: str) -> str:
            for ours, theirs in self._changes.items():
                if ours in text:
                    left.pop(ours, None)
                    text = text.replace(ours, theirs)
            return text

        (self.folder / "conf.d").mkdir()
        (self.folder / "nginx.conf").write_text(MAIN)
        text = guide_block() if site == "guide" else (DEPLOY / site).read_text(encoding="utf-8")
        (self.folder / "conf.d" / "site.conf").write_text(changed(text))
        if site != "guide":
            (self.folder / "nano-gpt-api").mkdir()
            for path in (DEPLOY / "nano-gpt-api").iterdir():
                (self.folder / "nano-gpt-api" / path.name).write_text(changed(path.read_text(encoding="utf-8")))
        assert not left, f"not in the files: {list(left)}"

    def _listens(self) -> bool:
        assert self._process.poll() is None, self.log.read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def end(self) -> None:
        self._process.terminate()
        self._process.wait(30)
