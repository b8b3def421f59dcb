"""A callback that has ended and is sent again begins a new life: an attempt of an earlier one no longer decides anything.

Old code runs on it: of what ends meanwhile the log of attempts says how many there were, as before.
"""

from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

TABLES = [
    # How many attempts were begun until it ended last; the log lacks those that are still under way.
    "ALTER TABLE callbacks ADD COLUMN attempts_made int NOT NULL DEFAULT 0 CHECK (attempts_made >= 0)",
    # How many of them were begun in earlier lives.
    """
    ALTER TABLE callback_due ADD COLUMN attempts_before int NOT NULL DEFAULT 0,
      ADD CONSTRAINT callback_due_attempts_before CHECK (attempts_before BETWEEN 0 AND attempts_made)
    """,
]

GRANTS = [
    "GRANT UPDATE (attempts_made) ON callbacks TO payouts_worker",
    "GRANT SELECT (attempts_made) ON callbacks TO payouts_gateway",
    "GRANT INSERT (attempts_before), SELECT (attempts_before) ON callback_due TO payouts_gateway",
]


def upgrade() -> None:
    """Add it."""
    for statement in TABLES + GRANTS:
        op.execute(statement)
