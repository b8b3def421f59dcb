"""A payout's or payin's whole story, for operators: everything that is stored about it but who is paid."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Row, func, select, text

from common.db.engine import Tx
from common.db.tables import (
    audit,
    callback_attempts,
    callback_due,
    callbacks,
    discrepancies,
    events,
    merchants,
    payin_due,
    payin_moves,
    payins,
    payout_attempts,
    payout_due,
    payouts,
    rail_events,
    shops,
)
from common.domain.ids import EVENT, PAYOUT, render_id

StoredRow = Row[*tuple[Any, ...]]

FOUND_MAX = 10

_SHOWN = (
    *(
        payouts.c[name]
        for name in (
            "id",
            "shop_id",
            "external_id",
            "amount_minor",
            "currency",
            "recipient_masked",
            "callback_url",
            "details",
            "state",
            "version",
            "failure_code",
            "provider_reference",
            "created_at",
            "updated_at",
            "finalized_at",
        )
    ),
    merchants.c.code.label("merchant"),
    shops.c.code.label("shop"),
    shops.c.currency_exponent,
)

# None of one that was put aside: it is due when somebody sends it again.
_CALLBACK_DUE = func.nullif(callback_due.c.due_at, text("'infinity'::timestamptz")).label("due_at")

# The kinds are spelled out so that the partial indexes on them serve: an account has too many entries to look through.
_ENTRIES = text(
    """
    SELECT seq, kind, contra, amount_minor, posted_after_minor, held_after_minor, created_at FROM entries
     WHERE payout_id = :payout_id AND shop_id = :shop_id AND kind = 'hold'
     UNION ALL
    SELECT seq, kind, contra, amount_minor, posted_after_minor, held_after_minor, created_at FROM entries
     WHERE payout_id = :payout_id AND shop_id = :shop_id AND kind IN ('capture', 'release')
     UNION ALL
    SELECT seq, kind, contra, amount_minor, posted_after_minor, held_after_minor, created_at FROM entries
     WHERE payout_id = :payout_id AND shop_id = :shop_id AND kind = 'payout_return'
     ORDER BY seq
    """
)


@dataclass(frozen=True, slots=True)
class Story:
    """What is stored about one payout: rows of each table, oldest first. `due` None: nothing is left to do for it."""

    payout: StoredRow
    due: StoredRow | None
    entries: Sequence[StoredRow]
    attempts: Sequence[StoredRow]
    events: Sequence[StoredRow]
    callbacks: Sequence[StoredRow]
    deliveries: Sequence[StoredRow]
    words: Sequence[StoredRow]
    discrepancies: Sequence[StoredRow]
    actions: Sequence[StoredRow]


async def begin_snapshot(tx: Tx) -> None:
    """From now on the transaction sees one moment, and changes nothing. Must be its first statement."""
    await tx.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"))


async def find_payouts(
    tx: Tx, *, payout_id: UUID | None = None, external_id: str | None = None, shop: tuple[str, str] | None = None
) -> Sequence[StoredRow]:
    """The payouts of that id, or of that `external_id` in any shop, or in the one of those codes (merchant, shop).

    At most `FOUND_MAX`, by merchant and shop.
    """
    query = (
        select(*_SHOWN)
        .join(shops, shops.c.id == payouts.c.shop_id)
        .join(merchants, merchants.c.id == shops.c.merchant_id)
        .order_by(merchants.c.code, shops.c.code)
        .limit(FOUND_MAX)
    )
    if payout_id is not None:
        query = query.where(payouts.c.id == payout_id)
    if external_id is not None:
        query = query.where(payouts.c.external_id == external_id)
    if shop is not None:
        query = query.where(merchants.c.code == shop[0], shops.c.code == shop[1])
    return (await tx.execute(query)).all()


async def find_story(tx: Tx, payout: StoredRow) -> Story:
    """Everything about a payout that `find_payouts` found."""
    told = await _find_events(tx, payout)
    tried = await _find_attempts(tx, payout)
    doubts = await _find_discrepancies(tx, payout)
    return Story(
        payout=payout,
        due=await _find_due(tx, payout),
        entries=(await tx.execute(_ENTRIES, {"payout_id": payout.id, "shop_id": payout.shop_id})).all(),
        attempts=tried,
        events=told,
        callbacks=await _find_callbacks(tx, payout),
        deliveries=await _find_deliveries(tx, payout, [event.id for event in told]),
        words=await _find_words(tx, {attempt.reference for attempt in tried}),
        discrepancies=doubts,
        actions=await _find_actions(
            tx,
            [
                render_id(PAYOUT, payout.id),
                *(render_id(EVENT, event.id) for event in told),
                *(str(discrepancy.id) for discrepancy in doubts),
            ],
        ),
    )


async def has_event(tx: Tx, event_id: UUID) -> bool:
    """Whether there is an event of that id, called or not."""
    return await tx.scalar(select(events.c.id).where(events.c.id == event_id)) is not None


async def has_callback(tx: Tx, event_id: UUID) -> bool:
    """Whether somebody was or is to be called about the event."""
    return await tx.scalar(select(callbacks.c.event_id).where(callbacks.c.event_id == event_id)) is not None


async def find_callback(tx: Tx, event_id: UUID) -> StoredRow | None:
    """What is told about an event, of which shop, and where; None when nobody is called about it."""
    query = select(callbacks.c.shop_id, callbacks.c.url, events.c.body).join(
        events, (events.c.id == callbacks.c.event_id) & (events.c.shop_id == callbacks.c.shop_id)
    )
    return (await tx.execute(query.where(callbacks.c.event_id == event_id))).one_or_none()


async def _find_due(tx: Tx, payout: StoredRow) -> StoredRow | None:
    query = select(payout_due.c.rail, payout_due.c.due_at, payout_due.c.lease_token.is_not(None).label("leased"))
    return (
        await tx.execute(query.where(payout_due.c.payout_id == payout.id, payout_due.c.shop_id == payout.shop_id))
    ).one_or_none()


async def _find_attempts(tx: Tx, payout: StoredRow) -> Sequence[StoredRow]:
    query = (
        select(payout_attempts)
        .where(payout_attempts.c.payout_id == payout.id, payout_attempts.c.shop_id == payout.shop_id)
        .order_by(payout_attempts.c.attempt_no)
    )
    return (await tx.execute(query)).all()


async def _find_words(tx: Tx, references: Collection[str]) -> Sequence[StoredRow]:
    query = select(rail_events).where(rail_events.c.reference.in_(references)).order_by(rail_events.c.received_at)
    return (await tx.execute(query)).all()


async def _find_discrepancies(tx: Tx, payout: StoredRow) -> Sequence[StoredRow]:
    query = select(discrepancies).where(discrepancies.c.payout_id == payout.id).order_by(discrepancies.c.opened_at)
    return (await tx.execute(query)).all()


async def _find_events(tx: Tx, payout: StoredRow) -> Sequence[StoredRow]:
    query = (
        select(events)
        .where(events.c.payout_id == payout.id, events.c.shop_id == payout.shop_id)
        .order_by(events.c.sequence)
    )
    return (await tx.execute(query)).all()


async def _find_callbacks(tx: Tx, payout: StoredRow) -> Sequence[StoredRow]:
    query = (
        select(callbacks, _CALLBACK_DUE)
        .join(
            callback_due,
            (callback_due.c.event_id == callbacks.c.event_id) & (callback_due.c.shop_id == callbacks.c.shop_id),
            isouter=True,
        )
        .where(callbacks.c.payout_id == payout.id, callbacks.c.shop_id == payout.shop_id)
        .order_by(callbacks.c.created_at)
    )
    return (await tx.execute(query)).all()


async def _find_deliveries(tx: Tx, payout: StoredRow, event_ids: Sequence[UUID]) -> Sequence[StoredRow]:
    query = (
        select(callback_attempts)
        .where(callback_attempts.c.event_id.in_(event_ids), callback_attempts.c.shop_id == payout.shop_id)
        .where(callback_attempts.c.started_at >= payout.created_at - timedelta(days=1))
        .order_by(callback_attempts.c.started_at)
    )
    return (await tx.execute(query)).all()


async def _find_actions(tx: Tx, subjects: Sequence[str]) -> Sequence[StoredRow]:
    query = (
        select(audit.c.at, audit.c.actor, audit.c.action, audit.c.subject, audit.c.reason)
        .where(audit.c.subject.in_(subjects))
        .order_by(audit.c.id)
    )
    return (await tx.execute(query)).all()


@dataclass(frozen=True, slots=True)
class PayinStory:
    """What is stored about one payin: rows of each table, oldest first. `due` None: nothing is left to ask."""

    payin: StoredRow
    due: StoredRow | None
    moves: Sequence[StoredRow]
    entries: Sequence[StoredRow]
    events_of_rail: Sequence[StoredRow]
    discrepancies: Sequence[StoredRow]
    events: Sequence[StoredRow]
    callbacks: Sequence[StoredRow]


async def find_payins(
    tx: Tx, *, payin_id: UUID | None = None, external_id: str | None = None, shop: tuple[str, str] | None = None
) -> Sequence[StoredRow]:
    """The payins of that id, or of that `external_id` in any shop, or in the one of those codes; at most `FOUND_MAX`."""
    query = (
        select(payins, merchants.c.code.label("merchant"), shops.c.code.label("shop"), shops.c.currency_exponent)
        .join(shops, shops.c.id == payins.c.shop_id)
        .join(merchants, merchants.c.id == shops.c.merchant_id)
        .order_by(merchants.c.code, shops.c.code)
        .limit(FOUND_MAX)
    )
    if payin_id is not None:
        query = query.where(payins.c.id == payin_id)
    if external_id is not None:
        query = query.where(payins.c.external_id == external_id)
    if shop is not None:
        query = query.where(merchants.c.code == shop[0], shops.c.code == shop[1])
    return (await tx.execute(query)).all()


# The kinds are spelled out for the partial indexes on them, as above.
_PAYIN_ENTRIES = text(
    """
    SELECT seq, kind, contra, amount_minor, posted_after_minor, held_after_minor, created_at FROM entries
     WHERE payin_id = :payin_id AND shop_id = :shop_id AND kind = 'payin'
     UNION ALL
    SELECT seq, kind, contra, amount_minor, posted_after_minor, held_after_minor, created_at FROM entries
     WHERE payin_id = :payin_id AND shop_id = :shop_id AND kind = 'payin_refund'
     ORDER BY seq
    """
)


async def find_payin_story(tx: Tx, payin: StoredRow) -> PayinStory:
    """Everything about a payin that `find_payins` found."""
    due = select(payin_due).where(payin_due.c.payin_id == payin.id, payin_due.c.shop_id == payin.shop_id)
    moves = select(payin_moves).where(payin_moves.c.payin_id == payin.id, payin_moves.c.shop_id == payin.shop_id)
    doubts = select(discrepancies).where(discrepancies.c.payin_id == payin.id).order_by(discrepancies.c.opened_at)
    told = select(events).where(events.c.payin_id == payin.id, events.c.shop_id == payin.shop_id)
    events_told = (await tx.execute(told.order_by(events.c.sequence))).all()
    called = (
        select(callbacks, _CALLBACK_DUE)
        .join(
            callback_due,
            (callback_due.c.event_id == callbacks.c.event_id) & (callback_due.c.shop_id == callbacks.c.shop_id),
            isouter=True,
        )
        .where(callbacks.c.event_id.in_([event.id for event in events_told]), callbacks.c.shop_id == payin.shop_id)
        .order_by(callbacks.c.created_at)
    )
    return PayinStory(
        payin=payin,
        due=(await tx.execute(due)).one_or_none(),
        moves=(await tx.execute(moves.order_by(payin_moves.c.version))).all(),
        entries=(await tx.execute(_PAYIN_ENTRIES, {"payin_id": payin.id, "shop_id": payin.shop_id})).all(),
        events_of_rail=await _find_words(tx, {payin.reference}),
        discrepancies=(await tx.execute(doubts)).all(),
        events=events_told,
        callbacks=(await tx.execute(called)).all(),
    )
