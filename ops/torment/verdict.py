"""What clients, our tables, the bank and the receiver say of the same payouts: laid side by side when all is quiet."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp
from sqlalchemy import text

from common.db.engine import Tx, in_transaction
from common.db.invariants import Finding, verify
from common.db.stuck import TooOld, find_stuck
from common.domain.ids import EVENT, PAYOUT, render_id
from common.domain.money import CURRENCY_EXPONENTS, parse_amount
from common.messaging.topology import Topology
from ops.broker import connect_any
from ops.reconciliation import compare, find_ours
from ops.simulator.ledger import Ledger, Payment
from ops.stage import CURRENCY, RAIL, Stage, count_states
from ops.torment.clients import TOO_MUCH, Exchange, read_answers

_STUCK_SECONDS: Final = 5.0
_STUCK_ROWS_MAX: Final = 20
_RECEIVED_SECONDS: Final = 120.0

_PAYOUTS: Final = text(
    """
    SELECT p.id, s.code AS shop, p.external_id, p.amount_minor, p.currency, p.recipient_masked, p.details, p.state,
           (SELECT min(a.reference) FROM payout_attempts a WHERE a.payout_id = p.id AND a.shop_id = p.shop_id) AS reference
      FROM payouts p JOIN shops s ON s.id = p.shop_id ORDER BY p.id
    """
)
_CALLBACKS: Final = text(
    """
    SELECT p.external_id, p.state AS payout_state, e.id, e.type, e.sequence, c.state
      FROM payouts p
      LEFT JOIN events e ON e.payout_id = p.id AND e.shop_id = p.shop_id
      LEFT JOIN callbacks c ON c.event_id = e.id AND c.shop_id = e.shop_id
     ORDER BY p.id, e.sequence
    """
)


@dataclass(slots=True)
class Backlog:
    """What is still to be done; of messages also those for people."""

    payouts: int
    callbacks: int
    rail_events: int
    untold_by_bank: int
    messages: int

    @property
    def is_empty(self) -> bool:
        """Whether all is quiet."""
        return not (self.payouts or self.callbacks or self.rail_events or self.untold_by_bank or self.messages)


@dataclass(slots=True)
class Verdict:
    """What was found. `differences`: everything that must not be; nothing when all is well."""

    states: dict[str, int] = field(default_factory=dict)
    bank: Counter[str] = field(default_factory=Counter)
    resends: int = 0
    paid_minor: int = 0
    captured_minor: int = 0
    callbacks: Counter[str] = field(default_factory=Counter)
    discrepancies: int = 0
    differences: list[str] = field(default_factory=list)
    broken: list[Finding] = field(default_factory=list)


@dataclass(slots=True)
class _Told:
    """What a client was told of one payout; `ids` of the payouts that were named."""

    request: dict[str, Any]
    ids: set[str] = field(default_factory=set)
    created: int = 0
    faults: list[str] = field(default_factory=list)
    refusal: int | None = None
    exchanges: int = 0


async def find_backlog(on: Stage) -> Backlog:
    """What is still to be done. Raises: `common.errors.Transient`, and when the broker is away `BrokerUnusable`."""
    row = (
        await in_transaction(
            on.engine,
            lambda tx: tx.execute(
                text(
                    "SELECT (SELECT count(*) FROM payout_due) AS payouts, (SELECT count(*) FROM callback_due) AS callbacks,"
                    " (SELECT count(*) FROM rail_events WHERE applied_at IS NULL) AS rail_events"
                )
            ),
        )
    ).one()
    ledger = Ledger(on.ledger)
    untold = ledger.count_untold()
    ledger.close()
    return Backlog(row.payouts, row.callbacks, row.rail_events, untold, await _count_messages(on))


async def _count_messages(on: Stage) -> int:
    if not on.settings.amqp_urls:
        return 0
    topology = Topology(on.settings.amqp_queue_prefix, on.settings.amqp_shards)
    connection = await connect_any(on.settings.amqp_urls)
    async with connection:
        channel = await connection.channel()
        queues = [await channel.declare_queue(name, passive=True) for name in topology.all_queues()]
        return sum(queue.declaration_result.message_count or 0 for queue in queues)


async def judge(on: Stage, answers: Path) -> Verdict:
    """Lay everything side by side; to be asked when all is quiet."""
    verdict = Verdict(states=await count_states(on.engine))
    ledger = Ledger(on.ledger)
    payments = ledger.payments()
    ledger.close()
    verdict.bank = Counter(payment.status for payment in payments)
    verdict.resends = sum(payment.submits - 1 for payment in payments)
    verdict.paid_minor = sum(payment.amount_minor * payment.times_paid for payment in payments)
    told = _read_told(answers)
    verdict.differences += await in_transaction(on.engine, lambda tx: _compare_answers(tx, told, payments))
    verdict.differences += compare(await in_transaction(on.engine, lambda tx: find_ours(tx, RAIL)), payments)
    verdict.differences += await _compare_callbacks(on, verdict)
    stuck = await in_transaction(
        on.engine,
        lambda tx: find_stuck(tx, TooOld(_STUCK_SECONDS, _STUCK_SECONDS), now=time.time(), rows_max=_STUCK_ROWS_MAX),
    )
    verdict.differences += [f"stuck: {item.reason} {item.subject} {item.note or ''}" for item in stuck]
    verdict.captured_minor, verdict.discrepancies = await in_transaction(on.engine, _sum_up)
    if verdict.captured_minor != verdict.paid_minor:
        verdict.differences.append(f"{verdict.captured_minor} captured here, {verdict.paid_minor} paid by the bank")
    verdict.broken = [finding for finding in await verify(on.engine) if finding.count]
    return verdict


async def _sum_up(tx: Tx) -> tuple[int, int]:
    row = (
        await tx.execute(
            text(
                "SELECT (SELECT coalesce(sum(amount_minor), 0)::bigint FROM payouts WHERE state IN ('success', 'refunded'))"
                " AS captured, (SELECT count(*) FROM discrepancies) AS discrepancies"
            )
        )
    ).one()
    return row.captured, row.discrepancies


def _read_told(answers: Path) -> dict[str, _Told]:
    told: dict[str, _Told] = {}
    for exchange in read_answers(answers):
        item = told.setdefault(exchange.request["external_id"], _Told(exchange.request))
        _take_in(item, exchange)
    return told


def _take_in(item: _Told, exchange: Exchange) -> None:
    """Note an answer, and what is wrong with it by itself."""
    item.exchanges += 1
    if exchange.status in (200, 201):
        answer = exchange.answer
        item.ids.add(answer["id"])
        item.created += exchange.status == 201
        if exchange.status == 200 and item.exchanges == 1:
            item.faults.append("200 for the first request of all")
        item.faults += [
            f"asked for {name} {item.request[name]}, answered {answer.get(name)}"
            for name in ("external_id", "shop_code", "amount", "currency", "metadata")
            if answer.get(name) != item.request[name]
        ]
        if item.refusal is not None:
            item.faults.append(f"{exchange.status} after {item.refusal}")
    elif exchange.status is not None and exchange.status < 500:
        item.refusal = exchange.status
        if item.ids:
            item.faults.append(f"{exchange.status} after it was accepted")


async def _compare_answers(tx: Tx, told: dict[str, _Told], payments: Iterable[Payment]) -> list[str]:
    """Each payout that a client was told of is there once, as it was asked for, for the bank as well; and no other."""
    digests = {payment.reference: payment.recipient_digest for payment in payments}
    missing, differences = dict(told), []
    for row in await tx.execute(_PAYOUTS):
        item = missing.pop(row.external_id, None)
        if item is None:
            again = "twice" if row.external_id in told else "and nobody asked for it"
            differences.append(f"{row.external_id}: it is there {again}")
        else:
            differences += [f"{row.external_id}: {fault}" for fault in _faults(item, row, digests.get(row.reference))]
    for external_id, item in missing.items():
        differences += [f"{external_id}: {fault}" for fault in _faults_of_absent(item)]
    return differences


def _faults(item: _Told, row: Any, recipient_digest: str | None) -> Iterator[str]:
    yield from item.faults
    asked = item.request
    if item.ids != {render_id(PAYOUT, row.id)}:
        yield f"told of {', '.join(sorted(item.ids)) or 'nothing'}, and it is {render_id(PAYOUT, row.id)}"
    if item.created > 1:
        yield f"answered 201 {item.created} times"
    if (row.shop, row.amount_minor, row.currency, row.details) != (
        asked["shop_code"],
        parse_amount(asked["amount"], CURRENCY_EXPONENTS[CURRENCY]),
        asked["currency"],
        {"metadata": asked["metadata"]},
    ):
        yield "it is not what was asked for"
    if row.recipient_masked[-4:] != asked["card_number"][-4:]:
        yield "it goes to somebody else"
    if recipient_digest not in (None, _digest(asked["card_number"])):
        yield "the bank was asked to pay somebody else"


def _faults_of_absent(item: _Told) -> Iterator[str]:
    yield from item.faults
    if item.ids:
        yield f"told of {', '.join(sorted(item.ids))}, and it is not there"
    elif item.refusal is None:
        yield "nobody ever knew what became of it"
    elif (item.refusal, item.request["amount"]) != (422, TOO_MUCH):
        yield f"refused with {item.refusal}, and nothing was wrong with it"


def _digest(card_number: str) -> str:
    """As the bank keeps recipients."""
    return hashlib.sha256(json.dumps({"number": card_number}, sort_keys=True).encode()).hexdigest()


async def _compare_callbacks(on: Stage, verdict: Verdict) -> list[str]:
    """Every end of a payout was told to its receiver, who verified it; and nothing else was."""
    timeout = aiohttp.ClientTimeout(total=_RECEIVED_SECONDS)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.get(f"{on.demo.receiver_url}/received", params={"prefix": "storm-"}) as response,
    ):
        received = await response.json()
    verdict.callbacks = Counter({name: received[name] for name in ("received", "verified", "rejected")})
    heard = {
        (external_id, callback["event"]): (callback["type"], callback["sequence"])
        for external_id, callbacks in received["by_external_id"].items()
        for callback in callbacks
        if callback["verified"]
    }
    verdict.callbacks["events"] = len(heard)
    rows = (await in_transaction(on.engine, lambda tx: tx.execute(_CALLBACKS))).all()
    differences = [f"{received['rejected']} callbacks were not verified"] if received["rejected"] else []
    told: dict[str, list[str]] = {}
    for row in rows:
        told.setdefault(row.external_id, []).append(str(row.type))
        if row.id is None or row.state != "delivered":
            differences.append(f"{row.external_id}: its callback is {row.state}")
        elif heard.pop((row.external_id, render_id(EVENT, row.id)), None) != (row.type, row.sequence):
            differences.append(f"{row.external_id}: {row.type} did not reach its receiver as it stands")
    differences += [
        f"{row.external_id}: it is {row.payout_state}, and the last word is {told[row.external_id][-1]}"
        for row in rows
        if told[row.external_id][-1] != f"payout.{row.payout_state}"
    ]
    return differences + [f"{external_id}: {event} is no event of ours" for external_id, event in heard]
