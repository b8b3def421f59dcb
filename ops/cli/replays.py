"""`payouts callbacks replay`: many callbacks sent again, at a rate; whoever is interrupted goes on where it ended."""

import asyncio
from datetime import datetime
from functools import partial
from time import monotonic
from typing import Final
from uuid import UUID

import click

from common.db.engine import Engine, Tx, in_transaction
from common.db.ledger import append_audit
from common.db.replays import Chosen, Replay, begin_replay, find_page, has_replay, replay_page
from common.domain.addresses import origin_of
from common.domain.ids import new_id
from ops.cli.connect import run_changing, run_connected
from ops.cli.errors import Refused
from ops.cli.options import (
    actor_option,
    json_option,
    merchant_option,
    parse_moment,
    parse_shop,
    parse_uuid,
    reason_option,
)
from ops.cli.output import progress_bar, show_record
from ops.onboarding import check_party

STATES: Final = ("exhausted", "rejected", "delivered")
# Pages of a tenth of a second, so that a rate is kept without bursts; and none so long that others wait for its rows.
_PAGES_PER_SECOND: Final = 10
_PAGE_ROWS_MAX: Final = 500


def parse_origin(text: str) -> str:
    """The origin of a URL."""
    try:
        return origin_of(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not the URL of a receiver") from error


def parse_replay_id(text: str) -> UUID:
    """The id of a replay, as the command that began it shows it."""
    replay_id = parse_uuid(text)
    if replay_id is None:
        raise click.BadParameter(f"{text!r} is not the id of a replay")
    return replay_id


@click.command("replay")
@click.option("--state", type=click.Choice(STATES), default="exhausted", show_default=True, help="In this state.")
@merchant_option
@click.option("--shop", type=parse_shop, metavar="MERCHANT/SHOP", help="Of this shop only.")
@click.option("--origin", type=parse_origin, metavar="URL", help="To this scheme, host and port only.")
@click.option("--since", type=parse_moment, metavar="TIME", help="Created then or later; ISO 8601, in UTC.")
@click.option("--until", type=parse_moment, metavar="TIME", help="Created before then.")
@click.option("--per-second", type=click.IntRange(1, 100_000), default=50, show_default=True, help="How fast.")
@click.option("--dry-run", is_flag=True, help="Only count them.")
@reason_option
@actor_option
@json_option
def replay_command(
    state: str,
    merchant: str | None,
    shop: tuple[str, str] | None,
    origin: str | None,
    since: datetime | None,
    until: datetime | None,
    per_second: int,
    dry_run: bool,
    reason: str,
    actor: str,
    as_json: bool,
) -> None:
    """Send callbacks again, each once: the same bytes, from the start of the schedule.

    Interrupted, `payouts callbacks resume` goes on where it ended.
    """
    if merchant is not None and shop is not None and shop[0] != merchant:
        raise click.UsageError(f"--shop is one of {shop[0]}, and --merchant is {merchant}")
    if since is not None and until is not None and since >= until:
        raise click.UsageError("--since must be before --until")
    merchant, code = shop or (merchant, None)
    chosen = Chosen(state=state, merchant=merchant, shop=code, origin=origin, since=since, until=until)
    count = run_connected(lambda engine: _count(engine, chosen))
    if dry_run:
        show_record({"would_be_sent": count}, as_json=as_json)
        return
    replay_id = new_id()

    async def begin(tx: Tx) -> None:
        await begin_replay(tx, replay_id, chosen, per_second=per_second, actor=actor, reason=reason)
        await append_audit(tx, actor=actor, action="callback.replay", subject=str(replay_id), reason=reason)

    # Before it begins: whoever does not hear whether it has can go on with it all the same.
    click.echo(f"replay {replay_id} of {count} callbacks", err=True)
    run_changing(lambda engine: in_transaction(engine, begin, attempts_max=1))
    _go_on(replay_id, count, as_json=as_json)


@click.command("resume")
@click.argument("replay_id", type=parse_replay_id)
@reason_option
@actor_option
@json_option
def resume_command(replay_id: UUID, reason: str, actor: str, as_json: bool) -> None:
    """Go on with a replay that was interrupted, where it ended."""

    async def note(tx: Tx) -> None:
        if not await has_replay(tx, replay_id):
            raise Refused(f"there is no replay {replay_id}")
        await append_audit(tx, actor=actor, action="callback.replay_resumed", subject=str(replay_id), reason=reason)

    run_changing(lambda engine: in_transaction(engine, note, attempts_max=1))
    _go_on(replay_id, None, as_json=as_json)


async def _count(engine: Engine, chosen: Chosen) -> int:
    """How many callbacks a replay would send again now."""
    count, behind = 0, None
    await in_transaction(engine, partial(check_party, merchant=chosen.merchant, shop=chosen.shop))
    with progress_bar() as progress:
        task = progress.add_task("callbacks that match", total=None)
        while True:
            page = await in_transaction(engine, partial(find_page, chosen=chosen, behind=behind))
            count, behind = count + len(page.event_ids), page.behind
            progress.update(task, completed=count)
            if behind is None:
                return count


def _is_interrupted() -> bool:
    """Whether somebody has asked for the end of what we are doing."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _go_on(replay_id: UUID, count: int | None, *, as_json: bool) -> None:
    async def work(engine: Engine) -> Replay:
        rows_max, started, before = 1, monotonic(), None
        with progress_bar() as progress:
            task = progress.add_task("callbacks", total=count)
            while True:
                replay = await in_transaction(engine, partial(replay_page, replay_id=replay_id, rows_max=rows_max))
                if replay is None:
                    raise Refused(f"there is no replay {replay_id}")
                done = replay.sent + replay.passed_over
                progress.update(task, completed=done)
                if _is_interrupted():
                    # An interruption that met the end of a transaction can be lost on its way to us.
                    raise asyncio.CancelledError
                if replay.finished:
                    return replay
                before = done - rows_max if before is None else before
                rows_max = min(max(1, replay.per_second // _PAGES_PER_SECOND), _PAGE_ROWS_MAX)
                await asyncio.sleep(max(0.0, started + (done - before) / replay.per_second - monotonic()))

    replay = run_changing(work)
    show_record({"replay": replay_id, "sent": replay.sent, "passed_over": replay.passed_over}, as_json=as_json)
