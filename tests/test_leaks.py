"""The leak check itself: a test that leaves something behind must fail, and say what."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from tests import leaks

if TYPE_CHECKING:
    import pytest


def test_finds_a_process_that_has_daemonised():
    before = leaks.snapshot()
    script = "sleep 60 >/dev/null 2>&1 & echo $!"  # its shell ends, and it lives on under somebody else
    process = subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    pid = int(process.stdout.read())
    process.stdout.close()
    process.wait()
    try:
        assert any(f"process {pid}" in found for found in leaks.leaks_since(before))
    finally:
        os.kill(pid, 9)


def test_finds_a_file_and_a_thread(tmp_path: Path):
    before = leaks.snapshot()
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="left over")
    thread.start()
    fd = os.open(tmp_path / "open", os.O_CREAT | os.O_WRONLY)
    try:
        found = "\n".join(leaks.leaks_since(before))
    finally:
        os.close(fd)
        stop.set()
        thread.join()
    assert "thread left over" in found
    assert str(tmp_path / "open") in found


def test_a_leaking_test_fails_with_the_name_of_the_leak(pytester: pytest.Pytester):
    root = Path(__file__).parent.parent
    pytester.makeconftest(f"import sys; sys.path.insert(0, {str(root)!r})\nfrom tests.conftest import *")
    pytester.makepyfile("import os\ndef test_leak():\n    os.dup(0)\ndef test_fine():\n    pass")
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-p", "no:trio")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*the test has left behind:*", "*file descriptor*"])
