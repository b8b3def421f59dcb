"""Moving payouts: the next state, the entry that resolves a hold, the event and its callback, and what is due; all in one.

Whoever decides holds the locks: due rows, payouts, then the accounts of those that end.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final
from uuid import UUID

from common.db.callbacks import Event, append_events
from common.db.due import reschedule_due
from common.db.engine import Tx
from common.db.ledger import LockedAccount
from common.db.payouts import LockedPayout, Move, save_moves
from common.domain.ids import new_id
from common.domain.ledger import EntryKind
from common.domain.payout import State
from common.domain.telling import event_type, open_payout_event


@dataclass(frozen=True, slots=True)
class Conclusion:
    """What shall become of a payout: the next state (None: it stays) and the seconds until it is due again (None: never).

    `passing`: the state that it passes through on its way, for this transaction only.
    """

    state: State | None
    delay_seconds: float | None
    failure_code: str | None = None
    passing: State | None = None


# Of the final states; any other gives the money back that was held.
_ENTRY_KINDS: Final = {State.SUCCESS: EntryKind.CAPTURE, State.REFUNDED: EntryKind.PAYOUT_RETURN}


async def carry_out(
    tx: Tx,
    concluded: Sequence[tuple[LockedPayout, Conclusion]],
    accounts: Mapping[int, LockedAccount],
    provider_references: Mapping[UUID, str | None],
) -> list[Event]:
    """Carry conclusions out, and return the events that came of it.

    Locks: the caller holds the due rows and the payouts, and in `accounts` the accounts of all that end.
    """
    through = {
        payout.id: replace(payout, state=conclusion.passing, version=payout.version + 1)
        for payout, conclusion in concluded
        if conclusion.passing is not None
    }
    await save_moves(tx, [Move(payout, through[payout.id].state) for payout, _ in concluded if payout.id in through])
    concluded = [(through.get(payout.id, payout), conclusion) for payout, conclusion in concluded]
    moves = []
    for payout, conclusion in concluded:
        if conclusion.state is None:
            continue
        entry = None
        if conclusion.state.is_final:
            kind = _ENTRY_KINDS.get(conclusion.state, EntryKind.RELEASE)
            entry = accounts[payout.account_id].account.append(kind, payout.amount_minor)
        moves.append(Move(payout, conclusion.state, conclusion.failure_code, provider_references.get(payout.id), entry))
    # It also takes those that end from what is due.
    await save_moves(tx, moves)
    events = list(_events(moves))
    await append_events(tx, events)
    await reschedule_due(
        tx,
        {payout.id: c.delay_seconds for payout, c in concluded if c.delay_seconds is not None},
        verifying=[payout.id for payout, c in concluded if (c.state or payout.state) is State.VERIFYING],
    )
    return events


def _events(moves: Iterable[Move]) -> Iterable[Event]:
    for move in moves:
        if move.state.is_final:
            yield event_of(move.payout, move.state, move.failure_code, sequence=move.version)


def event_of(payout: LockedPayout, state: State, failure_code: str | None, *, sequence: int) -> Event:
    """What is told of the end of a payout."""
    return Event(
        id=new_id(),
        shop_id=payout.shop_id,
        payout_id=payout.id,
        sequence=sequence,
        type=event_type(state),
        opening=open_payout_event(
            payout_id=payout.id,
            external_id=payout.external_id,
            shop_code=payout.shop_code,
            state=state,
            amount_minor=payout.amount_minor,
            currency=payout.currency,
            currency_exponent=payout.currency_exponent,
            sequence=sequence,
            failure_code=failure_code,
        ),
        url=payout.callback_url or payout.webhook_url,
        traceparent=payout.traceparent,
    )
