"""What the figures are held against, and whether they get there."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure and what it shall be: at least `least`, or at most `most`."""

    name: str
    figure: float
    unit: str = ""
    least: float | None = None
    most: float | None = None

    @property
    def met(self) -> bool:
        """Whether the figure gets there."""
        return (self.least is None or self.figure >= self.least) and (self.most is None or self.figure <= self.most)

    @property
    def wanted(self) -> str:
        """What it shall be, in words."""
        sign, bound = ("≥", self.least) if self.least is not None else ("≤", self.most)
        return f"{sign} {bound:,g} {self.unit}".rstrip()

    def told(self) -> dict[str, Any]:
        """As it stands in the results."""
        return {"name": self.name, "wanted": self.wanted, "figure": self.figure, "unit": self.unit, "met": self.met}


def render_goals(goals: Iterable[dict[str, Any]]) -> Sequence[Table]:
    """A row for each goal; no table when there is none."""
    rows = [
        (goal["name"], goal["wanted"], f"{goal['figure']:,.4g} {goal['unit']}", "met" if goal["met"] else "NOT MET")
        for goal in goals
    ]
    if not rows:
        return ()
    table = Table("goal", "wanted", "figure", "")
    for row in rows:
        table.add_row(*row)
    return (table,)
