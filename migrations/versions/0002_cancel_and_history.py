"""A queued payout can be canceled, or expires; every move of a payout leaves a line of history.

It reads all payouts once. Old code runs on it: it writes no `expires_at`, its moves leave their lines like those of new
code, and what has expired it cannot send, since the schema does not let it.
"""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TABLES = [
    # All at once: whoever holds one of them is waited for here, before anything is changed. Should it be a deadlock, nothing
    # has happened, and it may be run again.
    "LOCK TABLE payout_due, payouts, entries, callbacks, callback_due IN ACCESS EXCLUSIVE MODE",
    "ALTER TABLE payouts ADD COLUMN expires_at timestamptz",
    # A copy, so that what has expired is found without a look at payouts.
    "ALTER TABLE payout_due ADD COLUMN expires_at timestamptz",
    "CREATE INDEX payout_due_by_expiry ON payout_due (expires_at, payout_id) WHERE expires_at IS NOT NULL",
    """
    CREATE TABLE payout_moves (
      payout_id uuid NOT NULL,
      shop_id uuid NOT NULL,
      version integer NOT NULL CHECK (version >= 2),
      state text NOT NULL,
      at timestamptz NOT NULL DEFAULT now(),
      PRIMARY KEY (payout_id, shop_id, version))
    """,
    # Of what has moved before, only the last line is known.
    """
    INSERT INTO payout_moves (payout_id, shop_id, version, state, at)
      SELECT id, shop_id, version, state, updated_at FROM payouts WHERE version > 1
    """,
]

GUARDS = [
    """
    CREATE TRIGGER payout_moves_append_only BEFORE UPDATE OR DELETE ON payout_moves
      FOR EACH ROW EXECUTE FUNCTION refuse_change()
    """,
    """
    CREATE TRIGGER payout_moves_no_truncate BEFORE TRUNCATE ON payout_moves
      FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()
    """,
    # Written here, so that no code can move a payout and forget it; no role may write it otherwise.
    """
    CREATE FUNCTION payouts_leave_history() RETURNS trigger
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    BEGIN
      INSERT INTO payout_moves (payout_id, shop_id, version, state)
        SELECT f.id, f.shop_id, f.version, f.state
          FROM fresh f JOIN before b ON b.id = f.id AND b.shop_id = f.shop_id WHERE b.version <> f.version;
      RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER payouts_leave_history AFTER UPDATE ON payouts REFERENCING OLD TABLE AS before NEW TABLE AS fresh
      FOR EACH STATEMENT EXECUTE FUNCTION payouts_leave_history()
    """,
    "REVOKE ALL ON FUNCTION payouts_leave_history() FROM PUBLIC",
    """
    CREATE TRIGGER payouts_expiry_fixed BEFORE UPDATE OF expires_at ON payouts
      FOR EACH ROW WHEN (OLD.expires_at IS DISTINCT FROM NEW.expires_at) EXECUTE FUNCTION refuse_change()
    """,
    # The due row's copy is the payout's word, and stays.
    """
    CREATE FUNCTION payout_due_expiry_matches() RETURNS trigger
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    BEGIN
      IF EXISTS (
        SELECT 1 FROM moved d JOIN payouts p ON p.id = d.payout_id AND p.shop_id = d.shop_id
         WHERE d.expires_at IS DISTINCT FROM p.expires_at) THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'payout_due_expiry_matches', TABLE = 'payout_due',
          MESSAGE = 'a due row expires when its payout does';
      END IF;
      RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER payout_due_expiry_matches AFTER INSERT ON payout_due REFERENCING NEW TABLE AS moved
      FOR EACH STATEMENT EXECUTE FUNCTION payout_due_expiry_matches()
    """,
    """
    CREATE TRIGGER payout_due_expiry_fixed BEFORE UPDATE OF expires_at ON payout_due
      FOR EACH ROW WHEN (OLD.expires_at IS DISTINCT FROM NEW.expires_at) EXECUTE FUNCTION refuse_change()
    """,
    "REVOKE ALL ON FUNCTION payout_due_expiry_matches() FROM PUBLIC",
    # The gateway cancels, and moves a payout in no other way; nobody lets one expire before its time, or sends one after it.
    """
    CREATE FUNCTION payouts_who_moves() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
      IF current_user = 'payouts_gateway' AND NOT (OLD.state = 'queued' AND NEW.state = 'canceled'
           AND OLD.provider_reference IS NOT DISTINCT FROM NEW.provider_reference)
         OR current_user = 'payouts_worker' AND OLD.state <> 'canceled' AND NEW.state = 'canceled'
         OR NEW.state = 'expired' AND OLD.state <> 'expired' AND coalesce(NEW.expires_at > now(), true)
         OR NEW.state = 'sending' AND OLD.state = 'queued' AND NEW.expires_at <= now()
      THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'payouts_who_moves', TABLE = 'payouts',
          MESSAGE = current_user || ' may not move a payout to ' || NEW.state || ' now';
      END IF;
      RETURN NEW;
    END $$
    """,
    """
    CREATE TRIGGER payouts_who_moves BEFORE UPDATE ON payouts
      FOR EACH ROW EXECUTE FUNCTION payouts_who_moves()
    """,
    "REVOKE ALL ON FUNCTION payouts_who_moves() FROM PUBLIC",
    # What is told, and to whom, is the payout's and its shop's word; no role can have anything else told, or to anybody else.
    # A shop may have got another URL since the transaction read it: as a serialization failure, it is repeated.
    """
    CREATE FUNCTION callbacks_match_event() RETURNS trigger
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    BEGIN
      IF EXISTS (
        SELECT 1 FROM fresh c
          LEFT JOIN events e ON e.id = c.event_id AND e.shop_id = c.shop_id AND e.payout_id = c.payout_id
         WHERE e.id IS NULL OR c.state <> 'pending') THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'callbacks_match_event', TABLE = 'callbacks',
          MESSAGE = 'a callback tells an event of its payout';
      END IF;
      IF EXISTS (
        SELECT 1 FROM fresh c JOIN payouts p ON p.id = c.payout_id AND p.shop_id = c.shop_id
          JOIN shops s ON s.id = c.shop_id
         WHERE c.url IS DISTINCT FROM coalesce(p.callback_url, s.webhook_url)) THEN
        RAISE EXCEPTION USING ERRCODE = '40001', CONSTRAINT = 'callbacks_match_url', TABLE = 'callbacks',
          MESSAGE = 'a callback goes to the URL of its payout, else of its shop';
      END IF;
      RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER callbacks_match_event AFTER INSERT ON callbacks REFERENCING NEW TABLE AS fresh
      FOR EACH STATEMENT EXECUTE FUNCTION callbacks_match_event()
    """,
    """
    CREATE FUNCTION callback_due_has_callback() RETURNS trigger
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    BEGIN
      IF EXISTS (
        SELECT 1 FROM fresh d LEFT JOIN callbacks c ON c.event_id = d.event_id AND c.shop_id = d.shop_id
         WHERE coalesce(c.state <> 'pending', true)) THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'callback_due_has_callback', TABLE = 'callback_due',
          MESSAGE = 'what is due belongs to a callback that is pending';
      END IF;
      RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER callback_due_has_callback AFTER INSERT ON callback_due REFERENCING NEW TABLE AS fresh
      FOR EACH STATEMENT EXECUTE FUNCTION callback_due_has_callback()
    """,
    "REVOKE ALL ON FUNCTION callbacks_match_event() FROM PUBLIC",
    "REVOKE ALL ON FUNCTION callback_due_has_callback() FROM PUBLIC",
    "DROP POLICY entries_of_gateway ON entries",
    "CREATE POLICY entries_of_gateway ON entries FOR INSERT TO payouts_gateway WITH CHECK (kind IN ('hold', 'release'))",
]

GRANTS = [
    "GRANT SELECT (hold_seq, resolution_seq, expires_at) ON payouts TO payouts_gateway",
    """
    GRANT UPDATE (state, version, failure_code, provider_reference, resolution_seq, updated_at, finalized_at)
      ON payouts TO payouts_gateway
    """,
    # To lock a row one must be allowed to update some column of it; of this one no update is possible.
    "GRANT SELECT, UPDATE (expires_at), DELETE ON payout_due TO payouts_gateway",
    "GRANT INSERT ON events, callbacks, callback_due TO payouts_gateway",
    *(
        f"GRANT SELECT ON payout_moves TO {role}"
        for role in ("payouts_gateway", "payouts_worker", "payouts_ops", "payouts_readonly")
    ),
    *(f"GRANT SELECT (expires_at) ON payouts TO {role}" for role in ("payouts_ops", "payouts_readonly")),
]


def upgrade() -> None:
    """Add it."""
    for statement in TABLES + GUARDS + GRANTS:
        op.execute(statement)
