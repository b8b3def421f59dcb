"""`python make_env.py > .env`: passwords and keys for `compose.yaml`, each random, each made once.

Keep the file as long as the data, and never make another for them: new keys open nothing old. `PAYOUTS_MASTER_KEYS` and
`PAYOUTS_CONTENT_KEY` belong into a safe of their own, away from the database's backups.
"""

import base64
import secrets
from typing import Final

_KEY_BYTES: Final = 32
_PASSWORD_BYTES: Final = 24

PASSWORDS: Final = (
    "POSTGRES_PASSWORD",
    "MIGRATE_DATABASE_PASSWORD",
    "GATEWAY_DATABASE_PASSWORD",
    "WORKER_DATABASE_PASSWORD",
    "OPS_DATABASE_PASSWORD",
    "CUSTODIAN_DATABASE_PASSWORD",
    "BACKUP_DATABASE_PASSWORD",
    "GATEWAY_AMQP_PASSWORD",
    "WORKER_AMQP_PASSWORD",
    "OPS_AMQP_PASSWORD",
    "GRAFANA_PASSWORD",
)


def make_env() -> dict[str, str]:
    """The variables, by name. Passwords are hexadecimal: nothing to escape in a URL or a file."""
    return {
        **{name: secrets.token_hex(_PASSWORD_BYTES) for name in PASSWORDS},
        "PAYOUTS_MASTER_KEYS": f"1:{_random_key()}",
        "PAYOUTS_CONTENT_KEY": _random_key(),
    }


def _random_key() -> str:
    return base64.b64encode(secrets.token_bytes(_KEY_BYTES)).decode()


if __name__ == "__main__":
    print("\n".join(f"{name}={value}" for name, value in make_env().items()))
