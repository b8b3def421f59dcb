"""A disk of a test's own, small enough to be filled."""

import errno
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

_MEGABYTES: Final = 256
_BLOCK: Final = bytes(1024 * 1024)


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Have a folder on a disk of its own for the length of the context. Skips the test where nobody lets us mount one."""
    folder.mkdir(exist_ok=True)
    options = f"size={_MEGABYTES}m,mode=0711"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        folder.rmdir()
        pytest.skip(f"no disk of our own: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def ballast(folder: Path) -> Iterator[None]:
    """Leave no room on the disk of a folder for the length of the context."""
    path = folder / "ballast"
    with path.open("wb", buffering=0) as file:
        for block in (_BLOCK, bytes(4096)):
            try:
                while True:
                    file.write(block)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
    try:
        yield
    finally:
        path.unlink()
