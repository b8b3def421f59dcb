"""The log of callback attempts: with its phases, in partitions of a week each; and shops that are exceptions from where
callbacks may go.

It reads the log once. Gateways and the roles `settle` and `sweep` of old code run on it. Old workers of the role `callbacks` do
not: what they rely on to log an attempt once, no partitioned table can have. Stop them first; what one of them was sending is
sent again when its lease has ended.
"""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

LOG = [
    "LOCK TABLE shops, callback_attempts IN ACCESS EXCLUSIVE MODE",
    "ALTER TABLE callback_attempts DROP CONSTRAINT callback_attempts_pkey",
    "ALTER TABLE callback_attempts RENAME TO callback_attempts_before",
    # The phases are those of the last connection; NULL: the attempt did not come to it.
    """
    CREATE TABLE callback_attempts (
      event_id uuid NOT NULL,
      shop_id uuid NOT NULL,
      attempt_no integer NOT NULL CHECK (attempt_no >= 1),
      started_at timestamptz NOT NULL,
      duration_ms integer NOT NULL CHECK (duration_ms >= 0),
      http_status integer CHECK (http_status BETWEEN 0 AND 999),
      error text CHECK (error ~ '^[a-z0-9_]{1,40}$'),
      response_excerpt bytea CHECK (octet_length(response_excerpt) <= 4096),
      address inet,
      late boolean NOT NULL DEFAULT false,
      dns_ms integer CHECK (dns_ms >= 0),
      connect_ms integer CHECK (connect_ms >= 0),
      first_byte_ms integer CHECK (first_byte_ms >= 0),
      reused boolean NOT NULL DEFAULT false,
      retry_after_seconds integer CHECK (retry_after_seconds >= 0),
      PRIMARY KEY (event_id, shop_id, attempt_no, started_at)) PARTITION BY RANGE (started_at)
    """,
    # Whatever the clock says, an attempt can be recorded.
    "CREATE TABLE callback_attempts_default PARTITION OF callback_attempts DEFAULT",
]

PARTITIONS = [
    # The week of a moment, from Monday in UTC. What the default partition has of it moves over.
    """
    CREATE FUNCTION add_callback_attempts_week(moment timestamptz) RETURNS void
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    DECLARE
      monday timestamp := date_trunc('week', moment AT TIME ZONE 'UTC');
      week text := 'callback_attempts_' || to_char(monday, 'YYYYMMDD');
      begins timestamptz := monday AT TIME ZONE 'UTC';
      ends timestamptz := (monday + interval '7 days') AT TIME ZONE 'UTC';
    BEGIN
      IF to_regclass(week) IS NOT NULL THEN
        RETURN;
      END IF;
      EXECUTE format('CREATE TABLE %I (LIKE callback_attempts INCLUDING DEFAULTS INCLUDING CONSTRAINTS)', week);
      EXECUTE format('WITH strays AS (DELETE FROM callback_attempts_default WHERE started_at >= $1 AND started_at < $2'
                     ' RETURNING *) INSERT INTO %I SELECT * FROM strays', week) USING begins, ends;
      EXECUTE format('ALTER TABLE callback_attempts ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)', week, begins, ends);
    END $$
    """,
    # The lock is its own kind's enemy alone: two that come at the same time make each week once. A new week then waits for
    # whoever uses the default partition, a drop for whoever uses the log; neither makes others wait behind it for long.
    """
    CREATE FUNCTION add_callback_attempts_weeks() RETURNS void
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp SET lock_timeout = '1s' AS $$
    BEGIN
      LOCK TABLE callback_attempts IN SHARE UPDATE EXCLUSIVE MODE;
      FOR ahead IN 0 .. 4 LOOP
        PERFORM add_callback_attempts_week(now() + ahead * interval '7 days');
      END LOOP;
    END $$
    """,
    # Whole weeks, and never one that the rules of `payouts verify` still look at.
    """
    CREATE FUNCTION drop_callback_attempts(keep_days integer) RETURNS integer
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp SET lock_timeout = '1s' AS $$
    DECLARE
      over timestamptz := now() - make_interval(days => greatest(keep_days, 30));
      week text;
      dropped integer := 0;
    BEGIN
      LOCK TABLE callback_attempts IN SHARE UPDATE EXCLUSIVE MODE;
      FOR week IN
        SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
         WHERE i.inhparent = 'callback_attempts'::regclass AND c.relname ~ '^callback_attempts_[0-9]{8}$'
           AND (to_date(right(c.relname, 8), 'YYYYMMDD') + interval '7 days') AT TIME ZONE 'UTC' <= over
      LOOP
        EXECUTE format('DROP TABLE %I', week);
        dropped := dropped + 1;
      END LOOP;
      DELETE FROM callback_attempts_default WHERE started_at < over;
      RETURN dropped;
    END $$
    """,
    *(
        f"REVOKE ALL ON FUNCTION {signature} FROM PUBLIC"
        for signature in (
            "add_callback_attempts_week(timestamptz)",
            "add_callback_attempts_weeks()",
            "drop_callback_attempts(integer)",
        )
    ),
    "GRANT EXECUTE ON FUNCTION add_callback_attempts_weeks(), drop_callback_attempts(integer) TO payouts_worker",
]

MOVE = [
    *(f"SELECT add_callback_attempts_week(now() + {ahead} * interval '7 days')" for ahead in range(5)),
    """
    SELECT add_callback_attempts_week(week)
      FROM (SELECT DISTINCT date_trunc('week', started_at) AS week FROM callback_attempts_before) w
    """,
    """
    INSERT INTO callback_attempts (event_id, shop_id, attempt_no, started_at, duration_ms, http_status, error,
                                   response_excerpt, address, late)
      SELECT event_id, shop_id, attempt_no, started_at, duration_ms, http_status, error, response_excerpt, address, late
        FROM callback_attempts_before
    """,
    "DROP TABLE callback_attempts_before",
]

SHOPS = [
    # What a shop may that the settings forbid: callbacks over http, and other ports (NULL: those of the settings).
    "ALTER TABLE shops ADD COLUMN callback_http boolean NOT NULL DEFAULT false",
    """
    ALTER TABLE shops ADD COLUMN callback_ports integer[] CHECK (cardinality(callback_ports) BETWEEN 1 AND 100
      AND array_position(callback_ports, NULL) IS NULL AND 1 <= ALL (callback_ports) AND 65535 >= ALL (callback_ports))
    """,
]

GRANTS = [
    "GRANT SELECT, INSERT ON callback_attempts TO payouts_worker",
    "GRANT SELECT ON callback_attempts TO payouts_ops, payouts_readonly",
    "GRANT SELECT (callback_http, callback_ports) ON shops TO payouts_gateway, payouts_ops, payouts_readonly",
    "GRANT UPDATE (callback_http, callback_ports) ON shops TO payouts_ops",
]


def upgrade() -> None:
    """Add it."""
    for statement in LOG + PARTITIONS + MOVE + SHOPS + GRANTS:
        op.execute(statement)
