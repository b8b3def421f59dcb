"""Rails as operators set them up: where each is, its secret, whether it is switched on."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sqlalchemy import ARRAY, Row, Text, any_, bindparam, delete, func, insert, select, update

from common.db.engine import Tx
from common.db.tables import payout_due, rails


@dataclass(frozen=True, slots=True)
class RailRow:
    """A rail as it stands. The secret is sealed for (rail, rail). `concurrency` None: as many calls as a worker makes."""

    id: UUID
    name: str
    kind: str
    status: str
    base_url: str | None
    secret_sealed: bytes | None = field(repr=False)
    authoritative: bool
    lag_seconds: float
    concurrency: int | None


_FIELDS = tuple(rails.c[name] for name in RailRow.__dataclass_fields__)


async def find_rails(tx: Tx) -> list[RailRow]:
    """Every rail there is, switched on or not."""
    return [RailRow(**row._mapping) for row in await tx.execute(select(*_FIELDS).order_by(rails.c.name))]


async def has_rail(tx: Tx, name: str) -> bool:
    """Whether there is a rail of that name."""
    return await tx.scalar(select(rails.c.id).where(rails.c.name == name)) is not None


async def find_rail_secrets(tx: Tx, names: Collection[str]) -> dict[str, tuple[UUID, bytes]]:
    """Id and sealed secret of the rails of these names. What is missing does not exist, or needs no secret."""
    rows = await tx.execute(
        select(rails.c.name, rails.c.id, rails.c.secret_sealed).where(
            rails.c.name == any_(bindparam("names", type_=ARRAY(Text))), rails.c.secret_sealed.is_not(None)
        ),
        {"names": list(names)},
    )
    return {row.name: (row.id, row.secret_sealed) for row in rows}


async def append_http_rail(
    tx: Tx,
    *,
    rail_id: UUID,
    name: str,
    base_url: str,
    secret_sealed: bytes,
    authoritative: bool,
    lag_seconds: float,
    concurrency: int | None,
    payin_link: str | None,
) -> None:
    """A new rail, switched on. Raises: `IntegrityError` (`rails_name_key`, `rails_name_check`)."""
    await tx.execute(
        insert(rails).values(
            id=rail_id,
            name=name,
            kind="http",
            base_url=base_url,
            secret_sealed=secret_sealed,
            authoritative=authoritative,
            lag_seconds=lag_seconds,
            concurrency=concurrency,
            payin_link=payin_link,
        )
    )


async def save_rail_status(tx: Tx, name: str, status: str) -> bool:
    """Switch a rail on or off. Returns whether there is such a rail."""
    return (await tx.execute(update(rails).where(rails.c.name == name).values(status=status))).rowcount == 1


async def delete_rail(tx: Tx, name: str) -> bool:
    """Forget a rail. Returns whether there was one. Raises: `IntegrityError` (`rails_stay_while_named`)."""
    return (await tx.execute(delete(rails).where(rails.c.name == name))).rowcount == 1


async def list_rails(tx: Tx) -> Sequence[Row[*tuple[Any, ...]]]:
    """Rails without their secrets, and how many unfinished payouts each has."""
    unfinished = select(func.count()).select_from(payout_due).where(payout_due.c.rail == rails.c.name).scalar_subquery()
    query = select(
        rails.c.name,
        rails.c.kind,
        rails.c.status,
        rails.c.base_url,
        rails.c.authoritative,
        rails.c.lag_seconds,
        rails.c.concurrency,
        rails.c.payin_link,
        unfinished.label("unfinished"),
        rails.c.created_at,
    )
    return (await tx.execute(query.order_by(rails.c.name))).all()
