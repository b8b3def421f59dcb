"""Somebody at a terminal, who types `payouts …`, and what they are shown."""

import asyncio
import json
import os
import sys
from dataclasses import dataclass
from typing import Any

from click.testing import CliRunner

from ops.cli import run


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document on stdout."""
        assert (self.code, self.err) == (0, "")
        return json.loads(self.out)

    def assert_shown(self, *words: str) -> None:
        """It went well, and a person can read these words."""
        assert (self.code, self.err) == (0, "")
        assert [word for word in words if word not in self.out] == []

    def assert_refused(self, *words: str, code: int = 2) -> None:
        """It ended with that code, nothing on stdout, and one line on stderr that has these words."""
        assert (self.code, self.out, self.err.count("\n")) == (code, "", 1), self
        assert [word for word in words if word not in self.err] == []


class Terminal:
    """Somebody at a terminal, in an environment."""

    def __init__(self, environ: dict[str, str]) -> None:
        inherited = {name: None for name in os.environ if name.startswith("PAYOUTS_")}
        self._environ = {
            **inherited,
            "DATABASE_URL": None,
            "AMQP_URL": None,
            "SUDO_USER": None,
            "API_SECRET": None,
            **environ,
        }

    async def run(self, *arguments: object, typed: str = "") -> Ended:
        """Run one command to its end; `typed` is what it can read."""
        return await asyncio.to_thread(self._run, [str(argument) for argument in arguments], typed)

    def _run(self, arguments: list[str], typed: str) -> Ended:
        with CliRunner().isolation(input=typed, env=self._environ) as (out, err, _):
            code = run(arguments)
            sys.stdout.flush()
            sys.stderr.flush()
            return Ended(code, out.getvalue().decode(), err.getvalue().decode())
