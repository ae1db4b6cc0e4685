"""Leak checks around every test, and Hypothesis profiles."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Verbosity, settings

from tests import leaks

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from xdist.remote import Producer
    from xdist.scheduler import Scheduling

pytest_plugins = ["pytester"]

os.environ[leaks.VARIABLE] = secrets.token_hex(8)
# Short: the path of a unix socket must fit into 107 bytes.
_RUNTIME = tempfile.mkdtemp(prefix="tri-", dir="/tmp")
os.environ["TRINFER_RUNTIME_DIR"] = _RUNTIME
# The machine's own keys and nodes are none of the tests' business.
for _name in ("TRINFER_API_KEY", "OPENAI_API_KEY", "DATATROVE_NODE_RANK", "SLURM_NODEID", "GROUP_RANK"):
    os.environ.pop(_name, None)

# A shell's background jobs ignore Ctrl-C, and nohup's a lost terminal; so would every process that a test starts and
# then sends these signals to.
for _number, _action in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGQUIT, signal.SIG_DFL),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _action)

# Examples start real processes: time says nothing about a single one.
_common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
settings.register_profile("dev", max_examples=50, **_common)
settings.register_profile("ci", max_examples=200, print_blob=True, **_common)
settings.register_profile(
    "deep", max_examples=int(os.environ.get("TRINFER_EXAMPLES", "10000")), verbosity=Verbosity.normal, **_common
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

# With `-n 2`, a second process runs the tests of these folders. They take long, and do not look at the clock; most
# that do, those of processes and servers, come when it is done.
BESIDE = {"engines"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Generator[Path, None, None]:
    """A file system of 64 KiB, which is soon full."""
    if os.getuid() != 0:
        pytest.skip("a file system of its own needs root")
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Real engines come last: in CI they are installed beside the other tests."""
    items.sort(key=lambda item: item.get_closest_marker("engine") is not None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    """Two portions, each to be done by one process in the usual order."""
    from xdist.scheduler import LoadScopeScheduling

    class Portions(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "beside" if nodeid.removeprefix("tests/").partition("/")[0] in BESIDE else "all else"

    return Portions(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    before = leaks.snapshot()
    result = yield
    if found := leaks.leaks_since(before):
        pytest.fail("the test has left behind:\n  " + "\n  ".join(found), pytrace=False)
    return result


def pytest_sessionfinish() -> None:
    shutil.rmtree(_RUNTIME, ignore_errors=True)
