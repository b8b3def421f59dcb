"""`python users.py | rabbitmqctl import_definitions`: a user for each role of the product, with the rights it needs.

`python users.py definitions.json` prints those definitions with the users in them: all that a new node needs at once.
Run it again with other passwords to change them; rights are brought back to what stands here. No password is printed.
From the environment: GATEWAY_PASSWORD, WORKER_PASSWORD and OPS_PASSWORD; RABBITMQ_VHOST (payouts) and
PAYOUTS_AMQP_QUEUE_PREFIX (none), both as the product's processes have them.
"""

import base64
import hashlib
import json
import os
import re
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_NOTHING: Final = "^$"
# RabbitMQ's sha256 is fast, so a password must be long; these characters need no escape in a URL. Source: RFC 3986.
_PASSWORD: Final = re.compile(r"[A-Za-z0-9._~-]{20,}")


@dataclass(frozen=True, slots=True)
class Role:
    """What a role's user may do: names as patterns without the queue prefix. Nobody may make or delete anything.

    `tags`: what RabbitMQ's management shows to it.
    """

    name: str
    write: str
    read: str
    tags: str = ""

    def permission(self, vhost: str, prefix: str) -> dict[str, str]:
        """The rights as RabbitMQ writes them."""
        return {
            "user": f"payouts-{self.name}",
            "vhost": vhost,
            "configure": _NOTHING,
            "write": _pattern(prefix, self.write),
            "read": _pattern(prefix, self.read),
        }


# Whoever takes messages writes to the exchange as well: to tell of further work, to put aside, to replay.
ROLES: Final = (
    Role("gateway", write=r"payouts", read=""),
    # To count what is parked takes some right on that queue, since RabbitMQ 4.3; this one lets nobody take or put anything.
    Role("worker", write=r"payouts(\.parked)?", read=r"payouts\.(settle|callbacks)\.[0-9]+"),
    Role("ops", write=r"payouts", read=r"payouts\.parked", tags="management"),
)


def definitions(environ: Mapping[str, str]) -> dict[str, Any]:
    """Users and permissions for `import_definitions`. Raises: `ValueError` naming the variable that will not do."""
    vhost = environ.get("RABBITMQ_VHOST", "payouts")
    prefix = environ.get("PAYOUTS_AMQP_QUEUE_PREFIX", "")
    return {
        "users": [_user(role, environ) for role in ROLES],
        "permissions": [role.permission(vhost, prefix) for role in ROLES],
    }


def _pattern(prefix: str, name: str) -> str:
    return f"^{re.escape(prefix)}{name}$" if name else _NOTHING


def _user(role: Role, environ: Mapping[str, str]) -> dict[str, Any]:
    variable = f"{role.name.upper()}_PASSWORD"
    password = environ.get(variable, "")
    if not _PASSWORD.fullmatch(password):
        raise ValueError(f"{variable}: must be 20 or more characters of A-Z a-z 0-9 . _ ~ -")
    return {
        "name": f"payouts-{role.name}",
        "password_hash": _hash(password),
        "hashing_algorithm": "rabbit_password_hashing_sha256",
        "tags": role.tags,
    }


def _hash(password: str) -> str:
    """Source: RabbitMQ, "Credentials and Passwords": base64 of a salt of 4 bytes, and sha256 of salt and password."""
    salt = secrets.token_bytes(4)
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


if __name__ == "__main__":
    try:
        others = json.loads(Path(sys.argv[1]).read_text()) if len(sys.argv) > 1 else {}
        json.dump(others | definitions(os.environ), sys.stdout, indent=2)
    except ValueError as error:
        sys.exit(f"error: {error}")
