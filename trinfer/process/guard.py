"""The guard: a small program that owns the tree of one engine and never leaves anything of it behind.

It is run as ``python -I -S guard.py --owner PID --lifeline FD --status FD --grace SECONDS -- COMMAND...`` and imports
nothing but the standard library, so that it starts in milliseconds and depends on nothing that could break.

Why two processes. *Outer* is the direct child of the owner. *Inner* is forked from it, in a session of its own, and
is the parent of the engine. Some owners (Ray's workers, for one) are killed together with their direct children, so a
guard of one process would die before it could clean up; and a user's ``kill -9`` may hit either one.

- Inner is a child subreaper (prctl(2)): whatever daemonises inside the tree becomes its child. So when waitpid(2) says
  that there are no children left, there is no descendant left; that, and nothing else, is the end of a tree.
- Inner watches a lifeline (a pipe from the owner): ``T`` asks for a stop, ``K`` for a stop without grace, and its end
  says that the owner is gone, in whatever way. Copies of the pipe may live on in forked children of the owner, so it
  watches a pidfd of the owner too. It also watches a pipe from outer, whose end says that outer was killed.
- Outer is a subreaper as well: when inner is killed, the tree becomes its own, and it kills what is left.
- PR_SET_PDEATHSIG is not used: it fires when the *thread* that forked ends, and trio forks in threads that idle out.

A stop is SIGTERM (and SIGCONT, for stopped processes) to every descendant, then SIGKILL once the grace period is over,
until nothing is left. What survives SIGKILL (state D, another user's) is reported by pid after some seconds.

On the status pipe stand lines: ``spawned INNER ENGINE``, ``error ERRNO``, ``exited CODE`` (negative: a signal),
``survivor PID STATE NAME``, ``ended``. Its end, once both processes of the guard are gone, is the end of the tree.

Linux only. Where there is no prctl (macOS), the guard can end the engine's own process group, and no more.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time

OWNER_GONE_GRACE = 2.0  # seconds: when nobody is left to read its answers, an engine need not finish them
KILL_WAIT = 5.0  # seconds after SIGKILL until what is left counts as unkillable
TERM_SCAN = 0.05  # seconds between looks for processes that came into being after the SIGTERM
KILL_SCAN = 0.002  # seconds between rounds of SIGKILL when nothing new has appeared
TRACKER_WAIT = 1.5  # seconds that Python's resource trackers have to do what they are for: 0.1, if not for load
TRACKER = b"multiprocessing.resource_tracker"
EXEC_FAILED = 127

# Signals that would end the guard by default, and are none of its business. SIGUSR1 and SIGUSR2 are what batch systems
# send to warn a whole job.
_IGNORED = (
    "SIGINT",
    "SIGHUP",
    "SIGQUIT",
    "SIGPIPE",
    "SIGALRM",
    "SIGUSR1",
    "SIGUSR2",
    "SIGTTIN",
    "SIGTTOU",
    "SIGTSTP",
)


def descendants(root: int) -> list[int]:
    """Pids of all living descendants of ``root``, zombies included, as far as /proc shows them at this moment."""
    found: list[int] = []
    try:
        queue = _children(root)
    except OSError:
        return _descendants_by_parent(root)
    while queue:
        pid = queue.pop()
        found.append(pid)
        try:
            queue.extend(_children(pid))
        except OSError:  # it has gone meanwhile
            continue
    return found


def _children(pid: int) -> list[int]:
    # A child belongs to the thread that forked it, so each thread has its list. Reading these lists takes
    # microseconds, where a walk through /proc takes milliseconds: fork chains lose the race.
    children: list[int] = []
    for thread in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
            children.extend(map(int, file.read().split()))
    return children


def _descendants_by_parent(root: int) -> list[int]:
    """The same, for kernels without the ``children`` files."""
    try:
        names = [name for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []
    by_parent: dict[int, list[int]] = {}
    for name in names:
        try:
            by_parent.setdefault(int(_stat(int(name))[1]), []).append(int(name))
        except (OSError, IndexError):
            continue
    found: list[int] = []
    queue = list(by_parent.get(root, ()))
    while queue:
        pid = queue.pop()
        found.append(pid)
        queue.extend(by_parent.get(pid, ()))
    return found


def _stat(pid: int) -> list[bytes]:
    """The fields of /proc/PID/stat from the third on: state, parent, …"""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()


def become_subreaper() -> bool:
    """Make orphaned descendants of this process its own children; False where the system has no such thing."""
    if not sys.platform.startswith("linux"):
        return False
    import ctypes

    pr_set_child_subreaper = 36  # linux/prctl.h
    return bool(ctypes.CDLL(None, use_errno=True).prctl(pr_set_child_subreaper, 1, 0, 0, 0) == 0)


class Status:
    """The pipe to the owner. Nobody may be listening any more: that is no reason to stop cleaning up."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def say(self, line: str) -> None:
        try:
            os.write(self._fd, line.encode("utf-8", "replace") + b"\n")
        except OSError:
            pass


class Tree:
    """All descendants of this process, and how to end them."""

    def __init__(self, engine: int) -> None:
        self._engine = engine
        self._termed: set[int] = set()
        self.engine_code: int | None = None  # exit code of the engine's main process, negative for a signal

    def reap(self) -> bool:
        """Collect the dead; True once no descendant is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return True
            if pid == 0:
                return False
            if pid == self._engine:
                self.engine_code = os.waitstatus_to_exitcode(status)

    def terminate(self) -> None:
        """SIGTERM to every descendant that has not had it yet."""
        for pid in descendants(os.getpid()):
            if pid not in self._termed:
                self._termed.add(pid)
                _signal(pid, signal.SIGTERM)
                _signal(pid, signal.SIGCONT)
        self._signal_group(signal.SIGTERM)

    def kill(self, spared: frozenset[int] = frozenset()) -> list[int]:
        """SIGKILL to every descendant that is not ``spared``; returns all that were there."""
        pids = descendants(os.getpid())
        for pid in pids:
            if pid not in spared:
                _signal(pid, signal.SIGKILL)
        self._signal_group(signal.SIGKILL)
        return pids

    def kill_until_gone(self) -> list[int]:
        """SIGKILL until nothing is left; returns the pids of what would not go within `KILL_WAIT`.

        The shared memory and semaphores of Python programs outlive them in /dev/shm. Where these programs are killed,
        their resource tracker removes them, as soon as it is the last: so it gets a moment more.
        """
        trackers = frozenset(pid for pid in descendants(os.getpid()) if _is_tracker(pid))
        began = time.monotonic()
        before: list[int] = []
        while not self.reap():
            now = time.monotonic()
            pids = self.kill(trackers if now < began + TRACKER_WAIT else frozenset())
            if now > began + KILL_WAIT:
                return pids
            if pids == before:
                time.sleep(KILL_SCAN)
            before = pids
        return []

    def _signal_group(self, number: int) -> None:
        # Without /proc the engine's own group is all that can be reached.
        if self._engine and not sys.platform.startswith("linux"):
            try:
                os.killpg(self._engine, number)
            except OSError:
                pass


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except OSError:  # gone, or not ours to signal: then it is reported as a survivor
        pass


def _is_tracker(pid: int) -> bool:
    try:
        # To read a command line takes the lock of the process's memory. One that hangs in the kernel (state D) may
        # hold it, in any of its threads, and the reader would hang too. A tracker has one thread, and waits for a pipe.
        fields = _stat(pid)
        if fields[0] == b"D" or fields[17] != b"1":
            return False
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return TRACKER in file.read()
    except (OSError, IndexError):
        return False


def report_survivors(status: Status, pids: list[int]) -> None:
    for pid in pids:
        try:
            state = _stat(pid)[0].decode()
            with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
                name = file.read().strip()
        except (OSError, IndexError):
            continue
        if state != "Z":
            status.say(f"survivor {pid} {state} {name}")


class Inner:
    """Parent of the engine, and the one who watches."""

    def __init__(
        self, command: list[str], grace: float, lifeline: int, tether: int, owner: int | None, status: Status
    ) -> None:
        self._command = command
        self._grace = grace
        self._lifeline, self._tether, self._owner = lifeline, tether, owner
        self._status = status
        self._deadline: float | None = None  # when SIGKILL is due; None while nobody has asked for a stop
        self._signals, signals_in = os.pipe()
        os.set_blocking(self._signals, False)
        os.set_blocking(signals_in, False)
        signal.set_wakeup_fd(signals_in, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _wake)
        signal.signal(signal.SIGTERM, _wake)

    def run(self) -> int:
        """The whole life of one engine; returns the exit code that outer shall show."""
        engine, error = start_engine(self._command)
        if error:
            self._status.say(f"error {error}")
            return EXEC_FAILED
        self._status.say(f"spawned {os.getpid()} {engine}")
        tree = Tree(engine)
        told = False
        poll = select.poll()
        for fd in (self._lifeline, self._tether, self._owner, self._signals):
            if fd is not None:
                poll.register(fd, select.POLLIN)
        while True:
            empty = tree.reap()
            if tree.engine_code is not None and not told:
                told = True
                self._status.say(f"exited {tree.engine_code}")
                self._stop_within(self._grace)
            if empty:
                break
            timeout = None
            if self._deadline is not None:
                left = self._deadline - time.monotonic()
                if left <= 0:
                    survivors = tree.kill_until_gone()
                    if tree.engine_code is not None and not told:
                        self._status.say(f"exited {tree.engine_code}")
                    report_survivors(self._status, survivors)
                    break
                tree.terminate()
                timeout = min(left, TERM_SCAN) * 1000
            for fd, _event in poll.poll(timeout):
                self._hear(fd, poll)
        self._status.say("ended")
        return tree.engine_code if tree.engine_code is not None else -signal.SIGKILL

    def _stop_within(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)

    def _hear(self, fd: int, poll: select.poll) -> None:
        if fd == self._signals:
            if signal.SIGTERM in os.read(fd, 4096):
                self._stop_within(self._grace)
            return
        word = os.read(fd, 4096) if fd == self._lifeline else b""
        if not word:  # the owner, or outer, is gone
            poll.unregister(fd)
            self._stop_within(min(self._grace, OWNER_GONE_GRACE))
        elif b"K" in word:
            self._stop_within(0)
        else:
            self._stop_within(self._grace)


def _wake(_number: int, _frame: object) -> None:
    """Only there so that the signal is written to the wakeup pipe."""


def start_engine(command: list[str]) -> tuple[int, int]:
    """Fork and execute the engine in a session of its own; returns its pid and 0, or 0 and the errno."""
    result, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            # Python ignores some signals, the guard more of them, and exec(2) keeps that: the engine gets the defaults.
            signal.set_wakeup_fd(-1)
            for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
                try:
                    signal.signal(number, signal.SIG_DFL)
                except (OSError, ValueError):
                    pass
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            os.execvp(command[0], command)
        except OSError as error:
            os.write(told, str(error.errno or 1).encode())
        finally:
            os._exit(EXEC_FAILED)
    os.close(told)
    failed = os.read(result, 16)
    os.close(result)
    if failed:
        os.waitpid(pid, 0)
        return 0, int(failed)
    return pid, 0


def mirror(code: int) -> None:
    """End as the engine did, so that the owner sees its exit code or signal."""
    if code < 0:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # one core dump, the engine's, is enough
        try:
            signal.signal(-code, signal.SIG_DFL)
        except (OSError, ValueError):
            pass
        os.kill(os.getpid(), -code)
        os._exit(128 - code)
    os._exit(code)


def open_owner(pid: int) -> int | None:
    """A pidfd of the owner; None where there is no such thing. Raises ProcessLookupError when it is gone already."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except (OSError, AttributeError):
        fd = None
    if os.getppid() != pid:  # checked last: if it still is our parent now, the pidfd is of the right process
        raise ProcessLookupError(pid)
    return fd


def main(argv: list[str]) -> None:
    options = dict(zip(argv[0:8:2], argv[1:8:2], strict=True))
    command = argv[9:]
    lifeline, status_fd = int(options["--lifeline"]), int(options["--status"])
    for fd in (lifeline, status_fd):
        os.set_inheritable(fd, False)
    for name in _IGNORED:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    status = Status(status_fd)
    try:
        owner = open_owner(int(options["--owner"]))
    except ProcessLookupError:
        os._exit(EXEC_FAILED)
    become_subreaper()
    tether, tether_in = os.pipe()
    result, result_in = os.pipe()
    inner_pid = os.fork()
    if inner_pid == 0:
        os.close(tether_in)
        os.close(result)
        os.setsid()
        become_subreaper()
        code = EXEC_FAILED
        try:
            code = Inner(command, float(options["--grace"]), lifeline, tether, owner, status).run()
            os.write(result_in, str(code).encode())
        finally:
            os._exit(0)
    os.close(tether)
    os.close(result_in)
    os.close(lifeline)  # inner alone hears the owner
    signal.signal(signal.SIGTERM, lambda *_: _signal(inner_pid, signal.SIGTERM))
    os.waitpid(inner_pid, 0)
    code_text = os.read(result, 16)
    if not code_text:
        # Inner was killed. The tree has become ours, and there is no time for grace.
        report_survivors(status, Tree(0).kill_until_gone())
        status.say("ended")
    mirror(int(code_text) if code_text else -signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
