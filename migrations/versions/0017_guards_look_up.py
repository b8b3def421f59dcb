"""Guards look up row by row whatever the planner believes of a table, a row that their statement has written at a time.

A table that was nearly empty when it was looked at last is taken for small however much has come since, and to read all of a
small table costs as much as a look-up: so each payout of a batch had guards read every payout and every entry there is. What
stands behind OFFSET is planned by itself, with the key that it is given, and nothing but a look-up by that key is left.

To change rows that one holds one may say where they stand, for which a role has to see it.

Old code runs on it.
"""

import re

from alembic import op
from sqlalchemy import text

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

GUARDS = (
    "entries_move_accounts",
    "payouts_start_whole",
    "payouts_end_whole",
    "payout_attempts_submit_once",
    "payout_due_follows_payout",
    "payout_due_expiry_matches",
    "events_match_payout",
    "events_match_payin",
    "events_in_order",
    "callbacks_match_event",
    "callback_due_has_callback",
    "payins_start_whole",
    "payins_end_whole",
    "payin_due_follows_payin",
)
JOIN = re.compile(r"JOIN (\w+) (\w+)\s+ON ((?:(?!\b(?:LEFT|JOIN|WHERE)\b).)+)", re.DOTALL)
# What rails have said of a payout or a payin, of which something must be there.
WORDS = re.compile(r"(SELECT 1 FROM (?:payout_attempts|payin_words) [^()]*(?:\([^()]*\)[^()]*)*)\)")


def upgrade() -> None:
    """Change them."""
    connection = op.get_bind()
    for name in GUARDS:
        written = connection.scalar(
            text("SELECT pg_get_functiondef(CAST(:name AS regprocedure))"), {"name": f"{name}()"}
        )
        looked_up = JOIN.sub(r"JOIN LATERAL (SELECT * FROM \1 \2 WHERE \3 OFFSET 0) \2 ON true ", written)
        connection.exec_driver_sql(WORDS.sub(r"\1 OFFSET 0)", looked_up))
    op.execute("GRANT SELECT (ctid) ON payouts TO payouts_gateway")
