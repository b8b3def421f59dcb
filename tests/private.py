"""Requests of every kind to a gateway, and what they carry that nobody may find again in what the product writes."""

from typing import Any

from tests.factories import KEY, Merchant, create_body
from tests.wire import BALANCE, PAYOUTS, plain_request, signed_request

CARD = "4111111111111111"
WALLET = "01798761234"
# What the requests below carry, and nobody may find again.
FIELDS: dict[str, Any] = {
    "description": "wages-of-fear",
    "metadata": {"note": "metadata-of-mine"},
    "merchant_user_id": "user-of-mine",
    "merchant_user_ip": "203.0.113.77",
    "callback_url": "https://merchant.example.com/?token=token-in-a-url",
    "unknown": "field-nobody-knows",
}
PIN = {"pin": "pin-998877"}
PRIVATE = {
    *(CARD, "4111 1111 1111 1111", "411111", WALLET, "pin-998877", "broken-body-of-mine", KEY),
    *("wages-of-fear", "metadata-of-mine", "user-of-mine", "203.0.113.77", "token-in-a-url", "field-nobody-knows"),
}


def readable(merchant: Merchant) -> list[bytes]:
    """Requests of every kind that HTTP allows, successes and failures."""
    ok = create_body(external_id="PAY-1", card_number=CARD, paymentData=PIN, **FIELDS)
    wallet = create_body(external_id="PAY-2", card_number=WALLET, **FIELDS)
    spaced = create_body(external_id="PAY-1", card_number="4111 1111 1111 1111", paymentData=PIN)
    broken = b'{"card_number": "%s", "x": "broken-body-of-mine", ' % CARD.encode()
    wrong = {"X-Signature": "v1=" + "5ec7e7" * 10 + "0000"}
    return [
        *(
            signed_request(merchant, "POST", PAYOUTS, body, formula=formula)
            for body in (ok, wallet, spaced)
            for formula in ("v1", "body")
        ),
        *(
            signed_request(merchant, "GET", f"{PAYOUTS}/{name}")
            for name in ("PAY-1", "PAY-2", CARD, f"{CARD}%00", f"%20{WALLET}")
        ),
        *(signed_request(merchant, "GET", f"{BALANCE}?shop_code={code}") for code in ("shop-001", CARD, f"{CARD}%ff")),
        signed_request(merchant, "POST", PAYOUTS, broken),
        signed_request(merchant, "POST", PAYOUTS, broken + b"\xff"),
        signed_request(merchant, "POST", PAYOUTS, broken.ljust(70_000)),
        signed_request(merchant, "POST", PAYOUTS, ok, content_type=f"text/{CARD}"),
        signed_request(merchant, "POST", PAYOUTS, ok, headers=wrong),
        signed_request(merchant, "POST", PAYOUTS, ok, headers={"X-API-Key": f"pk_{CARD}"}),
        signed_request(merchant, "POST", PAYOUTS, ok, headers={"X-Timestamp": CARD}),
        signed_request(merchant, "POST", PAYOUTS, ok, timestamp="1764928800"),
        signed_request(merchant, "POST", PAYOUTS, ok, headers={"X-Request-Id": f"not safe {CARD}"}),
        signed_request(
            merchant,
            "POST",
            PAYOUTS,
            create_body(amount=f"x{CARD}", card_number=CARD, callback_url=WALLET, currency=""),
        ),
        signed_request(merchant, "POST", PAYOUTS, create_body(card_number=f"{CARD}/{WALLET}", external_id=f"{CARD} ")),
        signed_request(merchant, "POST", PAYOUTS, create_body(currency=CARD, card_number=CARD)),
        signed_request(merchant, "POST", PAYOUTS, create_body(shop_code=CARD, card_number=CARD)),
        signed_request(merchant, "POST", PAYOUTS, create_body(external_id="PAY-1", amount="11.00", card_number=WALLET)),
        signed_request(merchant, "POST", PAYOUTS, create_body(amount="9999999999.00", card_number=CARD, **FIELDS)),
        plain_request("GET", f"/{CARD}".encode()),
        plain_request("PUT", f"{PAYOUTS}?card={CARD}".encode(), ok),
    ]


def unreadable(headers: dict[str, str]) -> list[bytes]:
    """What no HTTP parser accepts, with a signature and a card number where it breaks."""
    signature = headers["X-Signature"].encode()
    head = f"GET {BALANCE} HTTP/1.1\r\nHost: localhost\r\n".encode()
    return [
        head + b"X-Signature: %s\x00\r\n\r\n" % signature,
        head + b"X-Signature\x00: %s\r\n\r\n" % signature,
        head + b"X-Card: 1\r\n %s\r\n\r\n" % CARD.encode(),
        head + b"X-Card: %s\r\n\r\n" % (CARD.encode() * 600),
        head.replace(b"balance", f"balance?card={CARD}".encode() + b"\xff") + b"\r\n",
        f"POST {PAYOUTS} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n{CARD}zz\r\n\r\n".encode(),
        create_body(card_number=CARD, paymentData=PIN) + b"\r\n\r\n",
    ]
