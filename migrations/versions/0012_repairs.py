"""What operators repair with: callbacks that were put aside are found by index.

Old code runs on it: it knows nothing of what is new.
"""

from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

TABLES = [
    # Only what is put aside stands in it, so that nobody pays for it who sends.
    "CREATE INDEX callback_due_put_aside ON callback_due (event_id) WHERE due_at = 'infinity'",
]


def upgrade() -> None:
    """Add it."""
    for statement in TABLES:
        op.execute(statement)
