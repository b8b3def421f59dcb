"""Guards look up row by row, by the id of what they look up.

Their statements have no parameters, so the plan that a session made first, on an empty table, stays. There a look-up by id
and shop cost as much by an index that begins with the shop, or by reading everything: for a busy shop that became every payout
it has ever had, for each payout of a batch. What is compared with the shop is kept from the indexes now, and joins go row by
row.

Old code runs on it.
"""

import re

from alembic import op
from sqlalchemy import text

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

# Those that compare what a statement has written with what is stored.
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
# Every shop_id of theirs is NOT NULL, so that nothing else changes.
SAME_SHOP = re.compile(r"\b(\w+)\.shop_id = (\w+)\.shop_id\b")


def upgrade() -> None:
    """Change them."""
    connection = op.get_bind()
    for name in GUARDS:
        written = connection.scalar(
            text("SELECT pg_get_functiondef(CAST(:name AS regprocedure))"), {"name": f"{name}()"}
        )
        connection.exec_driver_sql(SAME_SHOP.sub(r"\1.shop_id IS NOT DISTINCT FROM \2.shop_id", written))
        for way in ("enable_hashjoin", "enable_mergejoin", "enable_material", "enable_seqscan"):
            op.execute(f"ALTER FUNCTION {name}() SET {way} TO off")
