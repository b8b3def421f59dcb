"""Reconciling: a provider's statement laid beside what we have, reference by reference. It moves no money."""

from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final

from common.db.engine import Tx
from common.db.rail_events import NewDiscrepancy, open_discrepancies
from common.db.reconciling import OurSide, find_by_references, find_moved
from common.domain.ids import new_id
from common.domain.money import CURRENCY_EXPONENTS, render_amount
from common.domain.payin import PayinState
from common.domain.payout import STAGES
from ops.reconciliation import FITTING
from ops.statement import Stated, Statement

PAGE_ROWS_MAX: Final = 500
_UNFINISHED: Final = frozenset({*(stage.value for stage in STAGES), PayinState.PENDING.value})


class Verdict(StrEnum):
    """How a line and a payout or payin stand to each other."""

    MATCHED = "matched"
    # The provider has said a last word that has not come to us; a look-up or event brings it, or people do.
    UNFINISHED = "unfinished"
    MISSING = "missing"
    EXTRA = "extra"
    DIFFERENT = "different"


@dataclass(frozen=True, slots=True)
class Compared:
    """One reference on both sides; of those that are missing there is no `theirs`, of extra ones no `ours`."""

    verdict: Verdict
    ours: OurSide | None
    theirs: Stated | None
    kind: str | None = None
    detail: str = ""

    @property
    def money(self) -> tuple[str, int]:
        """Currency and minor units: the provider's, and ours of what it leaves out."""
        side = self.theirs or self.ours
        assert side is not None
        return side.currency, side.amount_minor


class Tally:
    """How many references there are of each verdict, and how much money, by currency, in minor units."""

    def __init__(self) -> None:
        self.counts: Counter[Verdict] = Counter()
        self.sums_minor: Counter[tuple[Verdict, str]] = Counter()

    def add(self, compared: Compared) -> None:
        """Count one more."""
        currency, amount_minor = compared.money
        self.counts[compared.verdict] += 1
        self.sums_minor[compared.verdict, currency] += amount_minor

    @property
    def is_clean(self) -> bool:
        """Whether nothing is missing, extra or different."""
        return not any(self.counts[verdict] for verdict in (Verdict.MISSING, Verdict.EXTRA, Verdict.DIFFERENT))


async def compare(
    tx: Tx, statement: Statement, *, rail: str, since: datetime, until: datetime
) -> AsyncIterator[Compared]:
    """Every reference of the statement, then what is ours and missing there: of what moved from `since` on, before `until`."""
    for page in statement.pages(PAGE_ROWS_MAX):
        ours = await find_by_references(tx, [stated.reference for stated in page])
        for stated in page:
            yield judge(ours.get(stated.reference), stated, rail)
    behind = None
    while True:
        moved = await find_moved(tx, rail, since=since, until=until, behind=behind)
        for mine in moved.found:
            status = statement.find_status(mine.reference)
            if status is None or (mine.state == "refunded" and status != "returned"):
                yield Compared(Verdict.MISSING, mine, None, detail="its return" if mine.state == "refunded" else "")
        behind = moved.behind
        if behind is None:
            return


def judge(ours: OurSide | None, theirs: Stated, rail: str) -> Compared:
    """How what a statement says of a reference stands to what we have under it."""
    if ours is None or ours.rail != rail:
        return Compared(Verdict.EXTRA, None, theirs, detail="" if ours is None else f"it is of the rail {ours.rail}")
    if not theirs.is_one or (theirs.amount_minor, theirs.currency) != (ours.amount_minor, ours.currency):
        said = _money(theirs) if theirs.is_one else "several amounts"
        return Compared(Verdict.DIFFERENT, ours, theirs, "amount", f"the statement says {said}, we {_money(ours)}")
    if theirs.times > 1:
        detail = f"the statement says so {theirs.times} times"
        return Compared(Verdict.DIFFERENT, ours, theirs, "status", detail)
    if ours.state in _UNFINISHED:
        verdict = Verdict.MATCHED if theirs.status == "submitted" else Verdict.UNFINISHED
        return Compared(verdict, ours, theirs)
    # What came back later was paid before, and may have come back in a statement of its own.
    fits = theirs.status in FITTING[ours.state] or (ours.state, theirs.status) == ("refunded", "paid")
    if fits:
        return Compared(Verdict.MATCHED, ours, theirs)
    return Compared(Verdict.DIFFERENT, ours, theirs, "status", "the statement says so")


async def open_of(tx: Tx, found: list[Compared]) -> int:
    """Have people look at what differs. Repeat: what is open already stays one. Returns: how many are new."""
    return len(await open_discrepancies(tx, [_discrepancy(each) for each in found]))


def _discrepancy(compared: Compared) -> NewDiscrepancy:
    ours, theirs = compared.ours, compared.theirs
    assert ours is not None
    assert theirs is not None
    assert compared.kind is not None
    return NewDiscrepancy(
        id=new_id(),
        rail=ours.rail,
        reference=ours.reference,
        payout_id=ours.payout_id,
        shop_id=ours.shop_id,
        state=ours.state,
        word=theirs.status,
        kind=compared.kind,
        detail=compared.detail,
        payin_id=ours.payin_id,
    )


def _money(side: OurSide | Stated) -> str:
    return f"{render_amount(side.amount_minor, CURRENCY_EXPONENTS[side.currency])} {side.currency}"
