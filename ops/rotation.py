"""Rotating the master key: every sealed value is sealed anew under the newest one, while everybody works.

The content hash has a key of its own, so that repeated creates are known as before.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final
from uuid import UUID

from common.db.engine import Engine, Tx, in_transaction
from common.db.sealed import (
    COLUMNS,
    SealedColumn,
    SealedValue,
    count_sealed,
    find_sealed_otherwise,
    save_sealed_anew,
)
from common.sealing import Keyring, SealBroken

# Values per transaction: their rows are locked for milliseconds.
ROWS_MAX: Final = 500
# How often everything is looked at again for what others held or wrote meanwhile.
_PASSES_MAX: Final = 5
_OFFENDERS_MAX: Final = 10


@dataclass(slots=True)
class Rotated:
    """What was done and what is left. `counts`: values by column and master key, after it.

    `unreadable`: the first rows, as `table/id`, that no key of ours opens.
    """

    newest: int
    exchanged: int = 0
    counts: dict[str, Counter[int]] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)

    def left(self, key_id: int) -> int:
        """How many values are still sealed under a master key."""
        return sum(counted[key_id] for counted in self.counts.values())

    @property
    def others(self) -> dict[int, int]:
        """The same for all keys but the newest that seal something."""
        keys = {key_id for counted in self.counts.values() for key_id in counted} - {self.newest}
        return {key_id: self.left(key_id) for key_id in sorted(keys)}


Told = Callable[[str, int], None]


async def rotate(engine: Engine, keyring: Keyring, *, tell: Told) -> Rotated:
    """Seal everything anew that is not under the newest key. Repeat: what is done is passed over. `tell`: progress."""
    rotated = Rotated(keyring.current_id)
    for _ in range(_PASSES_MAX):
        rotated.unreadable = []
        before = rotated.exchanged
        for column in COLUMNS:
            await _rotate_column(engine, keyring, column, rotated, tell)
        rotated.counts = await count(engine, tell=tell)
        if not rotated.others or rotated.exchanged == before:
            break
    return rotated


async def count(engine: Engine, *, tell: Told) -> dict[str, Counter[int]]:
    """How many values there are in each table under each master key."""
    counts: dict[str, Counter[int]] = {}
    for column in COLUMNS:
        counted, behind = Counter[int](), None
        while True:
            page, behind = await in_transaction(engine, partial(count_sealed, column=column, behind=behind))
            counted += page
            tell(f"{column.table}: counted", counted.total())
            if behind is None:
                break
        counts[column.table] = counted
    return counts


async def _rotate_column(engine: Engine, keyring: Keyring, column: SealedColumn, rotated: Rotated, tell: Told) -> None:
    behind: UUID | None = None
    while True:
        page = await in_transaction(
            engine,
            partial(find_sealed_otherwise, column=column, key_id=keyring.current_id, behind=behind, rows_max=ROWS_MAX),
        )
        exchanged = reseal(keyring, column, page.values, rotated)

        async def save(tx: Tx, exchanged: list[tuple[SealedValue, bytes]] = exchanged) -> int:
            return await save_sealed_anew(tx, column, exchanged)

        rotated.exchanged += await in_transaction(engine, save) if exchanged else 0
        tell(f"{column.table}: sealed anew", rotated.exchanged)
        behind = page.behind
        if behind is None:
            return


def reseal(
    keyring: Keyring, column: SealedColumn, values: list[SealedValue], rotated: Rotated
) -> list[tuple[SealedValue, bytes]]:
    """Each value with its new seal; what does not open is remembered and left as it is."""
    exchanged: list[tuple[SealedValue, bytes]] = []
    for value in values:
        try:
            new = keyring.reseal(value.sealed, owner=value.owner, row=value.id, purpose=column.purpose)
        except SealBroken:
            if len(rotated.unreadable) < _OFFENDERS_MAX:
                rotated.unreadable.append(f"{column.table}/{value.id}")
        else:
            exchanged.append((value, new))
    return exchanged
