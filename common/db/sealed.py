"""Every sealed value there is, page by page, and the exchange of a seal for one under another master key.

A sealed value names its master key, so what is left to do is told by the values themselves: whoever was interrupted begins
again and passes over what is done.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from sqlalchemy import TextClause, text

from common.db.engine import Tx
from common.sealing import API_KEY_PURPOSE, RAIL_SECRET_PURPOSE, RECIPIENT_PURPOSE, WEBHOOK_SECRET_PURPOSE

# Rows that one statement looks at, so that each ends in time however few of them are under another key.
LOOKS_MAX: Final = 10_000
# No master key has it: of what is too short to be a sealed value.
NO_KEY: Final = 0
_FIRST: Final = UUID(int=0)


@dataclass(frozen=True, slots=True)
class SealedColumn:
    """Where sealed values stand: bound to the `id` of their row and to its `owner`, for one purpose."""

    table: str
    column: str
    owner: str
    purpose: str


COLUMNS: Final = (
    SealedColumn("rails", "secret_sealed", "id", RAIL_SECRET_PURPOSE),
    SealedColumn("api_keys", "secret_sealed", "merchant_id", API_KEY_PURPOSE),
    SealedColumn("webhook_secrets", "sealed", "shop_id", WEBHOOK_SECRET_PURPOSE),
    SealedColumn("payouts", "recipient_sealed", "shop_id", RECIPIENT_PURPOSE),
)

# As common.sealing packs it: a byte of format, two of the key's id, four of the day.
_KEY_ID: Final = (
    f"CASE WHEN octet_length(sealed) < 7 THEN {NO_KEY} ELSE get_byte(sealed, 1) * 256 + get_byte(sealed, 2) END"
)


def _looked_at(column: SealedColumn) -> str:
    return f"""
      SELECT id, {column.owner} AS owner, {column.column} AS sealed FROM {column.table}
       WHERE id > CAST(:behind AS uuid) ORDER BY id LIMIT CAST(:looks_max AS int)"""


@dataclass(frozen=True, slots=True)
class _Statements:
    find: TextClause
    count: TextClause
    last: TextClause
    save: TextClause


def _statements(column: SealedColumn) -> _Statements:
    return _Statements(
        find=text(
            f"""
            SELECT id, owner, sealed FROM ({_looked_at(column)}) looked
             WHERE sealed IS NOT NULL AND {_KEY_ID} <> CAST(:key_id AS int) ORDER BY id LIMIT CAST(:rows_max AS int)
            """
        ),
        count=text(
            f"""
            SELECT {_KEY_ID} AS key_id, count(*) AS n FROM ({_looked_at(column)}) looked WHERE sealed IS NOT NULL GROUP BY 1
            """
        ),
        last=text(
            f"""
            SELECT id FROM {column.table} WHERE id > CAST(:behind AS uuid)
             ORDER BY id OFFSET CAST(:looks_max AS int) - 1 LIMIT 1
            """
        ),
        # One probe a row; what somebody else holds, or has exchanged meanwhile, is left as it is.
        save=text(
            f"""
            WITH fresh AS (
              SELECT * FROM unnest(CAST(:ids AS uuid[]), CAST(:old AS bytea[]), CAST(:new AS bytea[])) AS f (id, old, new)),
            held AS (
              SELECT h.id, h.new FROM (SELECT * FROM fresh ORDER BY id) f CROSS JOIN LATERAL (
                SELECT t.id, f.new FROM {column.table} t WHERE t.id = f.id AND t.{column.column} = f.old
                 LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) h)
            UPDATE {column.table} t SET {column.column} = held.new FROM held WHERE t.id = held.id
            """
        ),
    )


_STATEMENTS: Final = {column: _statements(column) for column in COLUMNS}


@dataclass(frozen=True, slots=True)
class SealedValue:
    """A sealed value of the row `id`, and whose it is."""

    id: UUID
    owner: UUID
    sealed: bytes


@dataclass(frozen=True, slots=True)
class SealedPage:
    """Values under other keys, in the order of their rows, and where to go on; `behind` None: these are the last."""

    values: list[SealedValue]
    behind: UUID | None


async def find_sealed_otherwise(
    tx: Tx, column: SealedColumn, *, key_id: int, behind: UUID | None, rows_max: int, looks_max: int = LOOKS_MAX
) -> SealedPage:
    """At most `rows_max` values under another master key than that one, among the next `looks_max` rows."""
    place = {"behind": behind or _FIRST, "looks_max": looks_max}
    rows = await tx.execute(_STATEMENTS[column].find, place | {"key_id": key_id, "rows_max": rows_max})
    values = [SealedValue(row.id, row.owner, row.sealed) for row in rows]
    if len(values) == rows_max:
        return SealedPage(values, values[-1].id)
    return SealedPage(values, await tx.scalar(_STATEMENTS[column].last, place))


async def count_sealed(
    tx: Tx, column: SealedColumn, *, behind: UUID | None, looks_max: int = LOOKS_MAX
) -> tuple[Counter[int], UUID | None]:
    """Of the next `looks_max` rows, how many values there are under each master key, and where to go on."""
    place = {"behind": behind or _FIRST, "looks_max": looks_max}
    counted = Counter({row.key_id: row.n for row in await tx.execute(_STATEMENTS[column].count, place)})
    return counted, await tx.scalar(_STATEMENTS[column].last, place)


async def save_sealed_anew(tx: Tx, column: SealedColumn, exchanged: Sequence[tuple[SealedValue, bytes]]) -> int:
    """Exchange seals, each only if it still is the one that was read. Returns: how many were.

    Locks: the rows, by id; those that others hold are left out.
    """
    if not exchanged:
        return 0
    values = {
        "ids": [value.id for value, _ in exchanged],
        "old": [value.sealed for value, _ in exchanged],
        "new": [new for _, new in exchanged],
    }
    return (await tx.execute(_STATEMENTS[column].save, values)).rowcount
