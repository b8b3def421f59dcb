"""`payouts lane`: where callbacks wait, and whether they may leave."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from uuid import UUID

import click
from sqlalchemy import Row

from common.db.engine import Tx, in_transaction
from common.db.lane_upkeep import WAITING_COUNTED_MAX, hold_lane, list_lanes, release_lane
from common.db.ledger import append_audit
from ops.cli.connect import run_changing, run_connected
from ops.cli.errors import Refused
from ops.cli.options import actor_option, json_option, merchant_option, parse_uuid, reason_option
from ops.cli.output import Record, show_record, show_records
from ops.onboarding import check_party


@click.group("lane")
def lane_group() -> None:
    """Where callbacks wait: one lane for each shop and origin."""


def parse_lane_id(text: str) -> UUID:
    """A lane's id, as `payouts lane list` shows it."""
    lane_id = parse_uuid(text)
    if lane_id is None:
        raise click.BadParameter(f"{text!r} is not the id of a lane")
    return lane_id


@lane_group.command("list")
@merchant_option
@click.option("--troubled", is_flag=True, help="Only those that are held, left in peace, or coming back.")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="How many at most.")
@json_option
def list_lanes_command(merchant: str | None, troubled: bool, limit: int, as_json: bool) -> None:
    """List lanes: how fast each may go, what is in flight and what waits."""

    async def work(tx: Tx) -> Sequence[Any]:
        await check_party(tx, merchant)
        return await list_lanes(tx, merchant=merchant, troubled=troubled, rows_max=limit)

    rows = run_connected(lambda engine: in_transaction(engine, work))
    show_records("lanes", map(_describe, rows), as_json=as_json)


@lane_group.command("hold")
@click.argument("lane_id", type=parse_lane_id)
@reason_option
@actor_option
@json_option
def hold_lane_command(lane_id: UUID, reason: str, actor: str, as_json: bool) -> None:
    """Send nothing more through LANE_ID until it is released. Its callbacks are kept; what is in flight ends by itself."""
    _change(
        lane_id,
        lambda tx: hold_lane(tx, lane_id, reason=reason),
        refusal="there is no such lane, or it is held already",
        action="lane.hold",
        reason=reason,
        actor=actor,
    )
    show_record({"lane": lane_id, "state": "held"}, as_json=as_json)


@lane_group.command("release")
@click.argument("lane_id", type=parse_lane_id)
@reason_option
@actor_option
@json_option
def release_lane_command(lane_id: UUID, reason: str, actor: str, as_json: bool) -> None:
    """Let LANE_ID go on, held or left in peace: slowly at first, as a lane that nobody knows."""
    _change(
        lane_id,
        lambda tx: release_lane(tx, lane_id),
        refusal="there is no such lane",
        action="lane.release",
        reason=reason,
        actor=actor,
    )
    show_record({"lane": lane_id, "state": "open"}, as_json=as_json)


def _change(
    lane_id: UUID, change: Callable[[Tx], Awaitable[bool]], *, refusal: str, action: str, reason: str, actor: str
) -> None:
    async def work(tx: Tx) -> None:
        if not await change(tx):
            raise Refused(refusal)
        await append_audit(tx, actor=actor, action=action, subject=str(lane_id), reason=reason)

    run_changing(lambda engine: in_transaction(engine, work, attempts_max=1))


def _describe(lane: Row[*tuple[Any, ...]]) -> Record:
    state = (
        "held" if lane.held_at else "left in peace" if lane.rests_until else "failing" if lane.failing_since else "open"
    )
    return {
        "lane": lane.id,
        "merchant": lane.merchant,
        "shop": lane.shop,
        "origin": lane.origin,
        "state": state,
        "until": lane.rests_until,
        "why": lane.held_reason,
        "in_flight": lane.in_flight,
        "at_most": lane.cap,
        "latency_ms": lane.latency_ms,
        "waiting": f"{lane.waiting}+" if lane.waiting == WAITING_COUNTED_MAX else lane.waiting,
        "failing_since": lane.failing_since,
    }
