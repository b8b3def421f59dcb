"""The feed, read while transactions write it that begin, wait, end and fail in any order: nothing is missed, doubled or turned.

Events are written with the guards aside that ask for their payouts; those of the feed are in force.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from uuid import UUID, uuid4

import asyncpg
import pytest
from alembic import command
from alembic.script import ScriptDirectory
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from common.db.engine import Engine, constraint_name, in_transaction, sqlstate
from common.db.feed import FEED_BEGIN, FeedEvent, Place, read_feed
from migrations.run import upgrade
from tests.conftest import Server
from tests.factories import engine, execute
from tests.flows import cloned, forge
from tests.stack import ROOT, eventually

WRITERS, PAYOUTS = 4, 3
SERIALIZATION_FAILURE = "40001"

_INSERT = (
    "INSERT INTO events (id, shop_id, payout_id, sequence, type, body) VALUES ($1, $2, $3, $4, 'payout.success', '{}')"
)


class Reader:
    """A merchant who polls: everything it was told, and the place from which it goes on."""

    def __init__(self, gateway: Engine, shop_id: UUID) -> None:
        self._gateway = gateway
        self._shop_id = shop_id
        self._after = FEED_BEGIN
        self.seen: list[FeedEvent] = []

    async def page(self, rows_max: int = 1) -> Sequence[FeedEvent]:
        """One page; as the feed promises, what comes is behind what came."""
        page = await in_transaction(
            self._gateway,
            lambda tx: read_feed(tx, self._shop_id, after=self._after, with_payins=True, rows_max=rows_max),
        )
        assert page is not None, "the place was read by this very reader"
        places = [self._after, *(each.place for each in page)]
        assert places == sorted(set(places))
        self._after = places[-1]
        self.seen += page
        return page

    async def drain(self) -> None:
        """Page by page, until nothing comes."""
        while await self.page():
            pass

    async def has_seen(self, count: int) -> bool:
        """Go on, and say whether so many events have come by now."""
        await self.drain()
        return len(self.seen) >= count

    @property
    def ids(self) -> list[UUID]:
        """The events in the order in which they came."""
        return [each.place.event_id for each in self.seen]


@dataclass(slots=True)
class Story:
    """What was written of one payout: its events that are committed, in their order."""

    payout_id: UUID = field(default_factory=uuid4)
    committed: list[UUID] = field(default_factory=list)
    held_by: "Writer | None" = None


class Writer:
    """A connection that writes events as a worker does: each payout is its own until its transaction ends."""

    def __init__(self, connection: asyncpg.Connection, shop_id: UUID) -> None:
        self._connection = connection
        self._shop_id = shop_id
        self._transaction: asyncpg.transaction.Transaction | None = None
        self._written: list[tuple[Story, UUID]] = []

    async def begin(self) -> None:
        """Open a transaction and take its id; an open one stays."""
        if self._transaction is None:
            self._transaction = self._connection.transaction()
            await self._transaction.start()
            await self._connection.execute("SELECT pg_current_xact_id()")

    async def write(self, story: Story, *, savepoint: str = "none") -> None:
        """The next event of a payout that nobody else holds. `savepoint`: none, kept or undone.

        When a younger transaction has written the event before, this one fails as a whole.
        """
        if story.held_by not in (None, self):
            return
        await self.begin()
        sequence = 2 + len(story.committed) + sum(each is story for each, _ in self._written)
        event_id = uuid4()
        values = (event_id, self._shop_id, story.payout_id, sequence)
        try:
            if savepoint == "none":
                await self._connection.execute(_INSERT, *values)
            else:
                nested = self._connection.transaction()
                await nested.start()
                await self._connection.execute(_INSERT, *values)
                await (nested.commit() if savepoint == "kept" else nested.rollback())
        except asyncpg.SerializationError:
            await self.end(commit=False)
            return
        if savepoint != "undone":
            story.held_by = self
            self._written.append((story, event_id))

    async def end(self, *, commit: bool) -> None:
        """Commit, or roll back; without a transaction nothing."""
        if self._transaction is None:
            return
        await (self._transaction.commit() if commit else self._transaction.rollback())
        for story, event_id in self._written:
            story.held_by = None
            if commit:
                story.committed.append(event_id)
        self._transaction, self._written = None, []


@dataclass(frozen=True, slots=True)
class Office:
    """A database whose events may be of any payout, connections that write there, and the reader's engine."""

    url: str
    connections: list[asyncpg.Connection]
    gateway: Engine

    def writers(self, shop_id: UUID) -> list[Writer]:
        """One per connection."""
        return [Writer(connection, shop_id) for connection in self.connections]


@asynccontextmanager
async def opened(server: Server, template: str) -> AsyncIterator[Office]:
    """An office for a while."""
    async with cloned(server, template) as url:
        owner = engine(url)
        for guard in ("events_match_payout", "events_match_payin"):
            await execute(owner, f"ALTER TABLE events DISABLE TRIGGER {guard}")
        await owner.dispose()
        connections = [await asyncpg.connect(url) for _ in range(WRITERS)]
        gateway = engine(url, role="payouts_gateway")
        for connection in connections:
            await connection.execute("SET ROLE payouts_worker")
        try:
            yield Office(url, connections, gateway)
        finally:
            await gateway.dispose()
            for connection in connections:
                await connection.close()


@pytest.fixture
async def office(server: Server, template: str) -> AsyncIterator[Office]:
    async with opened(server, template) as office:
        yield office


def _interleavings(left: tuple[int, ...], done: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """Every order in which transactions may make their steps; they begin in the order of their numbers."""
    if not any(left):
        yield done
    for number, steps in enumerate(left):
        began = max(done, default=-1)
        if steps and number <= began + 1:
            yield from _interleavings((*left[:number], steps - 1, *left[number + 1 :]), (*done, number))


INTERLEAVINGS = list(_interleavings((3, 3, 3)))


@pytest.mark.timeout(300)
async def test_three_transactions_in_every_order_leave_no_gap(office: Office) -> None:
    """Each takes its id, writes and commits; after each step somebody reads a page of one."""
    assert len(INTERLEAVINGS) == 280
    for order in INTERLEAVINGS:
        shop_id = uuid4()
        writers, stories = office.writers(shop_id)[:3], [Story() for _ in range(3)]
        reader = Reader(office.gateway, shop_id)
        steps = [
            iter((writer.begin, partial(writer.write, story), partial(writer.end, commit=True)))
            for writer, story in zip(writers, stories, strict=True)
        ]
        for number in order:
            await next(steps[number])()
            await reader.page()
        await eventually(partial(reader.has_seen, 3), f"all events of {order}")
        assert sorted(reader.ids) == sorted(event_id for story in stories for event_id in story.committed), order


_STEPS = st.lists(
    st.tuples(
        st.integers(0, WRITERS - 1),
        st.one_of(
            st.just(("begin", 0, "")),
            st.tuples(st.just("write"), st.integers(0, PAYOUTS - 1), st.sampled_from(["none", "kept", "undone"])),
            st.tuples(st.just("end"), st.sampled_from([0, 1, 1, 1]), st.just("")),
            st.tuples(st.just("read"), st.integers(1, 3), st.just("")),
        ),
    ),
    min_size=15,
    max_size=40,
)

_TOLD_BY_1 = ((1, ("write", 0, "none")), (1, ("end", 1, "")))


def test_whatever_transactions_do_the_feed_tells_all_of_it_once_and_in_order(server: Server, template: str) -> None:
    with asyncio.Runner() as runner:
        opening = opened(server, template)
        office = runner.run(opening.__aenter__())

        # The older transaction writes the later event of a payout; and one of another payout, after somebody has read.
        @example([(0, ("begin", 0, "")), *_TOLD_BY_1, (0, ("write", 0, "none"))])
        @example([(0, ("begin", 0, "")), *_TOLD_BY_1, (0, ("read", 3, "")), (0, ("write", 1, "none"))])
        @settings(
            max_examples=150, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
        )
        @given(_STEPS)
        def check(steps: list[tuple[int, tuple[str, int, str]]]) -> None:
            runner.run(_play(office, steps))

        try:
            check()
        finally:
            runner.run(opening.__aexit__(None, None, None))


async def _play(office: Office, steps: list[tuple[int, tuple[str, int, str]]]) -> None:
    shop_id = uuid4()
    writers, stories = office.writers(shop_id), [Story() for _ in range(PAYOUTS)]
    reader = Reader(office.gateway, shop_id)
    for number, (action, argument, savepoint) in steps:
        if action == "begin":
            await writers[number].begin()
        elif action == "write":
            await writers[number].write(stories[argument], savepoint=savepoint)
        elif action == "end":
            await writers[number].end(commit=bool(argument))
        else:
            await reader.page(argument)
    for writer in writers:
        await writer.end(commit=True)
    committed = [event_id for story in stories for event_id in story.committed]
    await eventually(lambda: reader.has_seen(len(committed)), "everything is told")
    assert sorted(reader.ids) == sorted(committed)
    for story in stories:
        assert [event_id for event_id in reader.ids if event_id in story.committed] == story.committed


async def test_a_transaction_that_stays_open_delays_the_feed_and_loses_nothing(office: Office) -> None:
    shop_id = uuid4()
    slow, quick, *_ = office.writers(shop_id)
    first, second = Story(), Story()
    reader = Reader(office.gateway, shop_id)
    await slow.write(first)
    await quick.write(second)
    await quick.end(commit=True)
    await reader.drain()
    assert reader.seen == [], "what is older is still to come"

    await slow.end(commit=True)

    await eventually(lambda: reader.has_seen(2), "both are told")
    assert reader.ids == first.committed + second.committed


async def test_reading_for_long_delays_nobody(office: Office) -> None:
    shop_id = uuid4()
    writer, other, *_ = office.writers(shop_id)
    reader, story = Reader(office.gateway, shop_id), Story()
    connection = other._connection
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        await connection.fetch("SELECT count(*) FROM events")
        await writer.write(story)
        await writer.end(commit=True)
        await eventually(lambda: reader.has_seen(1), "it is told")


async def test_an_older_transaction_does_not_tell_what_came_after_a_younger_ones_event(office: Office) -> None:
    """It would stand before it: so it is refused as what is repeated, and the repeat has a younger id."""
    shop_id = uuid4()
    older, younger, *_ = office.writers(shop_id)
    reader, story = Reader(office.gateway, shop_id), Story()
    await older.begin()
    await younger.write(story)
    await younger.end(commit=True)

    await older.write(story)
    assert len(story.committed) == 1
    await older.write(story)
    await older.end(commit=True)

    await eventually(lambda: reader.has_seen(2), "both are told")
    assert reader.ids == story.committed


async def test_the_refusal_is_one_that_transactions_are_repeated_for(office: Office) -> None:
    shop_id, payout_id = uuid4(), uuid4()
    worker = engine(office.url, role="payouts_worker")
    insert = text(
        "INSERT INTO events (id, shop_id, payout_id, sequence, type, body)"
        " VALUES (gen_random_uuid(), :shop_id, :payout_id, :sequence, 'payout.success', '{}')"
    )
    values = {"shop_id": shop_id, "payout_id": payout_id}
    async with worker.connect() as older, worker.connect() as younger:
        await older.execute(text("SELECT pg_current_xact_id()"))
        await younger.execute(insert, values | {"sequence": 2})
        await younger.commit()
        with pytest.raises(DBAPIError) as refused:
            await older.execute(insert, values | {"sequence": 3})
    await worker.dispose()
    assert (sqlstate(refused.value), constraint_name(refused.value)) == (SERIALIZATION_FAILURE, "events_in_order")


async def test_a_place_that_no_feed_has_come_to_is_told_from_the_end_of_the_feed(office: Office) -> None:
    """As after a dump was restored on a server that counts anew: silence would go on for years."""
    far = Place(1 << 62, 0, UUID(int=0))

    async def read(after: Place) -> Sequence[FeedEvent] | None:
        return await in_transaction(
            office.gateway, lambda tx: read_feed(tx, uuid4(), after=after, with_payins=True, rows_max=1)
        )

    assert await read(FEED_BEGIN) == []
    assert await read(far) is None


_BEFORE = """
    INSERT INTO events (id, shop_id, payout_id, sequence, type, body)
    SELECT gen_random_uuid(), '{shop}', p.id, s.sequence, 'payout.success', '{{}}'
      FROM (SELECT gen_random_uuid() AS id FROM generate_series(1, 20)) p CROSS JOIN generate_series(4, 3, -1) AS s (sequence)
"""


async def test_what_was_there_before_the_feed_is_told_first_and_in_order(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop_id = uuid4()
    async with cloned(server, "template0") as url:
        scripts = ScriptDirectory(str(ROOT / "migrations"))
        with monkeypatch.context() as patched:
            earlier, to_revision = str(scripts.get_revision("0010").down_revision), command.upgrade
            patched.setattr(command, "upgrade", lambda config, _: to_revision(config, earlier))
            await upgrade(url)
        await forge(server, url, _BEFORE.format(shop=shop_id))
        await upgrade(url)
        gateway = engine(url, role="payouts_gateway")
        reader = Reader(gateway, shop_id)
        await eventually(partial(reader.has_seen, 40), "all of it is told")
        await gateway.dispose()
    assert [event.place.sequence for event in reader.seen] == [3] * 20 + [4] * 20
    assert len(set(reader.ids)) == 40
