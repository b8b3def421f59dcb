"""Lanes: the callbacks of one shop to one origin wait in a line of their own, with a pace, a breaker and a hold.

Old code does not run on it: it knows no lanes, so what it appends is refused. Stop gateways and workers before, start new ones
after.
"""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

# The origin of a URL (RFC 6454) whose text `parse_callback_url` has let pass: what stands there of another case or with a port
# left out came before lanes, and gets a lane of its own.
_ORIGIN = "lower(substring({url} FROM '^[A-Za-z]+://[^/?#]+'))"

TABLES = [
    "LOCK TABLE callbacks, callback_due IN ACCESS EXCLUSIVE MODE",
    # The lock of a merchant's lanes: whoever takes, gives back or ends a callback of the merchant holds this row.
    """
    CREATE TABLE callback_shares (
      merchant_id uuid PRIMARY KEY REFERENCES merchants (id),
      created_at timestamptz NOT NULL DEFAULT now())
      WITH (fillfactor = 50)
    """,
    """
    CREATE TABLE callback_lanes (
      id uuid PRIMARY KEY,
      shop_id uuid NOT NULL,
      merchant_id uuid NOT NULL,
      origin text NOT NULL CHECK (length(origin) BETWEEN 1 AND 2048),
      cap integer NOT NULL DEFAULT 8 CHECK (cap BETWEEN 1 AND 256),
      in_flight integer NOT NULL DEFAULT 0 CHECK (in_flight >= 0),
      streak integer NOT NULL DEFAULT 0 CHECK (streak >= 0),
      trouble double precision NOT NULL DEFAULT 0 CHECK (trouble BETWEEN 0 AND 1),
      latency_ms integer CHECK (latency_ms >= 0),
      opened integer NOT NULL DEFAULT 0 CHECK (opened >= 0),
      blocked_until timestamptz NOT NULL DEFAULT '-infinity',
      failing_since timestamptz,
      held_at timestamptz,
      held_reason text CHECK (length(held_reason) BETWEEN 1 AND 1000),
      ready_at timestamptz NOT NULL DEFAULT 'infinity',
      taken_at timestamptz NOT NULL DEFAULT '-infinity',
      created_at timestamptz NOT NULL DEFAULT now(),
      UNIQUE (shop_id, origin),
      CONSTRAINT callback_lanes_say_why_held CHECK ((held_at IS NULL) = (held_reason IS NULL)),
      CONSTRAINT callback_lanes_held_are_never_ready CHECK (held_at IS NULL OR ready_at = 'infinity'))
      WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_cost_delay = 0)
    """,
    "CREATE INDEX callback_lanes_by_turn ON callback_lanes (ready_at)",
    "CREATE INDEX callback_lanes_in_flight ON callback_lanes (merchant_id) WHERE in_flight > 0",
    "CREATE INDEX callback_lanes_failing ON callback_lanes (failing_since) WHERE failing_since IS NOT NULL",
    "CREATE INDEX callback_lanes_held ON callback_lanes (held_at) WHERE held_at IS NOT NULL",
    # The same id wherever it is computed, so that whoever appends a callback need not look for its lane.
    """
    CREATE FUNCTION callback_lane_id(shop_id uuid, origin text) RETURNS uuid
      LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $$ SELECT md5(shop_id::text || ' ' || origin)::uuid $$
    """,
    "ALTER TABLE callback_lanes ADD CONSTRAINT callback_lanes_id_of_origin CHECK (id = callback_lane_id(shop_id, origin))",
    """
    ALTER TABLE callback_due ADD COLUMN lane_id uuid,
      ADD COLUMN in_lane boolean NOT NULL DEFAULT false,
      ADD COLUMN lost_leases integer NOT NULL DEFAULT 0 CHECK (lost_leases >= 0),
      ADD COLUMN resume_at timestamptz
    """,
    f"""
    WITH due AS (
      SELECT d.event_id, d.shop_id, s.merchant_id, {_ORIGIN.format(url="c.url")} AS origin
        FROM callback_due d
        JOIN callbacks c ON c.event_id = d.event_id AND c.shop_id = d.shop_id
        JOIN shops s ON s.id = d.shop_id),
    shares AS (
      INSERT INTO callback_shares (merchant_id) SELECT DISTINCT merchant_id FROM due),
    lanes AS (
      INSERT INTO callback_lanes (id, shop_id, merchant_id, origin)
      SELECT DISTINCT callback_lane_id(shop_id, origin), shop_id, merchant_id, origin FROM due)
    UPDATE callback_due d
       SET lane_id = callback_lane_id(due.shop_id, due.origin), lease_token = NULL,
           due_at = CASE WHEN d.lease_token IS NULL THEN d.due_at ELSE now() END
      FROM due WHERE d.event_id = due.event_id AND d.shop_id = due.shop_id
    """,
    "ALTER TABLE callback_due ALTER COLUMN lane_id SET NOT NULL",
    "DROP INDEX callback_due_by_time",
    # It waits in its lane, or somebody has it; what was never claimed is found whether its lane knows of it or not.
    "CREATE INDEX callback_due_by_lane ON callback_due (lane_id, due_at) WHERE lease_token IS NULL",
    "CREATE INDEX callback_due_fresh ON callback_due (lane_id, due_at) WHERE lease_token IS NULL AND NOT in_lane",
    "CREATE INDEX callback_due_leased ON callback_due (due_at) WHERE lease_token IS NOT NULL",
    """
    CREATE TABLE callback_replays (
      id uuid PRIMARY KEY,
      filter jsonb NOT NULL,
      per_second integer NOT NULL CHECK (per_second BETWEEN 1 AND 100000),
      behind uuid,
      sent bigint NOT NULL DEFAULT 0 CHECK (sent >= 0),
      passed_over bigint NOT NULL DEFAULT 0 CHECK (passed_over >= 0),
      actor text NOT NULL,
      reason text NOT NULL,
      created_at timestamptz NOT NULL DEFAULT now(),
      finished_at timestamptz)
    """,
]

GUARDS = [
    # A row belongs to the lane of its callback's shop; which of the shop's lanes is for the code to say, who alone parses URLs.
    """
    CREATE OR REPLACE FUNCTION callback_due_has_callback() RETURNS trigger
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    BEGIN
      IF EXISTS (
        SELECT 1 FROM fresh d LEFT JOIN callbacks c ON c.event_id = d.event_id AND c.shop_id = d.shop_id
         WHERE coalesce(c.state <> 'pending', true)) THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'callback_due_has_callback', TABLE = 'callback_due',
          MESSAGE = 'what is due belongs to a callback that is pending';
      END IF;
      IF EXISTS (
        SELECT 1 FROM fresh d LEFT JOIN callback_lanes l ON l.id = d.lane_id AND l.shop_id = d.shop_id WHERE l.id IS NULL) THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'callback_due_has_lane', TABLE = 'callback_due',
          MESSAGE = 'what is due waits in a lane of its shop';
      END IF;
      RETURN NULL;
    END $$
    """,
    # A lane is its merchant's, and its place is never changed.
    """
    CREATE FUNCTION callback_lanes_of_their_shop() RETURNS trigger
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    BEGIN
      IF EXISTS (
        SELECT 1 FROM fresh l
          LEFT JOIN shops s ON s.id = l.shop_id AND s.merchant_id = l.merchant_id
          LEFT JOIN callback_shares h ON h.merchant_id = l.merchant_id
         WHERE s.id IS NULL OR h.merchant_id IS NULL) THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'callback_lanes_of_their_shop', TABLE = 'callback_lanes',
          MESSAGE = 'a lane is of a shop and its merchant, who has a share';
      END IF;
      RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER callback_lanes_of_their_shop AFTER INSERT ON callback_lanes REFERENCING NEW TABLE AS fresh
      FOR EACH STATEMENT EXECUTE FUNCTION callback_lanes_of_their_shop()
    """,
    "REVOKE ALL ON FUNCTION callback_lanes_of_their_shop() FROM PUBLIC",
    # The gateway brings forward what waits, for a merchant who wants it again; nothing else.
    """
    CREATE TRIGGER callback_due_brought_forward BEFORE UPDATE ON callback_due
      FOR EACH ROW WHEN (current_user = 'payouts_gateway'
        AND (OLD.lease_token IS NOT NULL OR NEW.due_at > now() OR NEW.in_lane))
      EXECUTE FUNCTION refuse_change()
    """,
    """
    CREATE TRIGGER callback_shares_stay BEFORE UPDATE OR DELETE ON callback_shares
      FOR EACH ROW EXECUTE FUNCTION refuse_change()
    """,
]

_PACE = (
    "cap, in_flight, streak, trouble, latency_ms, opened, blocked_until, failing_since, held_at, held_reason, ready_at,"
    " taken_at"
)

GRANTS = [
    "REVOKE INSERT ON callback_due FROM payouts_gateway",
    "GRANT INSERT (event_id, shop_id, lane_id, attempts_made) ON callback_due TO payouts_gateway",
    *(
        f"GRANT SELECT ON callback_shares, callback_lanes TO {role}"
        for role in ("payouts_worker", "payouts_ops", "payouts_readonly")
    ),
    *(
        f"GRANT INSERT (merchant_id) ON callback_shares TO {role}"
        for role in ("payouts_gateway", "payouts_worker", "payouts_ops")
    ),
    *(
        f"GRANT INSERT (id, shop_id, merchant_id, origin) ON callback_lanes TO {role}"
        for role in ("payouts_gateway", "payouts_worker", "payouts_ops")
    ),
    # To lock a row one must be allowed to update some column of it; of these no update is possible.
    "GRANT UPDATE (created_at) ON callback_shares TO payouts_worker, payouts_ops",
    f"GRANT UPDATE ({_PACE}) ON callback_lanes TO payouts_worker, payouts_ops",
    "GRANT UPDATE (in_lane, lost_leases, resume_at) ON callback_due TO payouts_worker, payouts_ops",
    "GRANT SELECT, INSERT, UPDATE (behind, sent, passed_over, finished_at) ON callback_replays TO payouts_ops",
    "GRANT SELECT ON callback_replays TO payouts_readonly",
]


def upgrade() -> None:
    """Add them."""
    for statement in TABLES + GUARDS + GRANTS:
        op.execute(statement)
