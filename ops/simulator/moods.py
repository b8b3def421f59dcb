"""How a simulated bank behaves: what it does with a payment, how it answers, what it tells later. Moods as tables of odds."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol, TypeVar

_Choice = TypeVar("_Choice")


class Manner(StrEnum):
    """How a request is answered, and whether it is booked at all."""

    ANSWER = "answer"
    SLOW = "slow"  # booked, and answered when nobody waits any more
    DROP_BEFORE = "drop before booking"
    DROP_AFTER = "drop after booking"
    ERROR_BEFORE = "503 before booking"
    ERROR_AFTER = "500 after booking"
    BADLY_SIGNED = "badly signed"
    ANOTHER_SUM = "another sum"
    GARBAGE = "garbage"


class Fate(StrEnum):
    """What becomes of a payment."""

    PAID = "paid"
    DECLINED = "declined"
    NOT_ACCEPTED = "not accepted"
    SUBMITTED_PAID = "submitted, then paid"
    SUBMITTED_DECLINED = "submitted, then declined"
    RETURNED = "paid, then returned"


class Telling(StrEnum):
    """How the bank tells by itself."""

    NOT = "not at all"
    ONCE = "once"
    TWICE = "twice"
    LATE = "late"
    OUT_OF_ORDER = "out of order"
    BADLY_SIGNED_FIRST = "badly signed first"
    ANOTHER_SUM_BESIDE = "another sum beside"


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What a bank does with one request."""

    manner: Manner = Manner.ANSWER
    fate: Fate = Fate.PAID
    telling: Telling = Telling.ONCE


class Mood(Protocol):
    """Decides how the bank behaves."""

    def submit(self, reference: str, submits: int) -> Behaviour:
        """The behaviour towards the `submits`-th request to pay a reference."""

    def look_up(self, reference: str) -> Manner:
        """The manner in which a look-up is answered."""


# Odds by weight; what is missing never happens.
_SUBMITS: Final[Mapping[str, Mapping[Manner, int]]] = {
    "calm": {Manner.ANSWER: 1},
    "gloomy": {Manner.ANSWER: 90, Manner.SLOW: 2, Manner.DROP_AFTER: 4, Manner.ERROR_AFTER: 4},
    "worst": {
        Manner.ANSWER: 55,
        Manner.SLOW: 2,
        Manner.DROP_BEFORE: 8,
        Manner.DROP_AFTER: 10,
        Manner.ERROR_BEFORE: 5,
        Manner.ERROR_AFTER: 8,
        Manner.BADLY_SIGNED: 5,
        Manner.ANOTHER_SUM: 3,
        Manner.GARBAGE: 4,
    },
}
_FATES: Final[Mapping[str, Mapping[Fate, int]]] = {
    "calm": {Fate.PAID: 1},
    "gloomy": {Fate.PAID: 90, Fate.DECLINED: 5, Fate.SUBMITTED_PAID: 5},
    "worst": {
        Fate.PAID: 50,
        Fate.DECLINED: 12,
        Fate.NOT_ACCEPTED: 8,
        Fate.SUBMITTED_PAID: 15,
        Fate.SUBMITTED_DECLINED: 10,
        Fate.RETURNED: 5,
    },
}
_TELLINGS: Final[Mapping[str, Mapping[Telling, int]]] = {
    "calm": {Telling.ONCE: 1},
    "gloomy": {Telling.ONCE: 80, Telling.NOT: 10, Telling.TWICE: 10},
    "worst": {
        Telling.NOT: 15,
        Telling.ONCE: 25,
        Telling.TWICE: 15,
        Telling.LATE: 10,
        Telling.OUT_OF_ORDER: 15,
        Telling.BADLY_SIGNED_FIRST: 10,
        Telling.ANOTHER_SUM_BESIDE: 10,
    },
}
_LOOK_UPS: Final[Mapping[str, Mapping[Manner, int]]] = {
    "calm": {Manner.ANSWER: 1},
    "gloomy": {Manner.ANSWER: 95, Manner.ERROR_BEFORE: 5},
    "worst": {
        Manner.ANSWER: 75,
        Manner.SLOW: 1,
        Manner.DROP_BEFORE: 8,
        Manner.ERROR_BEFORE: 8,
        Manner.BADLY_SIGNED: 4,
        Manner.GARBAGE: 4,
    },
}
MOODS: Final = tuple(_SUBMITS)


class SeededMood:
    """A mood drawn by chance, the same for the same seed, reference and number."""

    def __init__(self, name: str, seed: int) -> None:
        self._name = name
        self._seed = seed
        self._look_ups = random.Random(f"{seed} look-ups")  # noqa: S311 no secret

    def submit(self, reference: str, submits: int) -> Behaviour:
        """Drawn by reference and number; a payment is not refused for ever."""
        chance = random.Random(f"{self._seed} {reference} {submits}")  # noqa: S311 no secret
        behaviour = Behaviour(
            _draw(chance, _SUBMITS[self._name]), _draw(chance, _FATES[self._name]), _draw(chance, _TELLINGS[self._name])
        )
        if submits > 3 and behaviour.fate is Fate.NOT_ACCEPTED:
            return Behaviour(behaviour.manner, Fate.PAID, behaviour.telling)
        return behaviour

    def look_up(self, _reference: str) -> Manner:
        """Drawn anew each time."""
        return _draw(self._look_ups, _LOOK_UPS[self._name])


def _draw(chance: random.Random, odds: Mapping[_Choice, int]) -> _Choice:
    return chance.choices(list(odds), weights=list(odds.values()))[0]
