"""Rails are rows: what kind each is, where it is, whether it is switched on; the gateway takes their events in.

Old code runs on it: it knows the sandbox rail, and the payouts of any other it would end as `no_route`. So add the first rail
when the old workers have left.
"""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

TABLES = [
    # `lag_seconds`: how long after a call its look-up may still rightly not know of it. `concurrency` NULL: the worker's own.
    """
    CREATE TABLE rails (
      id uuid PRIMARY KEY,
      name text NOT NULL UNIQUE CHECK (name ~ '^[a-z][a-z0-9-]{0,62}$'),
      kind text NOT NULL CHECK (kind IN ('sandbox', 'http')),
      status text NOT NULL DEFAULT 'on' CHECK (status IN ('on', 'off')),
      base_url text CHECK (length(base_url) <= 2048),
      secret_sealed bytea,
      authoritative boolean NOT NULL DEFAULT false,
      lag_seconds double precision NOT NULL DEFAULT 0 CHECK (lag_seconds BETWEEN 0 AND 604800),
      concurrency integer CHECK (concurrency BETWEEN 1 AND 10000),
      created_at timestamptz NOT NULL DEFAULT now(),
      CONSTRAINT rails_http_has_address_and_secret CHECK (CASE kind
        WHEN 'http' THEN base_url IS NOT NULL AND secret_sealed IS NOT NULL
        ELSE base_url IS NULL AND secret_sealed IS NULL END))
    """,
    "INSERT INTO rails (id, name, kind) VALUES (gen_random_uuid(), 'sandbox', 'sandbox')",
]

GUARDS = [
    # Another secret or address is another rail: what was sent to the old one could not be asked about any more.
    """
    CREATE TRIGGER rails_terms_fixed BEFORE UPDATE OF id, name, kind ON rails
      FOR EACH ROW WHEN ((OLD.id, OLD.name, OLD.kind) IS DISTINCT FROM (NEW.id, NEW.name, NEW.kind))
      EXECUTE FUNCTION refuse_change()
    """,
    # A rail that is named stays: its payouts would end, or never hear a word again.
    """
    CREATE FUNCTION rails_stay_while_named() RETURNS trigger
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    BEGIN
      IF EXISTS (SELECT 1 FROM shops s WHERE s.rail = OLD.name)
         OR EXISTS (SELECT 1 FROM payout_due d WHERE d.rail = OLD.name) THEN
        RAISE EXCEPTION USING ERRCODE = '23503', CONSTRAINT = 'rails_stay_while_named', TABLE = 'rails',
          MESSAGE = 'a rail stays while a shop or an unfinished payout names it';
      END IF;
      RETURN OLD;
    END $$
    """,
    """
    CREATE TRIGGER rails_stay_while_named BEFORE DELETE ON rails
      FOR EACH ROW EXECUTE FUNCTION rails_stay_while_named()
    """,
    "REVOKE ALL ON FUNCTION rails_stay_while_named() FROM PUBLIC",
]

_SHOWN = "id, name, kind, status, base_url, authoritative, lag_seconds, concurrency, created_at"

GRANTS = [
    "GRANT SELECT ON rails TO payouts_worker",
    "GRANT SELECT (id, name, secret_sealed) ON rails TO payouts_gateway",
    *(f"GRANT SELECT ({_SHOWN}) ON rails TO {role}" for role in ("payouts_ops", "payouts_readonly")),
    "GRANT INSERT, UPDATE (status), DELETE ON rails TO payouts_ops",
    """
    GRANT INSERT (rail, event_id, reference, outcome, failure_code, provider_reference, amount_minor, currency, due_at)
      ON rail_events TO payouts_gateway
    """,
    "GRANT SELECT ON rail_events TO payouts_gateway",
]


def upgrade() -> None:
    """Add it."""
    for statement in TABLES + GUARDS + GRANTS:
        op.execute(statement)
