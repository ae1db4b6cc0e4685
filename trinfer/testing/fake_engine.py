"""A real engine process that does nothing but what engines do to their supervisors.

Stands alone and uses the standard library only: ``python fake_engine.py --port 8000 --ready-after 2 --deaf``. It
answers ``/v1/models``, ``/health``, ``/metrics``, completions and chat like an OpenAI-compatible engine; the answer
repeats the prompt, so that a test can tell whose answer it has. Every fault is an option; see ``--help``. Where the
command line is somebody else's, faults can be given as JSON in the environment instead:
``FAKE_ENGINE_FAULTS='{"ready-after": 2, "deaf": true, "print": ["one", "two"]}'``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from typing import Any, NoReturn

MARK = "echo: "
BODY_END = b"\r\n\r\n"
FAULTS = "FAKE_ENGINE_FAULTS"


def parse(argv: list[str], *, with_environment: bool = True) -> argparse.Namespace:
    """Options; times in seconds."""
    parser = argparse.ArgumentParser(prog="fake_engine", description="An engine with faults to order.")
    add = parser.add_argument
    add("--port", type=int, help="listen on this port")
    add("--host", default="127.0.0.1")
    add("--uds", help="listen on this unix socket")
    add("--model", default="fake", help="name in /v1/models")
    add("--latency", type=float, default=0, help="time before each answer")
    add("--token-latency", type=float, default=0, help="time before each answer, for each of its words")
    start = parser.add_argument_group("start")
    start.add_argument("--ready-after", type=float, default=0, help="bind only after this time")
    start.add_argument("--loading-503", type=float, default=0, help="bind at once, and answer 503 for this time")
    start.add_argument("--never-ready", action="store_true", help="never bind")
    start.add_argument(
        "--port-in-use",
        type=int,
        default=0,
        help="find the port taken in the first N starts (counted in --counter FILE)",
    )
    start.add_argument("--fail-starts", type=int, default=0, help="exit in the first N starts (counted likewise)")
    start.add_argument("--counter", help="file that counts starts")
    start.add_argument(
        "--only-first", type=int, default=0, metavar="N", help="be well from start N + 1 on (counted likewise)"
    )
    crash = parser.add_argument_group("crash")
    crash.add_argument("--crash-at", default="", help="before-bind, loading, ready:SECONDS or request:N")
    crash.add_argument("--exit-code", type=int, default=1)
    crash.add_argument("--signal", default="", help="die by this signal instead, such as SIGSEGV")
    tree = parser.add_argument_group("processes", "children keep the engine's stderr open, also when it has ended")
    tree.add_argument("--deaf", action="store_true", help="ignore SIGTERM and SIGINT")
    tree.add_argument("--slow-stop", type=float, default=0, help="time between SIGTERM and the exit")
    tree.add_argument("--children", type=int, default=0, help="workers in the same process group")
    tree.add_argument("--needs-children", action="store_true", help="answer nothing more once one of them has died")
    tree.add_argument("--own-session", action="store_true", help="a child in a session of its own")
    tree.add_argument("--daemon", action="store_true", help="a double-forked daemon")
    tree.add_argument("--deaf-grandchild", action="store_true", help="a grandchild that ignores SIGTERM")
    tree.add_argument(
        "--respawning", action="store_true", help="a child that forks its successor when it is told to end"
    )
    tree.add_argument("--stopped", action="store_true", help="a child that is stopped (SIGSTOP)")
    output = parser.add_argument_group("output")
    output.add_argument("--print", action="append", default=[], metavar="LINE", help="write this line at the start")
    output.add_argument("--print-at-request", nargs=2, action="append", default=[], metavar=("N", "LINE"))
    output.add_argument("--flood", type=int, default=0, help="bytes of lines to write at the start")
    output.add_argument("--chatter", type=int, default=0, help="bytes of lines per second, for as long as it lives")
    output.add_argument("--long-line", type=int, default=0, help="a line of so many bytes")
    output.add_argument("--bad-utf8", action="store_true")
    output.add_argument("--progress-bar", action="store_true", help="a progress bar with carriage returns")
    serve = parser.add_argument_group("requests")
    serve.add_argument("--wedge-after", type=int, default=-1, help="answer N requests, then no more; health stays 200")
    serve.add_argument("--status-at", nargs=2, action="append", default=[], metavar=("N", "STATUS"))
    serve.add_argument("--status-from", nargs=2, action="append", default=[], metavar=("N", "STATUS"))
    serve.add_argument("--stall-at", nargs=2, action="append", default=[], metavar=("N", "SECONDS"))
    serve.add_argument("--retry-after", default="", help="header that goes with --status-at")
    serve.add_argument("--reset-at", type=int, default=-1, help="reset the connection in the middle of answer N")
    serve.add_argument("--sick-after", type=float, default=-1, help="/health answers 503 after this time")
    serve.add_argument("--silent-health", action="store_true", help="/health does not answer")
    serve.add_argument("--no-metrics", action="store_true", help="/metrics does not exist")
    serve.add_argument("--work", action="store_true", help="a counter in /metrics moves while a request is under way")
    serve.add_argument("--burn", action="store_true", help="use CPU while a request is under way")
    serve.add_argument("--probes-file", help="append a line here for each GET")
    serve.add_argument("--answered-file", help="append each prompt here, as JSON, when it is answered")
    serve.add_argument("--aborted-file", help="append a line here when a client goes away before its answer")
    options = parser.parse_args([*(from_environment() if with_environment else ()), *argv])
    phase, _, number = options.crash_at.partition(":")
    if phase not in {"", "before-bind", "loading", "ready", "request"} or (phase == "request" and not number.isdigit()):
        parser.error(f"--crash-at {options.crash_at}: allowed are before-bind, loading, ready:SECONDS, request:N")
    return options


def parse_only(argv: list[str], names: tuple[str, ...]) -> argparse.Namespace:
    """Only these options of a command line."""
    given = parse(argv)
    chosen = parse([], with_environment=False)
    for name in names:
        attribute = name.removeprefix("--").replace("-", "_")
        setattr(chosen, attribute, getattr(given, attribute))
    return chosen


def from_environment() -> list[str]:
    """The options in `FAULTS`: a value, true for a flag, or a list for an option that may be repeated."""
    options: list[str] = []
    for name, value in json.loads(os.environ.get(FAULTS, "{}")).items():
        for one in value if isinstance(value, list) else [value]:
            values = one if isinstance(one, list) else [one]
            if one is not False:
                options += [f"--{name}", *(str(part) for part in values if part is not True)]
    return options


def say(data: bytes) -> None:
    os.write(1, data)


def crash(options: argparse.Namespace) -> NoReturn:
    if options.signal:
        number = signal.Signals[options.signal]
        os.kill(os.getpid(), number)
        time.sleep(5)
    os._exit(options.exit_code)


def burn(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        sum(range(1000))


CHILDREN: list[subprocess.Popen[bytes]] = []


def child(code: str, *, own_session: bool = False) -> None:
    command = [sys.executable, "-I", "-S", "-c", code]
    CHILDREN.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=own_session))


SLEEP = "import time; time.sleep(600)"
DEAF = "import signal, time; signal.signal(15, signal.SIG_IGN); signal.signal(2, signal.SIG_IGN); time.sleep(600)"
DAEMON = f"import os\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0:\n  {SLEEP}"
# Its successor is forked in the handler, so that a signal to the process known so far is never the last one needed.
RESPAWN = (
    "import os, signal, time\n"
    "def again(*_):\n"
    " if os.fork(): os._exit(0)\n"
    "signal.signal(15, again)\n"
    "while True: time.sleep(600)"
)
STOPPED = f"import os, signal; os.kill(os.getpid(), signal.SIGSTOP); {SLEEP}"
GRANDPARENT = (
    f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-I', '-S', '-c', {DEAF!r}])\ntime.sleep(600)"
)


def fork_tree(options: argparse.Namespace) -> None:
    for _ in range(options.children):
        child(SLEEP)
    for wanted, code in (
        (options.daemon, DAEMON),
        (options.deaf_grandchild, GRANDPARENT),
        (options.respawning, RESPAWN),
        (options.stopped, STOPPED),
    ):
        if wanted:
            child(code)
    if options.own_session:
        child(SLEEP, own_session=True)


def talk(options: argparse.Namespace) -> None:
    for line in options.print:
        say(line.encode() + b"\n")
    if options.bad_utf8:
        say(b"half a character: \xe2\x96 and noise \xff\xfe\n")
    if options.long_line:
        say(b"x" * options.long_line + b"\n")
    if options.progress_bar:
        for percent in range(0, 101, 10):
            say(b"\rLoading weights: %3d%%" % percent)
        say(b"\n")
    line = b"flood " + b"." * 90 + b"\n"
    block = line * 600
    for _ in range(options.flood // len(block)):
        say(block)


def chatter(rate: int) -> None:
    line = b"chatter " + b"." * 91 + b"\n"
    while True:
        say(line * max(1, rate // 100 // len(line)))
        time.sleep(0.01)


def count_start(path: str) -> int:
    with open(path, "ab") as file:
        file.write(b".")
        return file.tell()


class Engine:
    """The server: a thread per connection."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.loaded_at = time.monotonic() + options.loading_503
        self.born = time.monotonic()
        self.lock = threading.Lock()
        self.requests = self.running = self.tokens = 0

    def listen(self) -> socket.socket:
        options = self.options
        if options.uds:
            server = socket.socket(socket.AF_UNIX)
            server.bind(options.uds)
        else:
            server = socket.socket()
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                server.bind((options.host, options.port))
            except OSError as error:
                say(
                    f"ERROR: [Errno {error.errno}] error while attempting to bind on address "
                    f"('{options.host}', {options.port}): address already in use\n".encode()
                )
                os._exit(1)
        server.listen(1024)
        return server

    def serve(self, server: socket.socket) -> None:
        while True:
            client, _ = server.accept()
            threading.Thread(target=self.converse, args=(client,), daemon=True).start()

    def converse(self, client: socket.socket) -> None:
        data = b""
        try:
            while True:
                while BODY_END not in data:
                    more = client.recv(65536)
                    if not more:
                        return
                    data += more
                head, data = data.split(BODY_END, 1)
                lines = head.decode("latin-1").split("\r\n")
                headers = {k.lower(): v.strip() for k, v in (line.split(":", 1) for line in lines[1:])}
                length = int(headers.get("content-length", 0))
                while len(data) < length:
                    more = client.recv(65536)
                    if not more:
                        return
                    data += more
                body, data = data[:length], data[length:]
                method, path = lines[0].split(" ")[:2]
                self.answer(client, method, path, body)
        except (OSError, ValueError):  # it is gone, or speaks no HTTP
            pass
        finally:
            client.close()

    def answer(self, client: socket.socket, method: str, path: str, body: bytes) -> None:
        if method == "GET" and self.options.probes_file:
            with open(self.options.probes_file, "a", encoding="utf-8") as file:
                file.write(f"{path} {self.running}\n")
        if time.monotonic() < self.loaded_at:
            self.send(client, 503, {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}})
        elif path == "/health":
            if self.options.silent_health:
                self.gone_within(client, 600)
                raise ConnectionAbortedError
            sick = 0 <= self.options.sick_after < time.monotonic() - self.born
            self.send(client, 503 if sick else 200, {"status": "sick" if sick else "ok"})
        elif path == "/v1/models":
            self.send(client, 200, {"object": "list", "data": [{"id": self.options.model, "object": "model"}]})
        elif path == "/metrics" and not self.options.no_metrics:
            self.send_metrics(client)
        elif method == "POST" and path in {"/v1/completions", "/v1/chat/completions"}:
            with self.lock:
                self.requests += 1
                self.running += 1
                number = self.requests
            try:
                self.complete(client, number, body, chat="chat" in path)
            finally:
                with self.lock:
                    self.running -= 1
        else:
            self.send(client, 404, {"error": {"message": f"no route {path}"}})

    def complete(self, client: socket.socket, number: int, body: bytes, *, chat: bool) -> None:
        options = self.options
        for at, line in options.print_at_request:
            if int(at) == number:
                say(line.encode() + b"\n")
        if options.crash_at == f"request:{number}":
            crash(options)
        patience = options.latency + sum(float(seconds) for at, seconds in options.stall_at if int(at) == number)
        if 0 <= options.wedge_after < number:
            patience = 600
        if options.burn:
            threading.Thread(target=burn, args=(patience,), daemon=True).start()
        if options.token_latency:
            patience += options.token_latency * len(body.split())
        gone = self.gone_within(client, patience)
        if options.needs_children and any(worker.poll() is not None for worker in CHILDREN):
            gone = gone or self.gone_within(client, 600)
        if gone:
            if options.aborted_file:
                with open(options.aborted_file, "a", encoding="utf-8") as file:
                    file.write(f"{number}\n")
            raise ConnectionAbortedError
        for at, status in [
            *options.status_at,
            *((number, each) for n, each in options.status_from if int(n) <= number),
        ]:
            if int(at) == number:
                self.send(client, int(status), {"error": {"message": f"status {status} to order"}}, options.retry_after)
                return
        try:
            payload = json.loads(body)
            prompt = payload["messages"][-1]["content"] if chat else payload["prompt"]
            words = (MARK + prompt).split(" ")[: payload.get("max_tokens") or 1000]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            self.send(client, 400, {"error": {"message": f"not a request that is understood here: {error!r}"}})
            return
        with self.lock:
            self.tokens += len(words)
        if options.answered_file:
            with open(options.answered_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(prompt) + "\n")
        if payload.get("stream"):
            self.stream(client, number, words, chat=chat)
            return
        text = " ".join(words)
        choice = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(words)}
        answer = {
            "id": f"fake-{number}",
            "object": "chat.completion" if chat else "text_completion",
            "created": 0,
            "model": options.model,
            "choices": [{"index": 0, "finish_reason": "stop", **choice}],
            "usage": {**usage, "total_tokens": sum(usage.values())},
        }
        if options.reset_at == number:
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
            self.reset(client)
        self.send(client, 200, answer)

    @staticmethod
    def reset(client: socket.socket) -> NoReturn:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise ConnectionAbortedError

    @staticmethod
    def gone_within(client: socket.socket, seconds: float) -> bool:
        """Work for so long, and notice when the client leaves."""
        if not seconds:
            return False
        client.settimeout(seconds)
        try:
            return client.recv(1, socket.MSG_PEEK) == b""
        except TimeoutError:
            return False
        except OSError:
            return True
        finally:
            client.settimeout(None)

    def stream(self, client: socket.socket, number: int, words: list[str], *, chat: bool) -> None:
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        frame = {
            "id": f"fake-{number}",
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": 0,
            "model": self.options.model,
        }
        for index, word in enumerate([*words, None]):
            text = word if index == 0 or word is None else f" {word}"
            piece: dict[str, Any] = {"delta": {"content": text} if text else {}} if chat else {"text": text or ""}
            choice = {"index": 0, **piece, "finish_reason": "stop" if word is None else None}
            self.send_event(client, json.dumps({**frame, "choices": [choice]}))
            if self.options.reset_at == number:
                self.reset(client)
        self.send_event(client, "[DONE]")
        client.sendall(b"0\r\n\r\n")

    @staticmethod
    def send_event(client: socket.socket, text: str) -> None:
        data = b"data: " + text.encode() + b"\n\n"
        client.sendall(b"%x\r\n%s\r\n" % (len(data), data))

    def send_metrics(self, client: socket.socket) -> None:
        labels = f'{{engine="0",model_name="{self.options.model}"}}'
        values = {
            ("num_requests_running", "gauge"): self.running,
            ("num_requests_waiting", "gauge"): 0,
            ("prompt_tokens_total", "counter"): int(time.monotonic() * 1000)
            if self.options.work and self.running
            else 0,
            ("generation_tokens_total", "counter"): self.tokens,
            ("request_success_total", "counter"): self.requests - self.running,
        }
        lines = [
            f"# TYPE vllm:{name} {kind}\nvllm:{name}{labels} {float(value)}\n" for (name, kind), value in values.items()
        ]
        self.send_raw(client, 200, "text/plain", "".join(lines).encode(), "")

    def send(self, client: socket.socket, status: int, value: dict[str, Any], retry_after: str = "") -> None:
        extra = f"Retry-After: {retry_after}\r\n" if retry_after else ""
        self.send_raw(client, status, "application/json", json.dumps(value).encode(), extra)

    @staticmethod
    def send_raw(client: socket.socket, status: int, kind: str, body: bytes, extra: str) -> None:
        head = f"HTTP/1.1 {status} Fake\r\nContent-Type: {kind}\r\n{extra}Content-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)


def main(argv: list[str]) -> None:
    options = parse(argv)
    started = count_start(options.counter) if options.counter else 1
    if 0 < options.only_first < started:
        keep = ("--port", "--host", "--uds", "--model", "--latency", "--probes-file", "--work", "--no-metrics")
        options = parse_only(argv, keep)

    def stop(*_: object) -> None:
        time.sleep(options.slow_stop)
        os._exit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN if options.deaf else stop)
    fork_tree(options)
    talk(options)
    if options.chatter:
        threading.Thread(target=chatter, args=(options.chatter,), daemon=True).start()
    if started <= options.port_in_use:
        say(
            f"ERROR: [Errno 98] error while attempting to bind on address ('{options.host}', {options.port}): "
            "address already in use\n".encode()
        )
        os._exit(1)
    if started <= options.fail_starts or options.crash_at == "before-bind":
        crash(options)
    if options.never_ready:
        time.sleep(600)
    time.sleep(options.ready_after)
    engine = Engine(options)
    server = engine.listen()
    phase, _, seconds = options.crash_at.partition(":")
    if phase in {"loading", "ready"}:
        threading.Timer(float(seconds or 0.05), crash, (options,)).start()
    threading.Thread(target=engine.serve, args=(server,), daemon=True).start()
    say(b"Application startup complete.\n")
    while True:
        signal.pause()


if __name__ == "__main__":
    main(sys.argv[1:])
