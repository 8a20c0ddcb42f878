"""The folder in which the workers of one server keep their numbers: a scrape of any of them tells those of all.

Each worker writes files of its own (prometheus-client's multiprocess mode: a mapped file for counters, one for
histograms …); whoever is scraped adds them all up. What a worker that has ended left behind is added once to the files
``*_ended.db`` and removed, so that nothing is lost and the folder does not grow with every worker that is replaced.
A file lock keeps scrapes and new workers apart.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# Room for a few thousand series. Taken at once: a mapped file that grows on a full disk kills its process.
_FILE_BYTES = 1 << 19
# Adding up takes milliseconds: whoever holds the lock for longer is stopped, and nobody shall wait for it for ever.
_LOCK_S = 5.0
_COUNTED = ("counter", "histogram")
_KINDS = (*_COUNTED, "gauge_livesum", "gauge_livemin")


class MetricsFiles:
    """One process's view of the folder. Raises (also ``collect``): OSError when it cannot be used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700, exist_ok=True)
        with self._locked():
            for kind in _KINDS:
                path = folder / f"{kind}_{os.getpid()}.db"
                if kind not in _COUNTED:
                    path.unlink(missing_ok=True)  # of a former process with this number
                _reserve(path)

    def collect(self) -> Iterable[Any]:
        """The metrics of all workers, those that have ended included."""
        from prometheus_client.multiprocess import MultiProcessCollector

        with self._locked():
            self._fold_ended()
            return list(MultiProcessCollector(None, str(self.folder)).collect())

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        fd = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            until = time.monotonic() + _LOCK_S
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= until:
                        raise TimeoutError(f"another process has held the lock for {_LOCK_S:g} s") from None
                    time.sleep(0.002)
            yield
        finally:
            os.close(fd)

    def _fold_ended(self) -> None:
        from prometheus_client.mmap_dict import MmapedDict

        for path in self.folder.glob("gauge_live*.db"):
            if _has_ended(path):
                path.unlink()
        for kind in _COUNTED:
            ended = [path for path in self.folder.glob(f"{kind}_*.db") if _has_ended(path)]
            if not ended:
                continue
            total, new = self.folder / f"{kind}_ended.db", self.folder / f"{kind}_ended.new"
            if total.exists():
                shutil.copyfile(total, new)
            else:
                new.unlink(missing_ok=True)
                _reserve(new)
            values = MmapedDict(str(new))
            for path in ended:
                for key, value, _, _ in MmapedDict.read_all_values_from_file(str(path)):
                    values.write_value(key, values.read_value(key)[0] + value, 0.0)
            values.close()
            new.replace(total)
            for path in ended:
                path.unlink()


def _reserve(path: Path) -> None:
    """Make the file, or find it, with its room on the disk."""
    with path.open("ab") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, _FILE_BYTES)
        else:
            file.truncate(max(_FILE_BYTES, path.stat().st_size))


def _has_ended(path: Path) -> bool:
    """Whether the process that wrote this file is no more."""
    pid = path.stem.rpartition("_")[2]
    if not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
