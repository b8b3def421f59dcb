"""Where the checker stands: each walk's place, kept in the database, so that any number of sweeps and restarts share a pass.

A step looks at one page of one walk, in a transaction of a few short statements. A walk that is at its end rests, and
begins anew.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Row, text

from common.db.engine import Tx
from common.db.invariants import OFFENDERS_SHOWN, RULES, WALKS, Finding, Position, Rule, Walk, find_offenders

# How long a walk rests between two passes.
PASS_PAUSE_SECONDS: Final = 60.0

_WALKS: Final = {walk.table: walk for walk in WALKS}
_BIGINT_MAX: Final = str(2**63 - 1)


@dataclass(frozen=True, slots=True)
class Found:
    """What a pass has found of one rule: how many offenders, and the first of them."""

    count: int
    offenders: tuple[str, ...]


_NOTHING: Final = Found(0, ())


@dataclass(frozen=True, slots=True)
class Broken:
    """A rule that does not hold, and those of its first offenders in this pass that no step has named before."""

    rule: Rule
    offenders: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """What was looked at: the table, how many of its rows, and what is broken there."""

    table: str
    rows: int
    broken: tuple[Broken, ...]


async def begin_checks(tx: Tx) -> None:
    """Have a place for every walk. Repeat: those that are there stay as they are."""
    await tx.execute(_BEGIN, {"walks": list(_WALKS)})


_BEGIN = text("INSERT INTO checks (walk) SELECT unnest(CAST(:walks AS text[])) ON CONFLICT (walk) DO NOTHING")


async def check_step(tx: Tx, *, rows_max: int) -> Step | None:
    """Look at the next page of a walk that nobody else is at, and write down how far it came. None: all of them rest.

    Locks: the walk's row. Reads without locks, by index; each rule sees a snapshot of its own.
    """
    claimed = (await tx.execute(_CLAIM, {"walks": list(_WALKS)})).one_or_none()
    if claimed is None:
        return None
    await tx.execute(_BY_INDEX)
    walk = _WALKS[claimed.walk]
    page = await _find_page(tx, walk, claimed.behind, claimed.began_at, rows_max)
    rules = [rule for rule in RULES if rule.walk is walk]
    findings = [await find_offenders(tx, rule, behind=claimed.behind, upto=page.upto) for rule in rules if page.rows]
    found, broken = _add(_parse_found(claimed.found), [finding for finding in findings if finding.count])
    await tx.execute(
        _SAVE,
        {
            "walk": walk.table,
            "behind": None if page.is_last else page.next_behind,
            "began_at": claimed.began_at,
            "rows": page.rows,
            "found": _render_found(found),
            "is_last": page.is_last,
            "pause_seconds": PASS_PAUSE_SECONDS,
        },
    )
    return Step(walk.table, page.rows, broken)


# In no order: a walk whose step fails again and again holds up none of the others.
_CLAIM = text(
    """
    SELECT walk, behind, CASE WHEN behind IS NULL THEN now() ELSE began_at END AS began_at, CAST(found AS text) AS found
      FROM checks WHERE walk = ANY (CAST(:walks AS text[])) AND due_at <= now()
     ORDER BY random() LIMIT 1 FOR UPDATE SKIP LOCKED
    """
)

# What the rows of a page lead to is found by key, however good reading a whole table may look; and how far a page goes is only
# known when it is there.
_BY_INDEX = text(
    "SELECT set_config('enable_hashjoin', 'off', true), set_config('enable_mergejoin', 'off', true),"
    " set_config('plan_cache_mode', 'force_custom_plan', true)"
)

_SAVE = text(
    """
    UPDATE checks
       SET behind = CAST(:behind AS text[]), began_at = :began_at,
           rows_seen = CASE WHEN CAST(:is_last AS boolean) THEN 0 ELSE rows_seen + :rows END,
           found = CASE WHEN CAST(:is_last AS boolean) THEN '{}' ELSE CAST(:found AS jsonb) END,
           found_before = CASE WHEN CAST(:is_last AS boolean) THEN CAST(:found AS jsonb) ELSE found_before END,
           finished_at = CASE WHEN CAST(:is_last AS boolean) THEN now() ELSE finished_at END,
           due_at = CASE WHEN CAST(:is_last AS boolean) THEN now() + make_interval(secs => CAST(:pause_seconds AS float8))
                         ELSE due_at END
     WHERE walk = :walk
    """
)


@dataclass(frozen=True, slots=True)
class _Page:
    """The rows of a walk behind its place and up to another; where the next page begins, unless the pass ends here."""

    rows: int
    upto: Position | None
    next_behind: Position | None
    is_last: bool


async def _find_page(tx: Tx, walk: Walk, behind: Position | None, began_at: datetime, rows_max: int) -> _Page:
    """The next page. Rows that came to be after the pass began are the next pass's, or what grows would have no end."""
    query = text(
        f"""
        SELECT key, n, written_at FROM (
          SELECT ARRAY[{", ".join(f"CAST({walk.alias}.{column} AS text)" for column, _ in walk.key)}] AS key,
                 {walk.written_at} AS written_at, row_number() OVER (ORDER BY {walk.order}) AS n
            FROM {walk.table} {walk.alias} WHERE {walk.within}
           ORDER BY {walk.order} LIMIT CAST(:rows_max AS int)) page
         ORDER BY n DESC LIMIT 1
        """
    )
    limit = max(1, rows_max // walk.weight)
    row = (await tx.execute(query, {"behind": behind, "upto": None, "rows_max": limit})).one_or_none()
    if row is None:
        return _Page(0, None, None, is_last=True)
    upto = tuple(row.key)
    is_young = row.written_at is not None and row.written_at >= began_at
    if is_young and len(upto) > 1:
        # This account's later entries are as young; on to the next account.
        return _Page(row.n, upto, (*upto[:-1], _BIGINT_MAX), is_last=row.n < limit)
    return _Page(row.n, upto, upto, is_last=is_young or row.n < limit)


def _add(before: Mapping[str, Found], findings: Sequence[Finding]) -> tuple[dict[str, Found], tuple[Broken, ...]]:
    """What the pass has found by now, and what of it is news."""
    found, broken = dict(before), []
    for finding in findings:
        known = before.get(finding.rule.name, _NOTHING)
        fresh = finding.offenders[: OFFENDERS_SHOWN - len(known.offenders)]
        found[finding.rule.name] = Found(known.count + finding.count, known.offenders + fresh)
        if fresh:
            broken.append(Broken(finding.rule, fresh))
    return found, tuple(broken)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a walk is: rows seen in this pass, seconds since a pass was complete, and how many offenders each rule has.

    Of the last complete pass and the present one the worse counts. Before there is a complete one, `age_seconds` counts since
    the first began, and of the rules only those known to be broken are here.
    """

    table: str
    rows_seen: int
    age_seconds: float
    offenders: dict[str, int]


async def find_progress(tx: Tx) -> list[Progress]:
    """How far all walks are."""
    rows = (await tx.execute(_PROGRESS, {"walks": list(_WALKS)})).all()
    return [Progress(row.walk, row.rows_seen, row.age_seconds, _count(row)) for row in rows]


_PROGRESS = text(
    """
    SELECT walk, rows_seen, CAST(extract(epoch FROM now() - coalesce(finished_at, began_at)) AS float8) AS age_seconds,
           finished_at IS NOT NULL AS was_complete, CAST(found AS text) AS found, CAST(found_before AS text) AS found_before
      FROM checks WHERE walk = ANY (CAST(:walks AS text[]))
    """
)


def _count(row: Row[Any]) -> dict[str, int]:
    passes = [_parse_found(row.found), _parse_found(row.found_before)]
    counts = {
        rule.name: max(found.get(rule.name, _NOTHING).count for found in passes)
        for rule in RULES
        if rule.walk.table == row.walk
    }
    return {rule: count for rule, count in counts.items() if count or row.was_complete}


def _parse_found(stored: str) -> dict[str, Found]:
    return {rule: Found(item["count"], tuple(item["offenders"])) for rule, item in json.loads(stored).items()}


def _render_found(found: Mapping[str, Found]) -> str:
    return json.dumps({rule: {"count": item.count, "offenders": item.offenders} for rule, item in found.items()})
