"""Prometheus of our own, for the runbook's drills: a private one that asks the admin ports of a stack on this machine."""

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.request import urlopen

import yaml

from ops import apt
from ops.ports import choose_port, loopback_url
from ops.processes import Say
from ops.servers import ServerFailed

NAME: Final = "Prometheus"
_PACKAGE: Final = "prometheus"
_START_SECONDS: Final = 30.0
_STOP_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.05
_ANSWER_SECONDS: Final = 10.0


def find_or_fetch(environ: Mapping[str, str], say: Say) -> Path:
    """The program: of PATH, else of a package that is unpacked into a folder of this account's. Blocks.

    Raises: `ServerFailed`, which says how to have one.
    """
    on_path = shutil.which(_PACKAGE)
    if on_path is not None:
        return Path(on_path)
    home = Path(tempfile.gettempdir(), f"payouts-prometheus-{os.geteuid()}")
    program = home / "package" / "usr" / "bin" / _PACKAGE
    home.mkdir(mode=0o700, exist_ok=True)
    if home.lstat().st_uid != os.geteuid():
        raise ServerFailed(f"{home} is somebody else's; remove it, or have it removed")
    if not program.exists():
        if not apt.may_fetch(environ):
            raise ServerFailed("none on PATH; to have it: install the package prometheus of your system")
        say(NAME, f"not here: its package is fetched into {home}, not installed ({apt.NO_INSTALL}=1 forbids it)")
        apt.fetch(_PACKAGE, home / "package")
    return program


class Prometheus:
    """One Prometheus with all it has in `folder`, which exists. It asks these targets, by role, every `interval_seconds`; they
    have the labels that deploy/prometheus gives them.
    """

    def __init__(
        self,
        program: Path,
        folder: Path,
        *,
        rules: Mapping[str, Any],
        targets: Mapping[str, list[str]],
        interval_seconds: float,
    ) -> None:
        self.url = loopback_url(choose_port())
        self._program = program
        self._folder = folder
        interval = f"{interval_seconds * 1000:.0f}ms"
        self._configuration = {
            "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval},
            "rule_files": [str(folder / "rules.yaml")],
            "scrape_configs": [
                {
                    "job_name": "payouts",
                    "static_configs": [{"targets": found, "labels": {"role": role}} for role, found in targets.items()],
                }
            ],
        }
        self._rules = rules
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and wait until it answers. Blocks. Raises: `ServerFailed` with what it said."""
        for name, document in (("prometheus.yaml", self._configuration), ("rules.yaml", self._rules)):
            (self._folder / name).write_text(yaml.safe_dump(document, sort_keys=False))
        log = self._folder / "prometheus.log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [
                    str(self._program),
                    f"--config.file={self._folder / 'prometheus.yaml'}",
                    f"--storage.tsdb.path={self._folder / 'series'}",
                    f"--web.listen-address={self.url.removeprefix('http://')}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_SECONDS
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise ServerFailed(f"{NAME} does not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(_POLL_SECONDS)

    def stop(self) -> None:
        """End it."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def state(self, alarm: str) -> str:
        """How an alarm stands: `inactive`, `pending` or `firing`. Blocks. Raises: `LookupError`."""
        groups = self._get("/api/v1/rules")["data"]["groups"]
        for rule in (rule for group in groups for rule in group["rules"]):
            if rule["name"] == alarm:
                return str(rule["state"])
        raise LookupError(alarm)

    def _is_ready(self) -> bool:
        try:
            with urlopen(f"{self.url}/-/ready", timeout=_ANSWER_SECONDS) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _get(self, path: str) -> dict[str, Any]:
        with urlopen(self.url + path, timeout=_ANSWER_SECONDS) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
