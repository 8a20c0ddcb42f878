"""Who a supervisor lives for: it watches their processes, however they end."""

from __future__ import annotations

import os
import selectors


class Owners:
    """The owners' processes: file descriptors that become readable when they end (Linux), else asked once a second."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self._selector = selector
        self._fds: dict[int, int] = {}
        self._polled: set[int] = set()

    def add(self, pid: int) -> None:
        """Live at least as long as this process. One that has ended already counts as gone."""
        if pid in self._fds or pid in self._polled:
            return
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        except (AttributeError, OSError):
            self._polled.add(pid)
            return
        self._fds[pid] = fd
        self._selector.register(fd, selectors.EVENT_READ, self)

    @property
    def must_poll(self) -> bool:
        return bool(self._polled)

    def on_readable(self, fd: int) -> None:
        """The owner behind this file descriptor has ended."""
        self._selector.unregister(fd)
        os.close(fd)
        self._fds = {pid: other for pid, other in self._fds.items() if other != fd}

    def all_gone(self) -> bool:
        self._polled = {pid for pid in self._polled if is_alive(pid)}
        return not self._fds and not self._polled

    def close(self) -> None:
        for fd in list(self._fds.values()):
            self.on_readable(fd)


def is_alive(pid: int) -> bool:
    """Whether there is a process with this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
