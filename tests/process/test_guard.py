"""The kill matrix: however an owner, or its guard, dies, nothing of the tree is left after three seconds."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time

import pytest

from tests.process.trees import ALL_KINDS, new_mark, start_owner, survivors, wait_for_tree, wait_gone
from trinfer.process.guard import _descendants_by_parent, descendants

# 2 of the guard, the engine, 2 children, and one each of the other kinds; the grandchild has a parent of its own.
FULL_TREE = 2 + 1 + 2 + 6
LIMIT = 3.0


@pytest.fixture
def mark():
    name = new_mark()
    yield name
    for each in (name, *(f"{name}-{index}" for index in range(4))):
        for pid in survivors(each):
            os.kill(pid, signal.SIGKILL)


def end(owner: subprocess.Popen[str]) -> None:
    assert owner.stdout is not None
    owner.stdout.close()
    owner.wait()


@pytest.mark.slow
@pytest.mark.parametrize("number", range(5))
def test_kill_9_of_owners_at_random_moments(mark, number):
    # From before its first import until long after the whole tree is there. The seed is the parameter.
    moments = sorted(random.Random(number).uniform(0, 0.8) for _ in range(4))
    owners = [(start_owner(f"{mark}-{index}", 1.0, *ALL_KINDS), f"{mark}-{index}") for index in range(len(moments))]
    began = time.monotonic()
    for (owner, _), moment in zip(owners, moments, strict=True):
        time.sleep(max(0.0, began + moment - time.monotonic()))
        owner.kill()
        end(owner)
    killed = time.monotonic()  # the last of them
    for _, each in owners:
        wait_gone(each, killed + LIMIT - time.monotonic())
    assert [survivors(each) for _, each in owners] == [[]] * len(owners)


@pytest.mark.parametrize(
    ("signals", "expected_within"),
    [
        ([signal.SIGKILL], LIMIT),
        ([signal.SIGTERM], LIMIT),
        ([signal.SIGINT], LIMIT),
        ([signal.SIGINT, signal.SIGINT], LIMIT),
        ([signal.SIGSTOP, signal.SIGKILL], LIMIT),
        ([signal.SIGHUP], LIMIT),
        ([signal.SIGQUIT], LIMIT),
    ],
    ids=lambda value: "+".join(number.name for number in value) if isinstance(value, list) else "",
)
def test_an_owner_that_dies_with_its_whole_tree_in_place(mark, signals, expected_within):
    owner = start_owner(mark, 1.0, *ALL_KINDS)
    wait_for_tree(mark, FULL_TREE)
    for number in signals:
        owner.send_signal(number)
        time.sleep(0.1)
    took = wait_gone(mark, expected_within)
    assert survivors(mark) == [], f"after {took:.1f} s"
    end(owner)


def test_a_stopped_owner_keeps_its_engine(mark):
    owner = start_owner(mark, 1.0, "--never-ready")
    wait_for_tree(mark, 3)
    owner.send_signal(signal.SIGSTOP)
    time.sleep(0.5)
    assert len(survivors(mark)) == 3
    owner.kill()
    end(owner)
    wait_gone(mark, LIMIT)
    assert survivors(mark) == []


@pytest.mark.parametrize("victims", ["outer", "inner", "both", "outer and owner", "engine"])
def test_parts_of_the_guard_are_killed(mark, victims):
    owner = start_owner(mark, 1.0, *ALL_KINDS)
    assert owner.stdout is not None
    outer, inner, engine = map(int, owner.stdout.readline().split())
    wait_for_tree(mark, FULL_TREE)
    pids = {
        "outer": [outer],
        "inner": [inner],
        "both": [outer, inner],
        "outer and owner": [outer, owner.pid],
        "engine": [engine],
    }[victims]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_gone(mark, LIMIT)
    assert survivors(mark) == []
    end(owner)


def test_a_term_of_the_guard_ends_the_tree(mark):
    owner = start_owner(mark, 5.0, "--never-ready", "--children", "2", "--daemon")
    assert owner.stdout is not None
    outer = int(owner.stdout.readline().split()[0])
    wait_for_tree(mark, 6)
    os.kill(outer, signal.SIGTERM)
    wait_gone(mark, LIMIT)
    assert survivors(mark) == []
    end(owner)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT])
def test_signals_that_are_none_of_the_guards_business(mark, number):
    owner = start_owner(mark, 1.0, "--never-ready")
    assert owner.stdout is not None
    outer, inner, _ = map(int, owner.stdout.readline().split())
    for pid in (outer, inner):
        os.kill(pid, number)
    time.sleep(0.2)
    assert len(survivors(mark)) == 3
    owner.kill()
    end(owner)
    wait_gone(mark, LIMIT)


def test_a_forked_copy_of_the_lifeline_does_not_keep_the_engine_alive(mark):
    # An owner that uses fork (multiprocessing does) hands its end of the pipe to its child.
    from tests.process import trees

    fork = "import os\nif os.fork() == 0:\n    import time; time.sleep(5); os._exit(0)\n"
    original = trees.OWNER
    trees.OWNER = original.replace("        print(", f"        exec({fork!r})\n        print(")
    try:
        owner = start_owner(mark, 1.0, "--never-ready")
    finally:
        trees.OWNER = original
    assert owner.stdout is not None
    owner.stdout.readline()
    wait_for_tree(mark, 3)
    forked = descendants(owner.pid)
    owner.kill()
    took = wait_gone(mark, LIMIT)
    assert survivors(mark) == []
    assert took < 2
    end(owner)
    for pid in forked:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def test_both_ways_to_find_descendants_agree():
    script = "sleep 5 & sh -c 'sleep 5 & wait' & wait"
    shell = subprocess.Popen(["sh", "-c", script], start_new_session=True)
    give_up = time.monotonic() + 5
    while len(descendants(shell.pid)) < 3 and time.monotonic() < give_up:
        time.sleep(0.01)
    found = sorted(descendants(shell.pid))
    assert found == sorted(_descendants_by_parent(shell.pid))
    assert len(found) == 3
    os.killpg(shell.pid, signal.SIGKILL)
    shell.wait()
