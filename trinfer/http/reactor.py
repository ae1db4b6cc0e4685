"""Reading from many sockets in one place: an epoll in which each connection is registered for as long as it lives.

Rule: what comes is read and parsed in the reactor's own turn, and the task that waits for an answer is woken when the
answer is complete. trio's `wait_readable` registers a socket anew for each wait, and a task is woken for each piece;
that costs as much as all the rest of a small request.

Where there is no epoll (macOS, or no file descriptor for it), or nobody runs the reactor, transports wait by trio's
primitives.
"""

from __future__ import annotations

import errno
import select
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

    #: Takes what has come, empty at its end; returns True when it needs no more. What it raises goes to the waiter.
    Feed = Callable[[bytes], bool]

__all__ = ["CHUNK", "Reactor", "Watched"]

CHUNK = 65536
SCARCE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC})
TRY_AGAIN = 1.0  # seconds between two tries to get an epoll
TURN = 16  # chunks that are read for one connection before it is the turn of the others


class Watched:
    """One socket, as the reactor sees it; for one waiting task at a time.

    Sockets are watched for edges, so that idle ones cost nothing: an edge is told once, and what it told is to be
    remembered (``_news``) until a read has come back with less than it asked for. The peer's end is an edge too, and
    may come together with the last bytes: after it, there is always something to read.
    """

    __slots__ = ("_ended", "_failure", "_feed", "_news", "_recv", "_task", "_turn_is_over", "is_lost")

    def __init__(self, recv: Callable[[int], bytes]) -> None:
        self._recv = recv
        self._feed: Feed | None = None
        self._failure: Exception | None = None
        self._task: trio.lowlevel.Task | None = None
        self._news = self._ended = self._turn_is_over = False
        self.is_lost = False  # the socket is closed, or the reactor has ended

    async def fill(self, feed: Feed) -> bool:
        """Read into ``feed`` until it needs no more; False if the socket was lost on the way.

        Raises: what ``feed`` or reading raises. Cancelled: nothing more is read.
        """
        while True:
            self._feed = feed
            if self._news and self._read():
                self._feed = None
                await trio.lowlevel.checkpoint()
            else:
                self._task = trio.lowlevel.current_task()
                await trio.lowlevel.wait_task_rescheduled(self._forget)
            if self._failure is not None:
                failure, self._failure = self._failure, None
                raise failure
            if not self._turn_is_over or self.is_lost:
                return not self.is_lost

    def _forget(self, _raise_cancel: object) -> trio.lowlevel.Abort:
        self._task = self._feed = None
        return trio.lowlevel.Abort.SUCCEEDED

    def lose(self) -> None:
        """Who waits wakes up, in vain."""
        self.is_lost = True
        self._wake()

    def _wake(self) -> None:
        task, self._task = self._task, None
        self._feed = None
        if task is not None:
            trio.lowlevel.reschedule(task)

    def tell(self, ended: bool) -> None:
        """There is an edge."""
        self._news = True
        if ended:
            self._ended = True
        if self._feed is not None and self._read():
            self._wake()

    def _read(self) -> bool:
        """Read what is there; True when the waiting task has what it waits for, be it an error, or is to come again."""
        feed = self._feed
        assert feed is not None
        self._turn_is_over = False
        try:
            for _ in range(TURN):
                data = self._recv(CHUNK)
                if len(data) < CHUNK and not self._ended:
                    self._news = False
                if feed(data):
                    return True
                if not self._news:
                    return False
        except BlockingIOError:
            self._news = False
            return False
        except Exception as error:
            self._failure = error
        else:
            self._turn_is_over = True
        return True


class Reactor:
    """The sockets of one pool."""

    def __init__(self) -> None:
        self._epoll: select.epoll | None = None
        self._watched: dict[int, Watched] = {}

    def watch(self, fd: int, recv: Callable[[int], bytes]) -> Watched | None:
        """Watch a connected, non-blocking socket until `forget`; None where nobody would look after it."""
        if self._epoll is None:
            return None
        try:
            self._epoll.register(fd, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)
        except OSError as error:
            if error.errno not in SCARCE:  # the kernel bounds how many a user may have registered
                raise
            return None
        watched = self._watched[fd] = Watched(recv)
        return watched

    def forget(self, fd: int) -> None:
        """The socket is about to be closed. Who waits for it wakes up."""
        watched = self._watched.pop(fd, None)
        if watched is None:
            return
        if self._epoll is not None:
            # Closing alone would not do it while a child that is being forked holds a copy of the descriptor.
            self._epoll.unregister(fd)
        watched.lose()

    @trio.lowlevel.enable_ki_protection  # Ctrl-C is for the user's own tasks
    async def run(self) -> None:
        """Look after the sockets, until cancelled. Who waits then wakes up, and waits in other ways."""
        if not hasattr(select, "epoll"):
            await trio.sleep_forever()
        with await self._open() as epoll:
            self._epoll = epoll
            try:
                await self._look(epoll)
            finally:
                self._epoll = None
                lost, self._watched = self._watched, {}
                for watched in lost.values():
                    watched.lose()

    @staticmethod
    async def _open() -> select.epoll:
        """An epoll, as soon as there is a file descriptor for it."""
        while True:
            try:
                return select.epoll()
            except OSError as error:
                if error.errno not in SCARCE:
                    raise
            await trio.sleep(TRY_AGAIN)

    async def _look(self, epoll: select.epoll) -> None:
        number, poll, ordinary = epoll.fileno(), epoll.poll, select.EPOLLIN
        while True:
            await trio.lowlevel.wait_readable(number)
            for fd, events in poll(0):
                watched = self._watched.get(fd)  # a feed may have closed another connection just now
                if watched is not None:
                    watched.tell(events != ordinary)
