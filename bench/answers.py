"""What a load was answered: rates and latencies, and each answer laid beside the database."""

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from rich.progress import Progress
from sqlalchemy import text

from bench.figures import percentile
from bench.filling import Shop
from bench.load import ANSWERS, UNANSWERED, Plan
from bench.scene import Scene
from common.db.engine import Tx, in_transaction
from common.domain.ids import PAYOUT, render_id
from ops.state import CHECKOUT

# After these, and after no answer at all, nobody knows: the payout may exist or not.
_UNKNOWN: Final = frozenset({UNANSWERED, HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.SERVICE_UNAVAILABLE})


@dataclass(frozen=True, slots=True)
class Answers:
    """What came of a plan, column by column: a place is the number in the `external_id`. Times are Unix seconds.

    `began`, `ended`: what counts, the warming up left out. `cpu_share`: of one processor, by the generator itself.
    """

    plan: Plan
    began: float
    ended: float
    cpu_share: float
    rendered_late: int
    connections_lost: int
    senders: list[int] = field(repr=False)
    amounts: list[int] = field(repr=False)
    intended: list[float] = field(repr=False)
    sent: list[float] = field(repr=False)
    done: list[float] = field(repr=False)
    statuses: list[int] = field(repr=False)
    ids: list[str] = field(repr=False)

    @property
    def rate(self) -> float:
        """Payouts created per second."""
        counted = sum(
            status == HTTPStatus.CREATED and self.began <= moment < self.ended
            for status, moment in zip(self.statuses, self.done, strict=True)
        )
        return counted / (self.ended - self.began)

    @property
    def failed(self) -> int:
        """How many were not created, as far as the sender knows."""
        return len(self.statuses) - self.statuses.count(HTTPStatus.CREATED)

    def latencies_ms(self) -> list[float]:
        """From when a request was meant to be sent to its whole answer; of what was not created, to the end of the run."""
        never = max([self.ended, *self.done])
        return [
            ((done if status == HTTPStatus.CREATED else never) - intended) * 1000
            for intended, done, status in zip(self.intended, self.done, self.statuses, strict=True)
            if self.began <= intended < self.ended
        ]

    def summary(self) -> dict[str, Any]:
        """What there is to say in a few numbers."""
        latencies = self.latencies_ms() or [0.0]
        late = [(sent - intended) * 1000 for sent, intended in zip(self.sent, self.intended, strict=True) if sent]
        return {
            "requests": len(self.statuses),
            "per_second": round(self.rate, 1),
            "statuses": {str(status): count for status, count in Counter(self.statuses).items()},
            "failed": self.failed,
            **{f"p{share}_ms": round(percentile(latencies, share / 100), 2) for share in (50, 99, 99.9)},
            "max_ms": round(max(latencies), 2),
            "generator": {
                "cpu_share": round(self.cpu_share, 3),
                "late_p99_ms": round(percentile(late or [0.0], 0.99), 2),
                "rendered_late": self.rendered_late,
                "connections_lost": self.connections_lost,
            },
        }


@dataclass(frozen=True, slots=True)
class Row:
    """A payout as it is stored."""

    id: str
    amount_minor: int


async def send(plan: Plan, progress: Progress, name: str) -> Answers:
    """Have a generator carry out a plan, and show how far it is."""
    task = progress.add_task(name, total=round(plan.whole_seconds, 1))
    with TemporaryDirectory(prefix="payouts-load-") as temporary:
        folder = Path(temporary)
        plan.write(folder)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bench.load", str(folder)), stdout=asyncio.subprocess.PIPE, cwd=CHECKOUT
        )
        try:
            assert process.stdout is not None
            async for line in process.stdout:
                told = json.loads(line)
                progress.update(task, completed=told["seconds"], description=f"{name}: {told['answered']:,} answered")
            assert await process.wait() == 0, "the generator says itself what went wrong"
        finally:
            if process.returncode is None:
                process.kill()
        progress.remove_task(task)
        return Answers(plan, **json.loads((folder / ANSWERS).read_text()))


def count_differing(answers: Answers, stored: Mapping[str, Row]) -> int:
    """How many requests and stored payouts do not bear each other out, by `external_id`.

    What was answered 201 is there, with the id of the answer and the amount of the request; what was refused is not
    there; what nobody knows of may be; and nothing is there that was not sent.
    """
    prefix, differing = answers.plan.prefix, 0
    for number, (status, id_, amount_minor) in enumerate(
        zip(answers.statuses, answers.ids, answers.amounts, strict=True)
    ):
        row = stored.get(f"{prefix}{number}")
        if status == HTTPStatus.CREATED:
            differing += row != Row(id_, amount_minor)
        elif row is not None:
            differing += status not in _UNKNOWN or row.amount_minor != amount_minor
    known = {f"{prefix}{number}" for number in range(len(answers.statuses))}
    return differing + len(stored.keys() - known)


# The payouts of one run, `p`; `:` comes behind every digit.
IN_RUN: Final = "p.shop_id = ANY (CAST(:shops AS uuid[])) AND p.external_id >= :prefix AND p.external_id < :behind"


def in_run(shops: Sequence[Shop], prefix: str) -> dict[str, Any]:
    """The parameters of `IN_RUN`."""
    return {"shops": [shop.id for shop in shops], "prefix": prefix, "behind": f"{prefix}:"}


async def find_stored(tx: Tx, shops: Sequence[Shop], prefix: str) -> dict[str, Row]:
    """The payouts whose `external_id` begins so, by that, as far as the hold of their money is there as well."""
    rows = await tx.execute(
        text(
            "SELECT p.external_id, p.id, p.amount_minor FROM payouts p"
            " JOIN entries e ON e.payout_id = p.id AND e.shop_id = p.shop_id AND e.kind = 'hold'"
            " AND e.amount_minor = p.amount_minor"
            f" WHERE {IN_RUN}"
        ),
        in_run(shops, prefix),
    )
    return {row.external_id: Row(render_id(PAYOUT, row.id), row.amount_minor) for row in rows}


async def check(on: Scene, answers: Answers, shops: Sequence[Shop]) -> int:
    """How many answers and payouts do not bear each other out."""
    stored = await in_transaction(on.superuser, lambda tx: find_stored(tx, shops, answers.plan.prefix))
    return count_differing(answers, stored)
