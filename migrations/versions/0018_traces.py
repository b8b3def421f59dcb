"""A payout carries the trace context of the request that brought it, if it is traced, and so do its callbacks.

Null is what stands there when nothing is traced; it takes no room. Old code runs on it: it knows nothing of what is new.
"""

from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None

TABLES = [
    "ALTER TABLE payouts ADD COLUMN traceparent text",
    "ALTER TABLE callbacks ADD COLUMN traceparent text",
]

GUARDS = [
    """
    CREATE TRIGGER payouts_trace_fixed BEFORE UPDATE OF traceparent ON payouts
      FOR EACH ROW WHEN (OLD.traceparent IS DISTINCT FROM NEW.traceparent) EXECUTE FUNCTION refuse_change()
    """,
]

GRANTS = [
    "GRANT SELECT (traceparent) ON payouts TO payouts_gateway",
]


def upgrade() -> None:
    """Add it."""
    for statement in TABLES + GUARDS + GRANTS:
        op.execute(statement)
