"""A steady load of signed creates by several clients who write down every answer and repeat what got none."""

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp

from tests.factories import Merchant
from tests.faults.merchants import Answer, Sender, sender
from tests.stack import eventually

# The state in which each of the sandbox's recipients ends, and how often it comes among others.
ENDS: Final = {
    "5678": "success",
    "0001": "success",
    "0100": "failed",
    "0120": "success",
    "0200": "verifying",
    "0201": "success",
    "0202": "success",
    "0203": "failed",
}
_MIX: Final = ["5678"] * 17 + list(ENDS) * 1
_PAUSE_SECONDS: Final = 0.02


@dataclass(frozen=True, slots=True)
class Sent:
    """A create and everything that came back: answers, and None for each time that nothing did."""

    merchant: Merchant
    fields: dict[str, Any]
    answers: list[Answer | None] = field(default_factory=list)

    @property
    def last(self) -> Answer:
        """The answer that ended the repeating."""
        answer = self.answers[-1]
        assert answer is not None
        return answer


class Load:
    """Clients at work. Each sends one create after the other, and goes on when it has its 200 or 201."""

    def __init__(self, base_url: str, merchants: Sequence[Merchant], *, callback_url: str, clients: int) -> None:
        self._base_url = base_url
        self._merchants = merchants
        self._callback_url = callback_url
        self._clients = clients
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._numbers = itertools.count(1)
        self._recipients: Iterator[str] = itertools.cycle(_MIX)
        self.sent: list[Sent] = []
        self.ended = 0

    def start(self) -> None:
        """Let the clients begin; half of them keep their connections."""
        self._tasks = [asyncio.create_task(self._run(number)) for number in range(self._clients)]

    async def progress(self, count: int) -> None:
        """Return once that many more creates are through."""
        goal = self.ended + count

        async def there() -> bool:
            for task in self._tasks:
                if task.done():
                    await task
            return self.ended >= goal

        await eventually(there, f"{count} more creates are through")

    async def stop(self) -> None:
        """Let each client end the create it is at."""
        self._stopping.set()
        await asyncio.gather(*self._tasks)

    def statuses(self) -> Counter[int | None]:
        """How often each status came; None: no answer."""
        return Counter(None if answer is None else answer.status for sent in self.sent for answer in sent.answers)

    async def _run(self, number: int) -> None:
        merchant = self._merchants[number % len(self._merchants)]
        async with sender(self._base_url, merchant, keep_alive=number % 2 == 0) as send:
            while not self._stopping.is_set():
                await self._create(send, merchant)
                self.ended += 1

    async def _create(self, send: Sender, merchant: Merchant) -> None:
        number = next(self._numbers)
        fields = {
            "external_id": f"LOAD-{number}",
            "amount": f"{1 + number % 7}.{number % 100:02}",
            "currency": merchant.shop.currency,
            "card_number": f"0171{number % 10000:04}{next(self._recipients)}",
            "callback_url": f"{self._callback_url}?number={number}",
            "metadata": {"number": str(number)},
        }
        sent = Sent(merchant, fields)
        self.sent.append(sent)
        body = json.dumps(fields).encode()

        async def answered() -> bool:
            try:
                answer = await send.create(body)
            except (aiohttp.ClientError, TimeoutError):
                sent.answers.append(None)
                return False
            sent.answers.append(answer)
            if answer.status == 503:
                answer.assert_unavailable()
            else:
                assert answer.status in (200, 201), answer
            return answer.status != 503

        await eventually(answered, "a create is answered with 200 or 201")
        # A steady load, not the greatest.
        await asyncio.sleep(_PAUSE_SECONDS)


def assert_told_truly(sent: Sent) -> None:
    """What a client was told fits together: one payout; 200 only for what may have been accepted before."""
    told = [answer for answer in sent.answers if answer is not None and answer.status in (200, 201)]
    assert len({answer.body["id"] for answer in told}) == 1, sent
    if sent.last.status == 200:
        assert len(sent.answers) > 1, sent
    for answer in told:
        for name in ("external_id", "amount", "currency", "callback_url", "metadata"):
            assert answer.body[name] == sent.fields[name], sent
