"""The secrets that callbacks are signed with: how one is made, sealed and opened."""

import base64
import os
from collections.abc import Iterable
from typing import Final
from uuid import UUID

from common.db.webhook_secrets import SealedWebhookSecret
from common.domain.signing import WEBHOOK_SECRET_PREFIX
from common.sealing import WEBHOOK_SECRET_PURPOSE, Keyring

_SECRET_BYTES: Final = 32  # Standard Webhooks asks for 24 to 64.


def make_webhook_secret() -> str:
    """A new secret, as merchants get it."""
    return WEBHOOK_SECRET_PREFIX + base64.b64encode(os.urandom(_SECRET_BYTES)).decode()


def seal_webhook_secret(keyring: Keyring, secret: str, *, shop_id: UUID, secret_id: UUID, now: float) -> bytes:
    """Encrypt for that row of that shop. `now` is Unix seconds."""
    return keyring.seal(secret.encode(), owner=shop_id, row=secret_id, purpose=WEBHOOK_SECRET_PURPOSE, now=now)


def open_webhook_secrets(keyring: Keyring, secrets: Iterable[SealedWebhookSecret]) -> list[str]:
    """The secrets, in their order. Raises: `SealBroken` when one does not open."""
    return [
        keyring.open(each.sealed, owner=each.shop_id, row=each.id, purpose=WEBHOOK_SECRET_PURPOSE).decode()
        for each in secrets
    ]
