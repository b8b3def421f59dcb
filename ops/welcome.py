"""What the person at the terminal reads when everything runs."""

import json
import shlex
from typing import Final

from ops.state import Demo

_PATH: Final = "/api/v1/payouts"

# One command that stays good: it takes the time when it runs. The lines it signs are those of `canonical_v1`.
_CURL: Final = r"""
T=$(date +%s) B={body}; curl -sSi {url} \
  -H 'Content-Type: application/json' -H 'X-API-Key: {api_key}' -H "X-Timestamp: $T" \
  -H "X-Signature: v1=$(printf 'v1\n%s\nPOST\n{path}\n\n%s' "$T" \
    "$(printf %s "$B" | openssl dgst -sha256 -r | cut -c1-64)" | openssl dgst -sha256 -hmac '{secret}' -r | cut -c1-64)" \
  -d "$B"
"""

_TEXT: Final = """
A payout to paste into another terminal; it answers 201, and 200 when repeated:
{curl}
What to do next:
  make demo                 1,000 payouts, end to end, and a table of how they fared
  "shop_code":"bank-shop"   in a payout, and a simulated bank pays it over HTTP instead of the sandbox
  cat .local/demo.json      the demo merchant's key and secrets, for your own programs
  tail -f .local/logs/*     what every process says
  make reset                forget everything
"""


def render_curl(demo: Demo, external_id: str) -> str:
    """A shell command that signs and sends one payout of the demo merchant, now and at every repeat."""
    payout = {
        "external_id": external_id,
        "amount": "10.00",
        "currency": demo.currency,
        "card_number": "01700005678",
        "callback_url": f"{demo.receiver_url}/callbacks",
    }
    return _CURL.format(
        body=shlex.quote(json.dumps(payout, separators=(",", ":"))),
        url=demo.base_url + _PATH,
        path=_PATH,
        api_key=demo.api_key,
        secret=demo.api_secret,
    )


def render_welcome(demo: Demo, external_id: str) -> str:
    """The whole text; `external_id` names the payout of the example."""
    return _TEXT.format(curl=render_curl(demo, external_id))
