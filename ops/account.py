"""Whom servers run as: ourselves, or, since none of them shall be root, an account that the machine has already."""

import os
import pwd
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_ACCOUNTS: Final = ("postgres", "_postgres", "nobody")


@dataclass(frozen=True, slots=True)
class Account:
    """An account of this machine."""

    user_id: int
    group_id: int

    def popen_arguments(self) -> dict[str, Any]:
        """What `subprocess` needs in order to become this account; nothing when we are it already."""
        if os.geteuid() == self.user_id:
            return {}
        return {"user": self.user_id, "group": self.group_id, "extra_groups": []}

    def give(self, path: Path) -> None:
        """Make it the owner of a file or folder that we made."""
        os.chown(path, self.user_id, self.group_id)

    def reaches(self, folder: Path) -> bool:
        """Whether it may pass through every folder on the way into this one."""
        return self.can_run(["/bin/sh", "-c", 'cd "$1"', "sh", str(folder)])

    def can_run(self, command: list[str]) -> bool:
        """Whether the command succeeds when this account runs it."""
        try:
            done = subprocess.run(command, capture_output=True, cwd="/", check=False, **self.popen_arguments())
        except PermissionError:
            return False
        return done.returncode == 0


def find_account(*preferred: str) -> Account | None:
    """Ourselves, or as root the first account there is, the preferred ones before others; None when there is none."""
    if os.geteuid() != 0:
        return Account(os.geteuid(), os.getegid())
    for name in (*preferred, *_ACCOUNTS):
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            return Account(entry.pw_uid, entry.pw_gid)
    return None
