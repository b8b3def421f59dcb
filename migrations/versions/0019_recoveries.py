"""A database that was restored to an earlier moment waits until operators have had every open payout doubted.

What happened after that moment is forgotten here and known at the rails: a payout that is queued may have been paid. So nothing
is sent and no money moves until `payouts recover` is done. After it the schema refuses to send any of them before its rail has
said that it does not know it.

Old code runs on it; it takes the refusal for a database that is away for now.
"""

from alembic import op
from sqlalchemy import text

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None

TABLES = [
    # All at once: whoever holds one of them is waited for here, before anything is changed. Should it be a deadlock, nothing
    # has happened, and it may be run again.
    "LOCK TABLE entries, payout_attempts IN ACCESS EXCLUSIVE MODE",
    # What happened, and who says so, stands in the audit row. `behind`, `payins_behind`: the last ones that were looked at.
    """
    CREATE TABLE recoveries (
      id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
      restored text NOT NULL CHECK (length(restored) BETWEEN 1 AND 200),
      audit_id bigint NOT NULL UNIQUE REFERENCES audit,
      began_at timestamptz NOT NULL DEFAULT now(),
      behind uuid NOT NULL DEFAULT '00000000-0000-0000-0000-000000000000',
      payouts bigint NOT NULL DEFAULT 0 CHECK (payouts >= 0),
      payins_behind uuid NOT NULL DEFAULT '00000000-0000-0000-0000-000000000000',
      payins bigint NOT NULL DEFAULT 0 CHECK (payins >= 0),
      finished_at timestamptz)
    """,
    "CREATE UNIQUE INDEX recoveries_one_open ON recoveries ((true)) WHERE finished_at IS NULL",
    # An attempt that stands for all those that may have been made and are forgotten.
    "ALTER TABLE payout_attempts DROP CONSTRAINT payout_attempts_action_check",
    """
    ALTER TABLE payout_attempts ADD CONSTRAINT payout_attempts_action_check
      CHECK (action IN ('submit', 'look_up', 'event', 'restore')) NOT VALID
    """,
    "ALTER TABLE payout_attempts DROP CONSTRAINT payout_attempts_outcome_of_action",
    """
    ALTER TABLE payout_attempts ADD CONSTRAINT payout_attempts_outcome_of_action CHECK (CASE action
      WHEN 'submit' THEN outcome NOT IN ('not_found', 'returned')
      WHEN 'look_up' THEN outcome NOT IN ('not_accepted', 'returned')
      WHEN 'restore' THEN outcome = 'unknown' AND finished_at IS NOT NULL
      ELSE outcome IN ('paid', 'declined', 'submitted', 'returned') AND finished_at IS NOT NULL END) NOT VALID
    """,
]

WAITING = [
    # What the server's configuration says: `payouts.restored`, which whoever restores it writes before it is started, or the
    # target that it was recovered to. A standby has neither, whenever it takes over.
    """
    CREATE FUNCTION restored_as() RETURNS text LANGUAGE sql STABLE AS $$
      SELECT left(coalesce(
        nullif(current_setting('payouts.restored', true), ''),
        nullif(current_setting('recovery_target_time', true), ''),
        nullif(current_setting('recovery_target_lsn', true), ''),
        nullif(current_setting('recovery_target_xid', true), ''),
        nullif(current_setting('recovery_target_name', true), ''),
        nullif(current_setting('recovery_target', true), '')), 200)
    $$
    """,
    # In this language a session plans it once.
    """
    CREATE FUNCTION awaits_recovery() RETURNS boolean
      LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
    DECLARE
      mark text := restored_as();
    BEGIN
      RETURN EXISTS (SELECT 1 FROM recoveries WHERE finished_at IS NULL)
          OR mark IS NOT NULL
         AND NOT EXISTS (SELECT 1 FROM recoveries WHERE restored = mark AND finished_at IS NOT NULL);
    END $$
    """,
    # Class 57 is "not now" to every process of ours, whichever version it is.
    """
    CREATE FUNCTION refuse_until_recovered() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
      RAISE EXCEPTION USING ERRCODE = '57P03', CONSTRAINT = TG_NAME, TABLE = TG_TABLE_NAME,
        MESSAGE = 'the database was restored and waits for `payouts recover`';
    END $$
    """,
    # No money moves, and nobody is asked anything. The owner alone doubts.
    *(
        f"""
        CREATE TRIGGER {table}_await_recovery BEFORE INSERT ON {table}
          FOR EACH STATEMENT WHEN (current_user <> 'payouts_owner' AND awaits_recovery())
          EXECUTE FUNCTION refuse_until_recovered()
        """
        for table in ("entries", "payout_attempts")
    ),
    "REVOKE ALL ON FUNCTION refuse_until_recovered() FROM PUBLIC",
]

DOUBTING = [
    # What has expired is doubted like everything else: it may have been sent before it did.
    """
    CREATE OR REPLACE FUNCTION payouts_who_moves() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
      IF current_user = 'payouts_gateway' AND NOT (OLD.state = 'queued' AND NEW.state = 'canceled'
           AND OLD.provider_reference IS NOT DISTINCT FROM NEW.provider_reference)
         OR current_user = 'payouts_worker' AND OLD.state <> 'canceled' AND NEW.state = 'canceled'
         OR NEW.state = 'expired' AND OLD.state <> 'expired' AND coalesce(NEW.expires_at > now(), true)
         OR NEW.state = 'sending' AND OLD.state = 'queued' AND NEW.expires_at <= now() AND current_user <> 'payouts_owner'
      THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'payouts_who_moves', TABLE = 'payouts',
          MESSAGE = current_user || ' may not move a payout to ' || NEW.state || ' now';
      END IF;
      RETURN NEW;
    END $$
    """,
    # Open payouts of a recovery become such whose fate is not known. Locks: due rows, then payouts, in id order.
    """
    CREATE FUNCTION doubt_payouts(ids uuid[], payment_references text[]) RETURNS void
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    BEGIN
      IF NOT EXISTS (SELECT 1 FROM recoveries WHERE finished_at IS NULL) THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'payouts_doubted_by_recovery', TABLE = 'payouts',
          MESSAGE = 'payouts are doubted by a recovery';
      END IF;
      PERFORM 1 FROM payout_due WHERE payout_id = ANY (ids) ORDER BY payout_id FOR UPDATE;
      PERFORM 1 FROM payouts WHERE id = ANY (ids) ORDER BY id FOR NO KEY UPDATE;
      UPDATE payout_attempts SET finished_at = now(), outcome = 'unknown', detail = 'database restored'
       WHERE payout_id = ANY (ids) AND finished_at IS NULL;
      UPDATE payouts SET state = 'sending', version = version + 1, updated_at = now()
       WHERE id = ANY (ids) AND state = 'queued';
      UPDATE payouts SET state = 'verifying', version = version + 1, updated_at = now()
       WHERE id = ANY (ids) AND state = 'sending';
      INSERT INTO payout_attempts (payout_id, shop_id, attempt_no, action, rail, reference, finished_at, outcome, detail)
        SELECT d.payout_id, d.shop_id, 1 + coalesce((SELECT max(attempt_no) FROM payout_attempts t
                                                      WHERE t.payout_id = d.payout_id AND t.shop_id = d.shop_id), 0),
               'restore', d.rail, w.reference, now(), 'unknown', 'database restored'
          FROM unnest(ids, payment_references) AS w (id, reference) JOIN payout_due d ON d.payout_id = w.id;
      UPDATE payout_due d SET lease_token = NULL, due_at = now(),
             verifying_since = CASE WHEN p.state = 'verifying' THEN coalesce(d.verifying_since, now()) END
        FROM payouts p WHERE d.payout_id = ANY (ids) AND p.id = d.payout_id AND p.shop_id = d.shop_id;
    END $$
    """,
    "REVOKE ALL ON FUNCTION doubt_payouts(uuid[], text[]) FROM PUBLIC",
]

GRANTS = [
    "REVOKE ALL ON FUNCTION awaits_recovery() FROM PUBLIC",
    "GRANT EXECUTE ON FUNCTION awaits_recovery() TO payouts_gateway, payouts_worker, payouts_ops, payouts_readonly",
    "GRANT EXECUTE ON FUNCTION doubt_payouts(uuid[], text[]) TO payouts_ops",
    "GRANT SELECT, INSERT (restored, audit_id), UPDATE (behind, payouts, payins_behind, payins, finished_at) ON recoveries"
    " TO payouts_ops",
    "GRANT SELECT ON recoveries TO payouts_readonly",
    # To be asked soon is all that a recovery does to a payin.
    "GRANT UPDATE (due_at, lease_token) ON payin_due TO payouts_ops",
]

# Its other lines are as they were, whoever changed them last.
_LOOK_UP = "WHEN 'look_up' THEN"
_RESTORE = "WHEN 'restore' THEN p.state IN ('submitted', 'verifying')"


def upgrade() -> None:
    """Add it."""
    for statement in TABLES + WAITING + DOUBTING:
        op.execute(statement)
    connection = op.get_bind()
    guard = connection.scalar(text("SELECT pg_get_functiondef('payout_attempts_submit_once()'::regprocedure)"))
    assert guard.count(_LOOK_UP) == 1
    connection.exec_driver_sql(guard.replace(_LOOK_UP, f"{_RESTORE} {_LOOK_UP}"))
    for statement in GRANTS:
        op.execute(statement)
