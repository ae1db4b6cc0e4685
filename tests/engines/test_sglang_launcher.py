"""The launcher that keeps SGLang's key out of the command line, with a package that only calls itself sglang."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from trinfer.engines import sglang_launcher

KEY = "sk-very-secret"
STUB = """
import json, logging, multiprocessing, os, sys

def child(pipe):
    pipe.send({"environ": dict(os.environ), "argv": sys.argv})

if __name__ == "__main__":
    logging.basicConfig(level="INFO", format="%(message)s")
    logging.info("server_args=" + repr(sys.argv))
    logging.info("%s and %d", sys.argv[-1], 7)
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=child, args=(theirs,))
    process.start()
    with open("/proc/self/cmdline") as own, open(f"/proc/{process.pid}/cmdline") as its:
        lines = own.read() + its.read()
    said = ours.recv()
    process.join()
    print(json.dumps({"argv": sys.argv, "name": __spec__.name, "path": sys.path, "lines": lines, "child": said}))
"""


@pytest.fixture
def launch(tmp_path):
    package = tmp_path / "sglang"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "launch_server.py").write_text(STUB)

    def run(*words, key=KEY):
        environ = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
        if key:
            environ[sglang_launcher.KEY_VARIABLE] = key
        command = [sys.executable, sglang_launcher.__file__, *words]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr

    return run


def test_the_key_reaches_sglang_and_nothing_else(launch):
    said, log = launch("--model-path", "m")
    assert said["argv"][1:] == ["--model-path", "m", "--api-key", KEY]
    assert said["name"] == "sglang.launch_server"
    assert KEY not in said["lines"]
    assert KEY not in json.dumps(said["child"]["environ"])
    assert KEY not in log
    assert "***" in log
    assert "*** and 7" in log


def test_the_launchers_own_folder_is_out_of_the_way(launch):
    said, _ = launch()
    assert not any(entry.endswith("trinfer/engines") for entry in said["path"])


def test_without_a_key(launch):
    said, log = launch("--model-path", "m", key=None)
    assert said["argv"][1:] == ["--model-path", "m"]
    assert "***" not in log
