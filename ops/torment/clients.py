"""Merchants in a storm: they send on time whatever happens, repeat what nobody answered, and write every answer down."""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp

from ops.stage import CURRENCY, PATH
from ops.state import Demo

# More than any shop has: refused for ever, however often it is asked.
TOO_MUCH: Final = "9000000000.00"
# One of so many asks for too much; one of so many that were accepted is sent once more.
_TOO_MUCH_OF: Final = 100
_TWINS_OF: Final = 50

_REQUEST_SECONDS: Final = 15.0
# Beyond them a payout waits in the client for its turn, not for an answer.
_REQUESTS_MAX: Final = 200
_PAUSES_SECONDS: Final = (0.2, 0.5, 1.0, 2.0)


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request and what came back, as it stands in the file. `status` None: nothing came, and `answer` says why.

    `at`: Unix seconds when the answer was there.
    """

    at: float
    request: dict[str, Any]
    status: int | None
    answer: Any


@dataclass(slots=True)
class Tally:
    """What the clients saw. `turned_away`: there were too many in the client already, so they were never sent."""

    offered: int = 0
    turned_away: int = 0
    waiting: int = 0
    accepted: int = 0
    refused: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    answer_seconds: list[float] = field(default_factory=list)


class Clients:
    """All merchants of the stage. `waiting_max`: how many payouts may wait in the client for their last word."""

    def __init__(self, demo: Demo, shops: list[str], answers: Path, *, waiting_max: int, chance: random.Random) -> None:
        self.tally = Tally()
        self._demo = demo
        self._shops = shops
        self._waiting_max = waiting_max
        self._chance = chance
        self._answers = answers.open("w")
        self._turn = asyncio.Semaphore(_REQUESTS_MAX)
        self._tasks: set[asyncio.Task[None]] = set()
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=_REQUEST_SECONDS), connector=aiohttp.TCPConnector(limit=_REQUESTS_MAX)
        )

    async def offer(self, rate: float, seconds: float) -> None:
        """Send so many a second for so long, in open loop: when each is sent depends on no answer."""
        clock = asyncio.get_running_loop().time
        started = clock()
        for number in range(round(rate * seconds)):
            ahead = started + number / rate - clock()
            if ahead > 0:
                await asyncio.sleep(ahead)
            self.tally.offered += 1
            if len(self._tasks) >= self._waiting_max:
                self.tally.turned_away += 1
                continue
            task = asyncio.create_task(self._pay(self._render(number)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            self.tally.waiting = len(self._tasks)

    async def all_answered(self) -> None:
        """Return when each has its last word."""
        while self._tasks:
            await asyncio.gather(*self._tasks)

    async def close(self) -> None:
        """Stop asking, and have everything in the file."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._session.close()
        self._answers.close()

    def _render(self, number: int) -> dict[str, Any]:
        too_much = self._chance.randrange(_TOO_MUCH_OF) == 0
        return {
            "external_id": f"storm-{number:07}",
            "shop_code": self._chance.choice(self._shops),
            "amount": TOO_MUCH if too_much else f"{self._chance.randrange(1, 500)}.{self._chance.randrange(100):02}",
            "currency": CURRENCY,
            "card_number": f"017{self._chance.randrange(10**8):08}",
            "metadata": {"number": str(number)},
        }

    async def _pay(self, request: dict[str, Any]) -> None:
        """Send it until there is a last word: 200, 201, or a refusal; then perhaps once more."""
        tally, started = self.tally, time.monotonic()
        pauses = iter(_PAUSES_SECONDS)
        while (status := await self._ask(request)) is None or status >= 500:  # noqa: ASYNC110 - others answer
            await asyncio.sleep(next(pauses, _PAUSES_SECONDS[-1]) * self._chance.uniform(0.5, 1))
        tally.answer_seconds.append(time.monotonic() - started)
        accepted = status in (200, 201)
        tally.accepted += accepted
        tally.refused += not accepted
        tally.waiting = len(self._tasks) - 1
        if accepted and self._chance.randrange(_TWINS_OF) == 0:
            await self._ask(request)

    async def _ask(self, request: dict[str, Any]) -> int | None:
        """One signed request, and its answer written down."""
        async with self._turn:
            status, answer = await self._send(json.dumps(request).encode())
        print(json.dumps(asdict(Exchange(time.time(), request, status, answer))), file=self._answers)
        self.tally.answers["no answer" if status is None else str(status)] += 1
        return status

    async def _send(self, body: bytes) -> tuple[int | None, Any]:
        headers = self._demo.sign("POST", PATH, body)
        try:
            async with self._session.post(self._demo.base_url + PATH, data=body, headers=headers) as response:
                content = await response.read()
                answer: Any = content.decode(errors="replace")
                with suppress(ValueError):
                    answer = json.loads(content)
                return response.status, answer
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            return None, type(error).__name__


def read_answers(path: Path) -> Iterator[Exchange]:
    """What the clients wrote down, in order of time."""
    with path.open() as lines:
        for line in lines:
            yield Exchange(**json.loads(line))
