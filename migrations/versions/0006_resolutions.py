"""What waits for people is known by its age, and two operators say together how a payout ended that no rail tells of.

Old code runs on it; what it moves to `verifying` shows up among what waits after its next look-up by a new worker.
"""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

TABLES = [
    "LOCK TABLE payout_due, payouts IN ACCESS EXCLUSIVE MODE",
    # Here and not in payouts, whose moves touch no index.
    "ALTER TABLE payout_due ADD COLUMN verifying_since timestamptz",
    """
    UPDATE payout_due d SET verifying_since = p.updated_at
      FROM payouts p WHERE p.id = d.payout_id AND p.shop_id = d.shop_id AND p.state = 'verifying'
    """,
    "CREATE INDEX payout_due_by_doubt ON payout_due (verifying_since) WHERE verifying_since IS NOT NULL",
    # Evidence and actors stand in the two audit rows. `is_confirmed` NULL: it is open; false: it was withdrawn.
    """
    CREATE TABLE resolutions (
      id uuid PRIMARY KEY,
      payout_id uuid NOT NULL,
      shop_id uuid NOT NULL,
      reference text NOT NULL CHECK (length(reference) BETWEEN 1 AND 64),
      outcome text NOT NULL CHECK (outcome IN ('paid', 'declined')),
      opened_at timestamptz NOT NULL DEFAULT now(),
      opened_by bigint NOT NULL UNIQUE REFERENCES audit,
      closed_at timestamptz,
      closed_by bigint UNIQUE REFERENCES audit,
      is_confirmed boolean,
      CONSTRAINT resolutions_closed_by_somebody CHECK (num_nulls(closed_at, closed_by, is_confirmed) IN (0, 3)))
    """,
    "CREATE UNIQUE INDEX resolutions_one_open_per_payout ON resolutions (payout_id) WHERE closed_at IS NULL",
    "CREATE INDEX resolutions_by_payout ON resolutions (payout_id)",
    # The name under which their word is heard.
    "ALTER TABLE rails ADD CONSTRAINT rails_name_is_no_ones CHECK (name <> 'operators')",
]

GUARDS = [
    """
    CREATE FUNCTION resolutions_open_whole() RETURNS trigger
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    BEGIN
      IF NEW.closed_at IS NOT NULL
         OR NOT EXISTS (SELECT 1 FROM audit a WHERE a.id = NEW.opened_by AND a.action = 'payout.resolve'
                           AND a.reason IS NOT NULL AND a.detail ->> 'resolution_id' = NEW.id::text
                           AND a.detail ->> 'outcome' = NEW.outcome)
         OR NOT EXISTS (SELECT 1 FROM payouts p JOIN payout_attempts t ON t.payout_id = p.id AND t.shop_id = p.shop_id
                         WHERE p.id = NEW.payout_id AND p.shop_id = NEW.shop_id AND p.state = 'verifying'
                           AND t.attempt_no = 1 AND t.reference = NEW.reference) THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'resolutions_open_whole', TABLE = 'resolutions',
          MESSAGE = 'a resolution is of a payout that is verifying, and has an audit row with evidence';
      END IF;
      RETURN NEW;
    END $$
    """,
    """
    CREATE TRIGGER resolutions_open_whole BEFORE INSERT ON resolutions
      FOR EACH ROW EXECUTE FUNCTION resolutions_open_whole()
    """,
    """
    CREATE FUNCTION resolutions_need_two() RETURNS trigger
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    BEGIN
      IF NOT EXISTS (SELECT 1 FROM audit second JOIN audit first ON first.id = NEW.opened_by
                      WHERE second.id = NEW.closed_by AND second.reason IS NOT NULL
                        AND second.detail ->> 'resolution_id' = NEW.id::text
                        AND CASE WHEN NEW.is_confirmed
                              THEN second.action = 'payout.confirm' AND second.detail ->> 'outcome' = NEW.outcome
                               AND lower(second.actor) <> lower(first.actor)
                              ELSE second.action = 'payout.withdraw' END) THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'resolutions_need_two', TABLE = 'resolutions',
          MESSAGE = 'a resolution is confirmed by another operator than the one who opened it';
      END IF;
      RETURN NEW;
    END $$
    """,
    """
    CREATE TRIGGER resolutions_need_two BEFORE UPDATE ON resolutions
      FOR EACH ROW WHEN (NEW.closed_at IS NOT NULL) EXECUTE FUNCTION resolutions_need_two()
    """,
    """
    CREATE TRIGGER resolutions_stay BEFORE UPDATE ON resolutions
      FOR EACH ROW WHEN (OLD.closed_at IS NOT NULL OR
        (OLD.id, OLD.payout_id, OLD.shop_id, OLD.reference, OLD.outcome, OLD.opened_at, OLD.opened_by) IS DISTINCT FROM
        (NEW.id, NEW.payout_id, NEW.shop_id, NEW.reference, NEW.outcome, NEW.opened_at, NEW.opened_by))
      EXECUTE FUNCTION refuse_change()
    """,
    """
    CREATE TRIGGER resolutions_no_delete BEFORE DELETE ON resolutions
      FOR EACH ROW EXECUTE FUNCTION refuse_change()
    """,
    """
    CREATE TRIGGER resolutions_no_truncate BEFORE TRUNCATE ON resolutions
      FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()
    """,
    """
    CREATE FUNCTION rail_events_of_operators() RETURNS trigger
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    BEGIN
      IF NOT EXISTS (SELECT 1 FROM resolutions r
                      WHERE r.id::text = NEW.event_id AND r.is_confirmed
                        AND r.reference = NEW.reference AND r.outcome = NEW.outcome) THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'rail_events_of_operators', TABLE = 'rail_events',
          MESSAGE = 'operators say only what two of them have confirmed';
      END IF;
      RETURN NEW;
    END $$
    """,
    """
    CREATE TRIGGER rail_events_of_operators BEFORE INSERT ON rail_events
      FOR EACH ROW WHEN (NEW.rail = 'operators') EXECUTE FUNCTION rail_events_of_operators()
    """,
    *(
        f"REVOKE ALL ON FUNCTION {name}() FROM PUBLIC"
        for name in ("resolutions_open_whole", "resolutions_need_two", "rail_events_of_operators")
    ),
]

GRANTS = [
    "GRANT UPDATE (verifying_since) ON payout_due TO payouts_worker",
    "GRANT SELECT ON resolutions TO payouts_ops, payouts_readonly",
    "GRANT INSERT (id, payout_id, shop_id, reference, outcome, opened_by),"
    " UPDATE (closed_at, closed_by, is_confirmed) ON resolutions TO payouts_ops",
    "GRANT INSERT (rail, event_id, reference, outcome, failure_code, provider_reference, amount_minor, currency, due_at)"
    " ON rail_events TO payouts_ops",
    # The sweep counts what is open.
    "GRANT SELECT (closed_at) ON resolutions TO payouts_worker",
    "GRANT SELECT (closed_at) ON discrepancies TO payouts_worker",
]


def upgrade() -> None:
    """Add it."""
    for statement in TABLES + GUARDS + GRANTS:
        op.execute(statement)
