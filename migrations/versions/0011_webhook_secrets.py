"""Webhook secrets in a table of their own: up to three live ones per shop, so that a secret is exchanged without a gap.

Old code does not run on it: its workers look for the secret in `shops`, and its `payouts shop add` puts one there. Stop the
workers of role `callbacks` first, migrate, and start the new ones; callbacks wait meanwhile, and nothing is lost. Gateways
and the other roles may keep running. A secret that was there keeps its seal, which is bound to the id of its row: so the row
gets the id of the shop.
"""

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

LIVE_MAX = 3
GRACE_MAX = "interval '168 hours'"

TABLES = [
    "LOCK TABLE shops IN ACCESS EXCLUSIVE MODE",
    # `not_after` NULL: the current one, by which all is signed. Another signs beside it until then.
    """
    CREATE TABLE webhook_secrets (
      id uuid PRIMARY KEY,
      shop_id uuid NOT NULL REFERENCES shops,
      sealed bytea NOT NULL,
      created_at timestamptz NOT NULL DEFAULT now(),
      not_after timestamptz,
      CONSTRAINT webhook_secrets_begin_before_end CHECK (not_after >= created_at))
    """,
    "CREATE UNIQUE INDEX webhook_secrets_one_current ON webhook_secrets (shop_id) WHERE not_after IS NULL",
    "CREATE INDEX webhook_secrets_by_shop ON webhook_secrets (shop_id, not_after)",
    """
    INSERT INTO webhook_secrets (id, shop_id, sealed, created_at)
    SELECT id, id, webhook_secret_sealed, created_at FROM shops
    """,
    "ALTER TABLE shops DROP COLUMN webhook_secret_sealed",
]

GUARDS = [
    # Two at the same time cannot pass: both would be current, and the second waits for the first at the index.
    f"""
    CREATE FUNCTION webhook_secrets_are_few() RETURNS trigger
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    BEGIN
      IF NEW.not_after IS NOT NULL OR {LIVE_MAX} < (
        SELECT count(*) FROM webhook_secrets s
         WHERE s.shop_id = NEW.shop_id AND (s.not_after IS NULL OR s.not_after > now())) THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'webhook_secrets_are_few', TABLE = 'webhook_secrets',
          MESSAGE = 'a new secret is the current one, and a shop has at most {LIVE_MAX} that live';
      END IF;
      RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER webhook_secrets_are_few AFTER INSERT ON webhook_secrets
      FOR EACH ROW EXECUTE FUNCTION webhook_secrets_are_few()
    """,
    # Neither revived nor prolonged. The owner may seal it anew under another master key.
    f"""
    CREATE TRIGGER webhook_secrets_end_once BEFORE UPDATE ON webhook_secrets
      FOR EACH ROW WHEN ((OLD.id, OLD.shop_id, OLD.created_at) IS DISTINCT FROM (NEW.id, NEW.shop_id, NEW.created_at)
        OR OLD.not_after IS NOT NULL AND coalesce(NEW.not_after > OLD.not_after, true)
        OR NEW.not_after > now() + {GRACE_MAX})
      EXECUTE FUNCTION refuse_change()
    """,
    """
    CREATE FUNCTION shops_have_webhook_secret() RETURNS trigger
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    DECLARE
      shop uuid;
    BEGIN
      IF TG_TABLE_NAME = 'shops' THEN
        shop := NEW.id;
      ELSE
        shop := OLD.shop_id;
      END IF;
      IF EXISTS (SELECT 1 FROM shops s WHERE s.id = shop)
         AND NOT EXISTS (SELECT 1 FROM webhook_secrets w WHERE w.shop_id = shop AND w.not_after IS NULL) THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'shops_have_webhook_secret', TABLE = 'webhook_secrets',
          MESSAGE = 'a shop always has a webhook secret that does not end';
      END IF;
      RETURN NULL;
    END $$
    """,
    # At the end of the transaction: the old one ends before the new one is there.
    """
    CREATE CONSTRAINT TRIGGER shops_have_webhook_secret AFTER INSERT ON shops
      DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION shops_have_webhook_secret()
    """,
    """
    CREATE CONSTRAINT TRIGGER shops_keep_webhook_secret AFTER UPDATE OR DELETE ON webhook_secrets
      DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION shops_have_webhook_secret()
    """,
    "REVOKE ALL ON FUNCTION webhook_secrets_are_few() FROM PUBLIC",
    "REVOKE ALL ON FUNCTION shops_have_webhook_secret() FROM PUBLIC",
]

GRANTS = [
    "GRANT SELECT ON webhook_secrets TO payouts_worker",
    *(
        f"GRANT SELECT (id, shop_id, created_at, not_after) ON webhook_secrets TO {role}"
        for role in ("payouts_ops", "payouts_readonly")
    ),
    "GRANT INSERT (id, shop_id, sealed), UPDATE (not_after) ON webhook_secrets TO payouts_ops",
]


def upgrade() -> None:
    """Add it."""
    for statement in TABLES + GUARDS + GRANTS:
        op.execute(statement)
