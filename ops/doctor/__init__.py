"""What `payouts doctor` looks at: settings, the database and the broker, as this machine sees them. Nothing is changed."""

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """How a thing is."""

    GOOD = "good"
    LOOK = "look"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `advice`: what to do about it, unless it is good."""

    subject: str
    verdict: Verdict
    detail: str
    advice: str = ""


def good_if(holds: bool, subject: str, detail: str, advice: str, otherwise: Verdict = Verdict.LOOK) -> Finding:
    """A finding that is good, or not, with what to do then."""
    return Finding(subject, Verdict.GOOD, detail) if holds else Finding(subject, otherwise, detail, advice)
