"""`payouts payout`: everything that is known of one, in order of time."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, Final

import click

from common.db.engine import Tx, in_transaction
from common.db.reconciling import find_by_references
from common.db.stories import FOUND_MAX, StoredRow, Story, begin_snapshot, find_payouts, find_story
from common.domain.ids import EVENT, PAYOUT, parse_id, render_id
from common.domain.money import render_amount
from common.domain.payout import State
from ops.cli.connect import run_connected
from ops.cli.errors import Refused
from ops.cli.options import json_option, parse_shop, parse_uuid
from ops.cli.output import Record, print_json, print_record, print_table, render_cell

# What stands in the JSON only; the rest of a moment is told to people as well.
_FOR_PROGRAMS: Final = frozenset({"at", "what", "body"})
_FACT_CHARACTERS_MAX: Final = 120


@click.group("payout")
def payout_group() -> None:
    """Payouts."""


@payout_group.command("show")
@click.argument("payout_id", metavar="ID_OR_EXTERNAL_ID")
@click.option("--shop", type=parse_shop, metavar="MERCHANT/SHOP", help="Whose external id is meant.")
@json_option
def show_payout_command(payout_id: str, shop: tuple[str, str] | None, as_json: bool) -> None:
    """Tell the whole story of a payout: its money, attempts, events, callbacks, and who intervened."""

    async def work(tx: Tx) -> Story:
        await begin_snapshot(tx)
        return await find_story(tx, await find_one_payout(tx, payout_id, shop))

    story = run_connected(lambda engine: in_transaction(engine, work))
    payout, moments = describe_payout(story), tell(story)
    if as_json:
        print_json({"payout": payout, "story": moments})
        return
    print_record(payout)
    print_story(moments)


async def find_one_payout(tx: Tx, text: str, shop: tuple[str, str] | None = None) -> StoredRow:
    """The payout of an id (`po_…`, or as the database shows it), of a reference that rails know, else of the merchant's own id.

    Raises: `Refused` when there is none, or several shops have it and none was named.
    """
    payout_id = parse_id(PAYOUT, text) or parse_uuid(text)
    found = await find_payouts(tx, payout_id=payout_id, shop=shop) if payout_id else []
    if payout_id and not found:
        known = (await find_by_references(tx, [text])).get(text)
        found = await find_payouts(tx, payout_id=known.payout_id, shop=shop) if known and known.payout_id else []
    found = found or await find_payouts(tx, external_id=text, shop=shop)
    if not found:
        raise Refused(f"there is no payout {text}" + ("" if shop is None else f" in {'/'.join(shop)}"))
    if len(found) > 1:
        shops = ", ".join(f"{payout.merchant}/{payout.shop}" for payout in found)
        more = ", …" if len(found) == FOUND_MAX else ""
        raise Refused(f"several shops have a payout {text}; choose with --shop: {shops}{more}")
    return found[0]


def describe_payout(story: Story) -> Record:
    """A payout as it stands, and what is next."""
    payout, due = story.payout, story.due
    state = State(payout.state)
    return {
        "id": render_id(PAYOUT, payout.id),
        "external_id": payout.external_id,
        "merchant": payout.merchant,
        "shop": payout.shop,
        "status": state.status,
        "stage": state.stage,
        "amount": render_amount(payout.amount_minor, payout.currency_exponent),
        "currency": payout.currency,
        "recipient": payout.recipient_masked,
        "callback_url": payout.callback_url,
        "details": payout.details,
        "failure": payout.failure_code,
        "provider_reference": payout.provider_reference,
        "created_at": payout.created_at,
        "updated_at": payout.updated_at,
        "finalized_at": payout.finalized_at,
        "rail": None if due is None else due.rail,
        "due_at": None if due is None else due.due_at,
        "leased": None if due is None else due.leased,
    }


def tell(story: Story) -> list[dict[str, Any]]:
    """What happened, in order of time; what one transaction did, in the order of cause and effect."""
    moments = [
        *_tell_states(story.payout, story.attempts),
        *(tell_entry(entry, story.payout.currency_exponent) for entry in story.entries),
        *(tell_word(word, story.payout.currency_exponent) for word in story.words),
        *(tell_discrepancy(discrepancy) for discrepancy in story.discrepancies),
        *(tell_event(event) for event in story.events),
        *(told for callback in story.callbacks for told in tell_callback(callback)),
        *(_tell_delivery(delivery) for delivery in story.deliveries),
        *(moment(a.at, "operator", actor=a.actor, action=a.action, reason=a.reason) for a in story.actions),
    ]
    return sorted(moments, key=lambda told: told["at"])


def _tell_states(payout: StoredRow, attempts: Sequence[StoredRow]) -> Iterator[dict[str, Any]]:
    """The first state and the present one; the attempts tell of those between."""
    yield moment(payout.created_at, "payout", state=State.QUEUED.value)
    for attempt in attempts:
        yield moment(
            attempt.started_at,
            "attempt",
            number=attempt.attempt_no,
            action=attempt.action,
            rail=attempt.rail,
            reference=attempt.reference,
        )
        if attempt.finished_at is not None:
            yield moment(
                attempt.finished_at,
                "attempt",
                number=attempt.attempt_no,
                outcome=attempt.outcome,
                detail=attempt.detail,
            )
    if payout.version > 1:
        yield moment(payout.updated_at, "payout", state=payout.state, failure=payout.failure_code)


def tell_entry(entry: StoredRow, exponent: int) -> dict[str, Any]:
    """How money moved."""
    return moment(
        entry.created_at,
        "entry",
        seq=entry.seq,
        kind=entry.kind,
        amount=render_amount(entry.amount_minor, exponent),
        contra=entry.contra,
        posted_after=render_amount(entry.posted_after_minor, exponent),
        held_after=render_amount(entry.held_after_minor, exponent),
    )


def tell_word(word: StoredRow, exponent: int) -> dict[str, Any]:
    """What the rail said by itself."""
    return moment(
        word.received_at,
        "word",
        rail=word.rail,
        id=word.event_id,
        outcome=word.outcome,
        failure=word.failure_code,
        amount=None if word.amount_minor is None else render_amount(word.amount_minor, exponent),
        currency=word.currency,
        effect=word.effect,
    )


def tell_discrepancy(discrepancy: StoredRow) -> dict[str, Any]:
    """A contradiction for people."""
    return moment(
        discrepancy.opened_at,
        "discrepancy",
        id=discrepancy.id,
        kind=discrepancy.kind,
        word=discrepancy.word,
        against=discrepancy.state,
        detail=discrepancy.detail,
        closed_at=discrepancy.closed_at,
    )


def tell_event(event: StoredRow) -> dict[str, Any]:
    """What merchants are told."""
    return moment(
        event.created_at,
        "event",
        id=render_id(EVENT, event.id),
        type=event.type,
        sequence=event.sequence,
        body=event.body.decode(),
    )


def tell_callback(callback: StoredRow) -> Iterator[dict[str, Any]]:
    """That somebody is to be called, and how that ended."""
    event = render_id(EVENT, callback.event_id)
    yield moment(callback.created_at, "callback", event=event, url=callback.url, due_at=callback.due_at)
    if callback.finished_at is not None:
        yield moment(callback.finished_at, "callback", event=event, state=callback.state)


def _tell_delivery(delivery: StoredRow) -> dict[str, Any]:
    return moment(
        delivery.started_at,
        "delivery",
        event=render_id(EVENT, delivery.event_id),
        number=delivery.attempt_no,
        http_status=delivery.http_status,
        error=delivery.error,
        duration_ms=delivery.duration_ms,
        address=None if delivery.address is None else str(delivery.address),
        response=None if delivery.response_excerpt is None else delivery.response_excerpt.decode(errors="replace"),
        late=delivery.late,
    )


def moment(at: datetime, what: str, **facts: object) -> dict[str, Any]:
    """Something that happened: when, what, and its facts."""
    return {"at": at, "what": what, **facts}


def print_story(moments: Sequence[Record]) -> None:
    """What happened, a row each."""
    click.echo()
    print_table([_summarize(told) for told in moments])


def _summarize(told: Record) -> Record:
    """A moment as a row: its facts by name, as far as they say anything."""
    facts = {name: render_cell(value) for name, value in told.items() if value and name not in _FOR_PROGRAMS}
    words = " · ".join(f"{name} {text[:_FACT_CHARACTERS_MAX]}" for name, text in facts.items())
    return {"time (UTC)": told["at"], "what": told["what"], "facts": words}
