"""What the stack on this machine remembers between runs: the folder `.local/` of the checkout."""

import base64
import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from common.domain.signing import sign_v1
from common.sealing import KEY_BYTES

CHECKOUT: Final = Path(__file__).resolve().parent.parent
FOLDER: Final = CHECKOUT / ".local"

# What differs from production because merchant and product share a machine; the environment has the last word.
LOCAL_DEFAULTS: Final = {
    "PAYOUTS_CALLBACK_PRIVATE_ADDRESSES": "1",
    "PAYOUTS_CALLBACK_PORTS": "",
    "PAYOUTS_DRAIN_SECONDS": "5",
}


class InUse(Exception):
    """Another process works with this folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """What a program needs in order to be the demo merchant; `.local/demo.json` holds exactly this."""

    base_url: str
    api_key: str
    api_secret: str = field(repr=False)
    webhook_secret: str = field(repr=False)
    shop_code: str
    currency: str
    receiver_url: str
    bank_url: str = ""
    database_url: str = field(repr=False)
    amqp_url: str | None = field(repr=False)

    def sign(self, method: str, path: str, body: bytes) -> dict[str, str]:
        """The headers of a request of the merchant's, made now."""
        timestamp = str(int(time.time()))
        return {
            "Content-Type": "application/json",
            "X-API-Key": self.api_key,
            "X-Timestamp": timestamp,
            "X-Signature": sign_v1(self.api_secret, timestamp, method, path, "", body),
        }


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Make the folder if need be, and keep everybody else out of it while the context lasts, or this process lives.

    Raises: `InUse`, which names the other process.
    """
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise InUse(f"the stack of this checkout already runs, as process {lock.read()}") from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def find_or_make_keys(folder: Path) -> dict[str, str]:
    """The keys that seal this stack's data, as settings; made once. New keys open nothing old, so the demo is forgotten."""
    path = folder / "keys.json"
    if not path.exists():
        (folder / "demo.json").unlink(missing_ok=True)
        keys = {"PAYOUTS_MASTER_KEYS": f"1:{_random_key()}", "PAYOUTS_CONTENT_KEY": _random_key()}
        save_private(path, json.dumps(keys, indent=2))
    kept: dict[str, str] = json.loads(path.read_text())
    return kept


def find_demo(folder: Path) -> Demo | None:
    """The demo merchant of the last run, if there was one."""
    try:
        return Demo(**json.loads((folder / "demo.json").read_text()))
    except FileNotFoundError:
        return None


def save_demo(folder: Path, demo: Demo) -> None:
    """Remember the demo merchant."""
    save_private(folder / "demo.json", json.dumps(asdict(demo), indent=2) + "\n")


def save_private(path: Path, text: str) -> None:
    """Write a file that only we may read, whole or not at all."""
    unfinished = path.with_name(f"{path.name}.new")
    unfinished.unlink(missing_ok=True)
    with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def _random_key() -> str:
    return base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()
