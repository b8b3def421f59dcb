"""Operators open discrepancies by a statement of a provider; a role of its own exchanges seals for those of a newer master key.

Old code runs on it: it knows nothing of what is new. The role `payouts_sealer` is made like the others; where the login that
migrates may not make roles, make it first (`deploy/postgresql/logins.sql` does), and let only whoever rotates keys become it.
"""

from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

# Of each table with a sealed column: what the role has to read.
SEALED = {
    "rails": ("secret_sealed", "id, secret_sealed"),
    "api_keys": ("secret_sealed", "id, merchant_id, secret_sealed"),
    "webhook_secrets": ("sealed", "id, shop_id, sealed"),
    "payouts": ("recipient_sealed", "id, shop_id, recipient_sealed"),
}

GUARDS = [
    # What takes the place of a seal looks like it, but for a newer key: format and day (bytes 1, and 4 to 7) and length stay.
    f"""
    CREATE TRIGGER {table}_sealed_anew BEFORE UPDATE OF {column} ON {table}
      FOR EACH ROW WHEN (current_user = 'payouts_sealer' AND (
        octet_length(NEW.{column}) IS DISTINCT FROM octet_length(OLD.{column})
        OR substring(NEW.{column} FROM 1 FOR 1) <> substring(OLD.{column} FROM 1 FOR 1)
        OR substring(NEW.{column} FROM 2 FOR 2) <= substring(OLD.{column} FROM 2 FOR 2)
        OR substring(NEW.{column} FROM 4 FOR 4) <> substring(OLD.{column} FROM 4 FOR 4)))
      EXECUTE FUNCTION refuse_change()
    """
    for table, (column, _) in SEALED.items()
]

GRANTS = [
    # What a provider's statement says against what we know.
    """
    GRANT INSERT (id, rail, reference, payout_id, payin_id, shop_id, state, word, kind, detail) ON discrepancies
      TO payouts_ops
    """,
    *(
        f"GRANT SELECT ({read}), UPDATE ({column}) ON {table} TO payouts_sealer"
        for table, (column, read) in SEALED.items()
    ),
    "GRANT INSERT (actor, action, subject, reason, detail), SELECT (id) ON audit TO payouts_sealer",
]


def upgrade() -> None:
    """Add it."""
    for statement in GUARDS + GRANTS:
        op.execute(statement)
