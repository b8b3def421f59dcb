"""Resolving: two operators say with evidence how a payout ended that no rail tells of.

Their word is heard like a rail's, by whoever listens: it moves a payout that is verifying, and nothing else.
"""

from dataclasses import dataclass
from uuid import UUID

from common.db.engine import Tx
from common.db.ledger import append_audit
from common.db.rail_events import OPERATORS, NewRailEvent, append_rail_events
from common.db.resolutions import (
    OpenResolution,
    append_resolution,
    close_resolution,
    find_reference,
    lock_open_resolution,
)
from common.domain.ids import PAYOUT, new_id, render_id
from common.domain.payout import State


class ResolutionRefused(Exception):
    """Nothing was changed; the text says why."""


@dataclass(frozen=True, slots=True)
class Doubtful:
    """A payout as operators found it."""

    id: UUID
    shop_id: UUID
    state: State


@dataclass(frozen=True, slots=True)
class Resolved:
    """What came of it. `state`: `open` for the other operator, `confirmed`, or `withdrawn`; actors as far as there are."""

    id: UUID
    outcome: str
    state: str
    opened_by: str
    closed_by: str | None = None


async def resolve(tx: Tx, payout: Doubtful, *, outcome: str, evidence: str, actor: str) -> Resolved:
    """Say that a payout was `paid` or `declined`: the first operator's word waits for the second's, who must say the same.

    Raises: `ResolutionRefused`; `IntegrityError` when another operator opens one at the same time.
    """
    if payout.state is not State.VERIFYING:
        raise ResolutionRefused(f"the payout is {payout.state}; people resolve only what is verifying")
    known = await lock_open_resolution(tx, payout.id)
    if known is None:
        return await _open(tx, payout, outcome, evidence, actor)
    if known.outcome != outcome:
        raise ResolutionRefused(f"{known.actor} said {known.outcome}: agree, or withdraw it first")
    if known.actor.casefold() == actor.casefold():
        raise ResolutionRefused(f"{known.actor} has said so already: another operator must confirm it")
    await _close(tx, payout, known, evidence=evidence, actor=actor, is_confirmed=True)
    word = NewRailEvent(rail=OPERATORS, event_id=str(known.id), reference=known.reference, outcome=outcome)
    await append_rail_events(tx, [word])
    return Resolved(known.id, outcome, "confirmed", known.actor, actor)


async def withdraw(tx: Tx, payout: Doubtful, *, evidence: str, actor: str) -> Resolved:
    """Take back what one operator said and nobody confirmed. Raises: `ResolutionRefused`."""
    known = await lock_open_resolution(tx, payout.id)
    if known is None:
        raise ResolutionRefused("no resolution of this payout is open")
    await _close(tx, payout, known, evidence=evidence, actor=actor, is_confirmed=False)
    return Resolved(known.id, known.outcome, "withdrawn", known.actor, actor)


async def _open(tx: Tx, payout: Doubtful, outcome: str, evidence: str, actor: str) -> Resolved:
    resolution_id = new_id()
    audit_id = await append_audit(
        tx,
        actor=actor,
        action="payout.resolve",
        subject=render_id(PAYOUT, payout.id),
        reason=evidence,
        detail={"resolution_id": str(resolution_id), "outcome": outcome},
    )
    await append_resolution(
        tx,
        resolution_id=resolution_id,
        payout_id=payout.id,
        shop_id=payout.shop_id,
        reference=await find_reference(tx, payout.id, payout.shop_id),
        outcome=outcome,
        audit_id=audit_id,
    )
    return Resolved(resolution_id, outcome, "open", actor)


async def _close(
    tx: Tx, payout: Doubtful, known: OpenResolution, *, evidence: str, actor: str, is_confirmed: bool
) -> None:
    audit_id = await append_audit(
        tx,
        actor=actor,
        action="payout.confirm" if is_confirmed else "payout.withdraw",
        subject=render_id(PAYOUT, payout.id),
        reason=evidence,
        detail={"resolution_id": str(known.id), "outcome": known.outcome},
    )
    await close_resolution(tx, known.id, audit_id=audit_id, is_confirmed=is_confirmed)
