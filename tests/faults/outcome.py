"""How a load must have ended, whatever went wrong: nothing a client was told is untrue, no money is lost or paid twice."""

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Final

from common.db.engine import Engine
from common.domain.ids import PAYOUT, render_id
from common.domain.money import parse_amount
from tests.factories import Merchant, execute, fetch
from tests.faults.load import ENDS, Sent, assert_told_truly
from tests.faults.merchants import assert_invariants
from tests.faults.receiver import Receiver
from tests.stack import eventually

# What each merchant of a load has when it begins.
FUNDS: Final = "100000.00"


async def assert_whole(owner: Engine, merchants: Sequence[Merchant], sent: Sequence[Sent], endpoint: Receiver) -> None:
    """Everything that was accepted ends, is told, and agrees with what clients, rail and ledger say; once each."""
    rows = await settle_all(owner)
    await deliver_all(owner)
    for item in sent:
        assert_told_truly(item)
    await assert_stored_once(owner, sent, rows)
    assert_ended_as_the_recipient_says(sent, rows)
    await assert_rail_agrees(owner)
    await assert_money(owner, merchants, rows)
    assert_all_told(sent, rows, endpoint)
    await assert_invariants(owner)


async def settle_all(owner: Engine) -> dict[tuple[Any, str], Any]:
    """Help time along until every payout is final or keeps verifying as 0200 does; payouts by shop and external_id."""

    async def settled() -> bool:
        await execute(
            owner,
            "UPDATE payout_due d SET due_at = now() FROM payouts p WHERE p.id = d.payout_id AND d.lease_token IS NULL"
            " AND d.due_at > now() AND (p.state IN ('queued', 'submitted')"
            " OR (p.state = 'verifying' AND p.recipient_masked NOT LIKE '%0200'))",
        )
        (row,) = await fetch(
            owner,
            "SELECT count(*) AS n FROM payouts WHERE resolution_seq IS NULL"
            " AND NOT (state = 'verifying' AND recipient_masked LIKE '%0200')",
        )
        return bool(row.n == 0)

    await eventually(settled, "every payout is settled", 40)
    rows = await fetch(
        owner,
        """
        SELECT p.*, (SELECT array_agg(a.action || ' ' || coalesce(a.outcome, '-') ORDER BY a.attempt_no)
                       FROM payout_attempts a WHERE a.payout_id = p.id) AS attempts
          FROM payouts p
        """,
    )
    return {(row.shop_id, row.external_id): row for row in rows}


async def deliver_all(owner: Engine) -> None:
    """Help time along until every callback is delivered, in lanes too that rest since a stall looked like a dead receiver."""

    async def delivered() -> bool:
        await execute(
            owner,
            "UPDATE callback_lanes SET trouble = 0, blocked_until = '-infinity', ready_at = now()"
            " WHERE blocked_until > now() AND held_at IS NULL",
        )
        await execute(owner, "UPDATE callback_due SET due_at = now(), in_lane = false WHERE lease_token IS NULL")
        (row,) = await fetch(owner, "SELECT count(*) AS n FROM callbacks WHERE state <> 'delivered'")
        return bool(row.n == 0)

    await eventually(delivered, "every callback is delivered", 30)


async def assert_stored_once(owner: Engine, sent: Sequence[Sent], rows: dict[tuple[Any, str], Any]) -> None:
    """The table is exactly what the clients were told."""
    (count,) = await fetch(owner, "SELECT count(*) AS n FROM payouts")
    assert count.n == len(rows) == len(sent)
    for item in sent:
        row = rows[item.merchant.shop.id, item.fields["external_id"]]
        assert render_id(PAYOUT, row.id) == item.last.body["id"]
        assert row.amount_minor == parse_amount(item.fields["amount"], 2)
        assert (row.currency, row.callback_url) == (item.fields["currency"], item.fields["callback_url"])
        assert row.recipient_masked[-4:] == item.fields["card_number"][-4:]
        assert row.details == {"metadata": item.fields["metadata"]}


def assert_ended_as_the_recipient_says(sent: Sequence[Sent], rows: dict[tuple[Any, str], Any]) -> None:
    """Each payout's end is the sandbox's script, whatever was killed on the way."""
    ends = defaultdict(set)
    for item in sent:
        row = rows[item.merchant.shop.id, item.fields["external_id"]]
        ends[row.recipient_masked[-4:]].add(row.state)
    assert ends == {recipient: {state} for recipient, state in ENDS.items()}


async def assert_rail_agrees(owner: Engine) -> None:
    """Payout by payout: paid if and only if success, declined if and only if failed, amounts equal, nobody unknown to us.

    A payout whose worker died before the call may be verifying while the rail never heard of it.
    """
    disagreements = await fetch(
        owner,
        """
        WITH ours AS (
          SELECT p.id, p.state, p.amount_minor, p.currency, t.reference FROM payouts p
            JOIN LATERAL (SELECT DISTINCT reference FROM payout_attempts WHERE payout_id = p.id) t ON true)
        SELECT o.id, o.state, s.reference, s.state AS rail_state FROM ours o
          FULL JOIN sandbox.payments s ON s.reference = o.reference
         WHERE o.id IS NULL OR (s.reference IS NULL AND o.state <> 'verifying')
            OR (o.amount_minor, o.currency) <> (s.amount_minor, s.currency)
            OR s.state <> CASE o.state WHEN 'success' THEN 'paid' WHEN 'failed' THEN 'declined' ELSE 'absent' END
        """,
    )
    assert not disagreements


async def assert_money(owner: Engine, merchants: Sequence[Merchant], rows: dict[tuple[Any, str], Any]) -> None:
    """What is gone was paid, what is held is verifying, the rest is there."""
    for merchant in merchants:
        own = [row for (shop_id, _), row in rows.items() if shop_id == merchant.shop.id]
        (account,) = await fetch(owner, "SELECT * FROM accounts WHERE shop_id = :id", id=merchant.shop.id)
        funds = parse_amount(FUNDS, 2)
        assert funds is not None
        assert account.posted_minor == funds - sum(row.amount_minor for row in own if row.state == "success")
        assert account.held_minor == sum(row.amount_minor for row in own if row.state == "verifying")


def assert_all_told(sent: Sequence[Sent], rows: dict[tuple[Any, str], Any], endpoint: Receiver) -> None:
    """Every final payout was told to its URL, as it stands, signed; however often, with the same bytes."""
    bodies = defaultdict(set)
    merchants = {item.fields["external_id"]: item.merchant for item in sent}
    told: dict[str, set[str]] = defaultdict(set)
    for delivery in endpoint.deliveries:
        body = json.loads(delivery.body)
        merchant = merchants[body["external_id"]]
        delivery.assert_signed(merchant.webhook_secret)
        bodies[delivery.webhook_id].add(delivery.body)
        told[body["id"]].add(delivery.webhook_id)
        row = rows[merchant.shop.id, body["external_id"]]
        assert (body["id"], body["status"], body["sequence"]) == (render_id(PAYOUT, row.id), row.state, row.version)
    assert {len(versions) for versions in bodies.values()} == {1}
    final = {render_id(PAYOUT, row.id) for row in rows.values() if row.resolution_seq is not None}
    assert set(told) == final
    assert {len(events) for events in told.values()} == {1}
