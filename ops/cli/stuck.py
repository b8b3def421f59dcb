"""`payouts stuck`: everything that is older than it should be, in one table, and what to do about it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, Final

import click

from common.db.engine import Engine, in_transaction
from common.db.stuck import COUNTED_MAX, Stuck, TooOld, find_stuck
from common.domain.ids import EVENT, PAYIN, PAYOUT, render_id
from ops.cli.connect import READONLY, read_settings, run_connected
from ops.cli.errors import CheckFailed, Refused, Unreachable
from ops.cli.options import json_option, parse_duration
from ops.cli.output import Record, print_json, print_table
from ops.cli.parked import count_parked_now

_AGE_SECONDS_MAX: Final = 30 * 86_400


@dataclass(frozen=True, slots=True)
class _Advice:
    """What is stuck, in words, and what helps; `{id}` and `{shop}` are filled in. `render`: how its id is written."""

    what: str
    do: str
    render: Callable[[Any], str] = str


_PAYOUT, _PAYIN, _EVENT = (partial(render_id, prefix) for prefix in (PAYOUT, PAYIN, EVENT))
_RESOLVE: Final = (
    "payouts payout show {id}, ask the bank, then payouts payout resolve {id} --success|--failed --evidence …"
)

ADVICE: Final[dict[str, _Advice]] = {
    "payouts_not_taken": _Advice("payouts that are due", "start workers: python -m worker settle; payouts doctor"),
    "payout_lease_lapsed": _Advice(
        "payouts whose worker is gone", "start workers: python -m worker settle; payouts doctor"
    ),
    "shop_frozen": _Advice("payouts of a frozen shop", "payouts shop unfreeze {shop} --reason …"),
    "rail_off": _Advice("payouts whose rail is off", "payouts rail on {id} --reason …"),
    "rail_gone": _Advice("payouts whose rail is gone", "start workers: python -m worker settle ends them"),
    "payout_verifying": _Advice("payout that is verifying", _RESOLVE, _PAYOUT),
    "payout_without_word": _Advice(
        "payout whose rail says no last word", "payouts payout show {id}, then ask the bank", _PAYOUT
    ),
    "discrepancy_open": _Advice("discrepancy", "look into it, then payouts discrepancies close {id} --reason …"),
    "resolution_open": _Advice(
        "word of one operator",
        "another operator: payouts payout resolve {id} --success|--failed|--withdraw --evidence …",
        _PAYOUT,
    ),
    "rail_event_not_applied": _Advice(
        "word of a rail that nobody could apply",
        "start workers: python -m worker settle; a refund waits until the account can bear it (payouts balance topup)",
    ),
    "payins_not_asked": _Advice("payins nobody asks about", "start workers: python -m worker settle; payouts doctor"),
    "rail_off_for_payins": _Advice("payins whose rail is off", "payouts rail on {id} --reason …"),
    "payin_undecided": _Advice("payin past its end", "payouts payin show {id}, then ask the bank", _PAYIN),
    "callback_lease_lapsed": _Advice(
        "callback whose worker is gone", "start workers: python -m worker callbacks; payouts doctor", _EVENT
    ),
    "callback_put_aside": _Advice(
        "callback that was put aside", "find out why workers die, then payouts callbacks resend {id} --reason …", _EVENT
    ),
    "callbacks_not_taken": _Advice(
        "lane whose turn has come", "start workers: python -m worker callbacks; payouts doctor"
    ),
    "lane_held": _Advice("lane that is held", "payouts lane release {id} --reason …, once its server is well"),
    "parked": _Advice("messages nobody could read", "payouts parked list, then payouts parked replay|drop"),
    "broker": _Advice("broker out of reach", "payouts doctor"),
}


@click.command("stuck")
@click.option(
    "--overdue",
    "overdue_seconds",
    type=parse_duration(_AGE_SECONDS_MAX),
    default="5m",
    show_default=True,
    metavar="AGE",
    help="Too old for what is due: 90s, 30m, 24h or 7d.",
)
@click.option(
    "--doubt",
    "doubt_seconds",
    type=parse_duration(_AGE_SECONDS_MAX),
    default="1h",
    show_default=True,
    metavar="AGE",
    help="Too old for a fate that is not known.",
)
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="Of each kind at most.")
@json_option
def stuck_command(overdue_seconds: int, doubt_seconds: int, limit: int, as_json: bool) -> None:
    """List what does not go on by itself, and what to do about each: payouts, payins, callbacks, lanes, doubts, messages.

    Exit code 0 when there is nothing, 1 when there is something.
    """
    limits = TooOld(float(overdue_seconds), float(doubt_seconds))
    found = run_connected(lambda engine: _find(engine, limits, limit + 1), role=READONLY)
    shown, more = _cut(found, limit)
    records = [*map(_describe, shown), *_look_at_broker()]
    if as_json:
        print_json({"stuck": records, "more": more})
    else:
        print_table(records)
    if records:
        behind = f"; there are more of: {', '.join(more)} (--limit)" if more else ""
        raise CheckFailed(f"{len(records)} stuck{behind}")


async def _find(engine: Engine, limits: TooOld, rows_max: int) -> list[Stuck]:
    return list(await in_transaction(engine, lambda tx: find_stuck(tx, limits, now=time.time(), rows_max=rows_max)))


def _cut(found: list[Stuck], limit: int) -> tuple[list[Stuck], list[str]]:
    """At most `limit` for each reason, and the reasons of which there are more."""
    kept: dict[str, list[Stuck]] = {}
    for stuck in found:
        kept.setdefault(stuck.reason, []).append(stuck)
    more = [reason for reason, rows in kept.items() if len(rows) > limit]
    return [stuck for rows in kept.values() for stuck in rows[:limit]], more


def _describe(stuck: Stuck) -> Record:
    advice = ADVICE[stuck.reason]
    rendered = advice.render(stuck.subject)
    count = None if stuck.count is None else f"{stuck.count}{'+' if stuck.count == COUNTED_MAX else ''} of them"
    return _record(stuck.reason, rendered, stuck.shop, stuck.since, stuck.note or count)


def _record(reason: str, subject: str | None, shop: str | None, since: datetime | None, note: str | None) -> Record:
    advice = ADVICE[reason]
    return {
        "reason": reason,
        "what": advice.what,
        "id": subject,
        "shop": shop,
        "since": since,
        "note": note,
        "do": advice.do.format(id=subject, shop=shop),
    }


def _look_at_broker() -> list[Record]:
    """Parked messages, or that nobody can tell; nothing where there is no broker, or no queue for them yet."""
    if not read_settings().amqp_urls:
        return []
    try:
        count = count_parked_now()
    except Unreachable as error:
        return [_record("broker", None, None, None, error.message)]
    except Refused:
        return []
    return [_record("parked", None, None, None, f"{count} of them")] if count else []
