"""`payouts parked`: messages that nobody could read, or that the broker gave up delivering. They are pointers, never money."""

import asyncio
import base64
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final

import click
from aio_pika.abc import AbstractChannel
from aio_pika.exceptions import PublishError
from aiormq.exceptions import ChannelAccessRefused, ChannelNotFoundEntity
from rich.console import Console
from rich.progress import track

from common.db.engine import Engine, in_transaction
from common.db.ledger import append_audit
from common.domain.ids import EVENT, PAYOUT, render_id
from common.errors import UnreadableMessage
from common.messaging.codec import parse_work
from common.messaging.parking import (
    Judge,
    Parked,
    UndecodableParked,
    Verdict,
    count_parked,
    drop_undecodable,
    judge_parked,
)
from common.messaging.topology import Topology, Work
from ops.cli.broker import broker_connection
from ops.cli.connect import read_settings, run_changing, run_explained
from ops.cli.errors import CheckFailed, Refused
from ops.cli.options import actor_option, json_option, reason_option
from ops.cli.output import Record, show_record, show_records

_OPEN_SECONDS: Final = 10.0
_BEHIND: Final = "behind these is one that cannot be decoded; `payouts parked drop --undecodable` forgets it"
_BODY_CHARACTERS_SHOWN: Final = 8 * 1024
_PREFIXES: Final = {Work.SETTLE: PAYOUT, Work.CALLBACK: EVENT}

_DONE: Final = {"replay": "replayed", "drop": "dropped"}

all_option = click.option("--all", "everything", is_flag=True, help="Every parked message.")


@click.group("parked")
def parked_group() -> None:
    """Messages that nobody could read, or that were delivered too often.

    They name payouts and callbacks that the database knows: none is lost with a message, whatever becomes of it.
    """


@parked_group.command("list")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="How many at most.")
@json_option
def list_parked_command(limit: int, as_json: bool) -> None:
    """List parked messages, the oldest first."""
    parked = [message for message, _ in _look(lambda _: Verdict.KEEP, messages_max=limit)]
    show_records("parked", map(_summarize, parked), as_json=as_json)


@parked_group.command("show")
@click.argument("message_id", metavar="ID")
@json_option
def show_parked_command(message_id: str, as_json: bool) -> None:
    """Show one parked message: headers, body, and what it asks for if it can be read."""
    found: list[Parked] = []

    def judge(message: Parked) -> Verdict | None:
        if message.id == message_id:
            found.append(message)
        return None if found else Verdict.KEEP

    _look(judge)
    if not found:
        raise Refused(f"no message {message_id} is parked")
    show_record(_describe(found[0]), as_json=as_json)


@parked_group.command("replay")
@click.argument("message_ids", metavar="[ID]...", nargs=-1)
@all_option
@reason_option
@actor_option
@json_option
def replay_parked_command(
    message_ids: tuple[str, ...], everything: bool, reason: str, actor: str, as_json: bool
) -> None:
    """Send messages on to the queue they came from, again. What can still not be read is parked again."""

    def judge(topology: Topology) -> Judge:
        queues = {queue for work in Work for queue in topology.queues(work)}
        return lambda message: Verdict.REPLAY if message.queue in queues else Verdict.KEEP

    _change("replay", judge, message_ids, everything=everything, reason=reason, actor=actor, as_json=as_json)


@parked_group.command("drop")
@click.argument("message_ids", metavar="[ID]...", nargs=-1)
@all_option
@click.option("--undecodable", is_flag=True, help="The first message that no client library can decode, unseen.")
@reason_option
@actor_option
@json_option
def drop_parked_command(
    message_ids: tuple[str, ...], everything: bool, undecodable: bool, reason: str, actor: str, as_json: bool
) -> None:
    """Forget messages. The payouts and callbacks that they name are found by the workers' scan."""
    if undecodable:
        if everything or message_ids:
            raise click.UsageError("--undecodable stands alone")
        run_changing(lambda engine: _drop_undecodable(engine, reason=reason, actor=actor))
        show_record({"dropped": 1, "kept": 0}, as_json=as_json)
        return
    _change(
        "drop",
        lambda _: lambda _: Verdict.DROP,
        message_ids,
        everything=everything,
        reason=reason,
        actor=actor,
        as_json=as_json,
    )


def _look(judge: Judge, *, messages_max: int | None = None) -> list[tuple[Parked, Verdict]]:
    """What is parked, the oldest first."""

    async def work() -> list[tuple[Parked, Verdict]]:
        async with _parking() as (channel, topology, count):
            wanted = count if messages_max is None else min(count, messages_max)
            try:
                return await judge_parked(channel, topology, judge, messages_max=wanted)
            except UndecodableParked as error:
                click.echo(f"payouts parked: {_BEHIND}", err=True)
                return error.judged

    return run_explained(work())


async def _drop_undecodable(engine: Engine, *, reason: str, actor: str) -> None:
    async with _parking() as (channel, topology, count):
        try:
            await judge_parked(channel, topology, lambda _: Verdict.KEEP, messages_max=count)
            raise Refused("every parked message can be decoded")
        except UndecodableParked as error:
            behind = len(error.judged)
    await in_transaction(
        engine,
        lambda tx: append_audit(
            tx,
            actor=actor,
            action="parked.drop",
            subject=topology.parked,
            reason=reason,
            detail={"messages": "undecodable"},
        ),
        attempts_max=1,
    )
    settings = read_settings()
    async with broker_connection(settings) as holding, broker_connection(settings) as taking:
        if not await drop_undecodable(holding, taking, topology, behind=behind, of=count):
            raise Refused("somebody else is at work on the parked messages; repeat the command")


def _change(
    verb: str,
    judge_of: Callable[[Topology], Judge],
    message_ids: Sequence[str],
    *,
    everything: bool,
    reason: str,
    actor: str,
    as_json: bool,
) -> None:
    """Write down what was asked, do it to these messages or to all, and tell how it went."""
    if everything == bool(message_ids):
        raise click.UsageError("name the messages, or say --all")

    async def work(engine: Engine) -> list[tuple[Parked, Verdict]]:
        async with _parking() as (channel, topology, count):
            judge = judge_of(topology)
            detail = {"messages": "all" if everything else list(message_ids)}
            await in_transaction(
                engine,
                lambda tx: append_audit(
                    tx, actor=actor, action=f"parked.{verb}", subject=topology.parked, reason=reason, detail=detail
                ),
                attempts_max=1,
            )
            # Not longer than what was there: what cannot be read comes back, to the end of the queue.
            console = Console(stderr=True, quiet=not sys.stderr.isatty())
            turns = iter(track(range(count), verb, console=console, transient=True))

            unseen = set(message_ids)

            def judge_wanted(message: Parked) -> Verdict | None:
                if not everything and not unseen:
                    return None
                next(turns)
                unseen.discard(message.id)
                return judge(message) if everything or message.id in message_ids else Verdict.KEEP

            try:
                return await judge_parked(channel, topology, judge_wanted, messages_max=count)
            except UndecodableParked as error:
                stopped.append(_BEHIND)
                return error.judged

    stopped: list[str] = []
    judged = run_changing(work)
    kept = [m for m, verdict in judged if verdict is Verdict.KEEP and (everything or m.id in message_ids)]
    done = sum(verdict is not Verdict.KEEP for _, verdict in judged)
    show_record({_DONE[verb]: done, "kept": len(kept)}, as_json=as_json)
    missing = [name for name in message_ids if name not in {message.id for message, _ in judged}]
    complaints = [f"not parked, or looked at by somebody else: {', '.join(missing)}"] if missing else []
    complaints += [f"nobody knows where to send: {', '.join(m.id for m in kept)}"] if kept else []
    complaints += stopped
    if complaints:
        raise CheckFailed("; ".join(complaints))


def count_parked_now() -> int:
    """How many messages are parked. Raises: `Refused` when the broker has no queue for them, `Unreachable`."""

    async def work() -> int:
        async with _parking() as (_, _, count):
            return count

    return run_explained(work())


@asynccontextmanager
async def _parking() -> AsyncIterator[tuple[AbstractChannel, Topology, int]]:
    """A channel with confirms and returns, the names, and how many messages are parked. Raises: `Refused`, `Unreachable`."""
    settings = read_settings()
    topology = Topology(settings.amqp_queue_prefix, settings.amqp_shards)
    async with broker_connection(settings) as connection:
        try:
            async with asyncio.timeout(_OPEN_SECONDS):
                channel = await connection.channel(on_return_raises=True)
                count = await count_parked(channel, topology)
        except ChannelNotFoundEntity:
            raise Refused(f"the broker has no queue {topology.parked}; a gateway or worker makes it") from None
        try:
            yield channel, topology, count
        except ChannelAccessRefused as error:
            raise Refused(f"this login may not do it: {error}") from error
        except PublishError as error:
            raise Refused("a message found no queue and stays parked: `payouts doctor` tells more") from error


def _summarize(message: Parked) -> Record:
    return {
        "id": message.id,
        "reason": message.reason,
        "from": message.queue,
        "type": message.type,
        "bytes": len(message.body),
        "parked_at": message.parked_at,
    }


def _describe(message: Parked) -> Record:
    return {
        **_summarize(message),
        "asks_for": _read(message),
        "headers": {name: repr(value) for name, value in message.headers.items()},
        "body": _render_body(message.body),
    }


def _read(message: Parked) -> list[str] | None:
    """The payouts or events that it names, if it can be read."""
    with suppress(UnreadableMessage):
        work = parse_work(message.type, message.body, message.headers)
        return [render_id(_PREFIXES[work.work], value) for value in work.ids]
    return None


def _render_body(body: bytes) -> str:
    """As text if it is text; base64 else. A stranger may have written it."""
    try:
        text = body.decode()
    except UnicodeDecodeError:
        text = f"base64:{base64.b64encode(body).decode()}"
    return text[:_BODY_CHARACTERS_SHOWN]
