"""The checker's places: how far the rules of the ledger have been checked, and what was found.

Old code runs on it: it knows nothing of the new table.
"""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

TABLES = [
    # One row per walk; whoever makes a step holds it.
    """
    CREATE TABLE checks (
      walk text PRIMARY KEY CHECK (length(walk) BETWEEN 1 AND 64),
      behind text[],
      began_at timestamptz NOT NULL DEFAULT now(),
      rows_seen bigint NOT NULL DEFAULT 0 CHECK (rows_seen >= 0),
      found jsonb NOT NULL DEFAULT '{}',
      found_before jsonb NOT NULL DEFAULT '{}',
      finished_at timestamptz,
      due_at timestamptz NOT NULL DEFAULT now())
      WITH (fillfactor = 50)
    """,
]

GRANTS = [
    "GRANT SELECT, INSERT (walk), UPDATE ON checks TO payouts_worker",
    "GRANT SELECT ON checks TO payouts_ops, payouts_readonly",
    # What the rules compare entries with.
    "GRANT SELECT (id, action, detail) ON audit TO payouts_worker",
]


def upgrade() -> None:
    """Add it."""
    for statement in TABLES + GRANTS:
        op.execute(statement)
