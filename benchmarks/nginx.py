"""An nginx on loopback that answers every completion with the same 460 bytes, over TCP and a unix socket."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ANSWER_BYTES = 460
EVENTS = 200_000

CONFIG = """
daemon off;
worker_processes 1;
pid {folder}/pid;
error_log {folder}/error.log;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  keepalive_requests 100000000;
  keepalive_timeout 600s;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{port} backlog=8192;
    listen unix:{folder}/nginx.sock backlog=8192;
    location /reset {{ return 444; }}
    location /stream {{ error_page 405 =200 $uri; root {folder}; default_type text/event-stream; }}
    location / {{ default_type application/json; return 200 '{answer}'; }}
  }}
}}
"""


@dataclass(frozen=True)
class Nginx:
    """Where it listens, and what it is."""

    port: int
    uds: str
    version: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def answer() -> str:
    """A completion of exactly `ANSWER_BYTES`."""
    value = {
        "id": "chatcmpl-0123456789abcdef",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "fixed",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": ""}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 250, "completion_tokens": 40, "total_tokens": 290},
    }
    value["choices"][0]["message"]["content"] = "x" * (ANSWER_BYTES - len(json.dumps(value)))
    return json.dumps(value)


def events(count: int) -> bytes:
    """A stream of so many chunks, as vLLM writes them."""
    chunk = {
        "id": "chatcmpl-0123456789abcdef",
        "object": "chat.completion.chunk",
        "created": 1700000000,
        "model": "fixed",
        "choices": [{"index": 0, "delta": {"content": " word"}, "logprobs": None, "finish_reason": None}],
    }
    return (b"data: " + json.dumps(chunk).encode() + b"\n\n") * count + b"data: [DONE]\n\n"


@contextlib.contextmanager
def running() -> Iterator[Nginx]:
    """Start it, and stop it in the end."""
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    if not os.path.exists(program):
        raise SystemExit("nginx is not installed: apt-get install nginx-light")
    with tempfile.TemporaryDirectory(prefix="trinfer-bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # its worker is another user when root starts it
        (folder / "stream").write_bytes(events(EVENTS))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        config = folder / "nginx.conf"
        config.write_text(CONFIG.format(folder=folder, port=port, answer=answer()))
        version = (
            subprocess.run([program, "-v"], capture_output=True, text=True, check=True).stderr.split("/")[-1].strip()
        )
        process = subprocess.Popen([program, "-c", str(config), "-p", name], stderr=subprocess.DEVNULL)
        try:
            wait_for(port)
            yield Nginx(port, str(folder / "nginx.sock"), version)
        finally:
            process.terminate()
            process.wait()


def wait_for(port: int) -> None:
    give_up = time.monotonic() + 10
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if time.monotonic() > give_up:
            raise SystemExit("nginx did not start")
        time.sleep(0.02)
