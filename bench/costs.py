"""What work costs: processor time by process, and bytes on disk by what they are for."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

_PER: Final = 1000


@dataclass(frozen=True, slots=True)
class Costs:
    """Of a thousand payouts: milliseconds of processor time and bytes on disk, each by name."""

    cpu_ms: dict[str, float]
    disk_bytes: dict[str, int]

    @property
    def cpu_us(self) -> dict[str, float]:
        """Microseconds of processor time for each one: the same numbers."""
        return self.cpu_ms


@dataclass(frozen=True, slots=True)
class Usage:
    """What was taken so far, by name: seconds of processor time, bytes on disk."""

    cpu_seconds: dict[str, float]
    disk_bytes: dict[str, int]

    def since(self, before: "Usage", count: int) -> Costs:
        """What a thousand of `count` have cost since then, of everything that was there then already."""
        cpu = {name: self.cpu_seconds[name] - taken for name, taken in before.cpu_seconds.items()}
        disk = {name: self.disk_bytes[name] - taken for name, taken in before.disk_bytes.items()}
        return Costs(
            {name: round(seconds * 1000 / count * _PER, 1) for name, seconds in cpu.items()},
            {name: round(size / count * _PER) for name, size in disk.items()},
        )


def processor_seconds(process_id: int) -> float:
    """User and system time of a process and of all that it has started, those that have ended meanwhile included."""
    root = psutil.Process(process_id)
    seconds = 0.0
    for process in [root, *root.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            seconds += times.user + times.system + times.children_user + times.children_system
    return seconds


def written_bytes(process_id: int) -> int:
    """What a process, and all that it has started, have had written to disk."""
    root = psutil.Process(process_id)
    written = 0
    for process in [root, *root.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            written += process.io_counters().write_bytes
    return written


def size_of(file: Path) -> int:
    """The size of a file; of one that is not there, 0."""
    return file.stat().st_size if file.exists() else 0
