"""The arithmetic of an account: what each kind of entry does to it. Pure; the database checks every result again."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class EntryKind(StrEnum):
    """Why money moved."""

    HOLD = "hold"
    CAPTURE = "capture"
    RELEASE = "release"
    PAYOUT_RETURN = "payout_return"
    PAYIN = "payin"
    PAYIN_REFUND = "payin_refund"
    ADJUSTMENT = "adjustment"


@dataclass(frozen=True, slots=True)
class _Rule:
    """The other leg of an entry, and the sign by which its amount moves `posted` and `held`."""

    contra: str
    posted_sign: int
    held_sign: int


RULES: Final[dict[EntryKind, _Rule]] = {
    EntryKind.HOLD: _Rule("holds", 0, +1),
    EntryKind.CAPTURE: _Rule("provider_clearing", -1, -1),
    EntryKind.RELEASE: _Rule("holds", 0, -1),
    EntryKind.PAYOUT_RETURN: _Rule("provider_clearing", +1, 0),
    EntryKind.PAYIN: _Rule("provider_clearing", +1, 0),
    EntryKind.PAYIN_REFUND: _Rule("provider_clearing", -1, 0),
    EntryKind.ADJUSTMENT: _Rule("adjustments", +1, 0),
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the ledger: both legs, and the account's balances after it. Amounts in minor units."""

    seq: int
    kind: EntryKind
    contra: str
    amount_minor: int
    posted_delta_minor: int
    held_delta_minor: int
    posted_after_minor: int
    held_after_minor: int


@dataclass(slots=True)
class Account:
    """An account while its row is locked. `append` moves it; whoever holds the lock inserts what `append` returned."""

    id: int
    posted_minor: int
    held_minor: int
    credit_limit_minor: int
    last_seq: int

    @property
    def spendable_minor(self) -> int:
        """What a new hold may take: money not held, and credit."""
        return self.posted_minor - self.held_minor + self.credit_limit_minor

    def append(self, kind: EntryKind, amount_minor: int) -> Entry:
        """Apply one entry of that kind and return it. The caller has judged that it is allowed."""
        rule = RULES[kind]
        self.last_seq += 1
        self.posted_minor += rule.posted_sign * amount_minor
        self.held_minor += rule.held_sign * amount_minor
        return Entry(
            seq=self.last_seq,
            kind=kind,
            contra=rule.contra,
            amount_minor=amount_minor,
            posted_delta_minor=rule.posted_sign * amount_minor,
            held_delta_minor=rule.held_sign * amount_minor,
            posted_after_minor=self.posted_minor,
            held_after_minor=self.held_minor,
        )
