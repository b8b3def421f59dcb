"""What rails say by themselves: an inbox, refunds of what a bank returned, and discrepancies for people.

Old gateways run on it. Old workers of the role `settle` must have left before new ones come: they take a word of a rail for
the attempt that is under way. Checks that are wider than those they replace are not validated: what is there fits them.
"""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

AMOUNT_MINOR_MAX = 10**15
TABLES = [
    # All at once: whoever holds one of them is waited for here, before anything is changed. Should it be a deadlock, nothing
    # has happened, and it may be run again.
    "LOCK TABLE payout_due, payouts, entries, payout_attempts IN ACCESS EXCLUSIVE MODE",
    # The inbox: an event is stored before it is acknowledged, and applied once, by whoever gets to it first.
    f"""
    CREATE TABLE rail_events (
      rail text NOT NULL CHECK (length(rail) BETWEEN 1 AND 64),
      event_id text NOT NULL CHECK (length(event_id) BETWEEN 1 AND 200),
      reference text NOT NULL CHECK (length(reference) BETWEEN 1 AND 64),
      outcome text NOT NULL CHECK (outcome IN ('paid', 'declined', 'submitted', 'returned')),
      failure_code text CHECK (length(failure_code) BETWEEN 1 AND 64),
      provider_reference text CHECK (length(provider_reference) BETWEEN 1 AND 200),
      amount_minor bigint CHECK (amount_minor BETWEEN 1 AND {AMOUNT_MINOR_MAX}),
      currency text CHECK (currency ~ '^[A-Z]{{3}}$'),
      received_at timestamptz NOT NULL DEFAULT now(),
      due_at timestamptz NOT NULL DEFAULT now(),
      applied_at timestamptz,
      effect text CHECK (effect IN ('moved', 'known', 'discrepancy')),
      PRIMARY KEY (rail, event_id),
      CONSTRAINT rail_events_effect_iff_applied CHECK ((applied_at IS NULL) = (effect IS NULL)))
      WITH (fillfactor = 80)
    """,
    "CREATE INDEX rail_events_by_reference ON rail_events (reference)",
    "CREATE INDEX rail_events_due ON rail_events (due_at) WHERE applied_at IS NULL",
    # A word that contradicts what we know. It moves no money; people look into it and say how it ended.
    """
    CREATE TABLE discrepancies (
      id uuid PRIMARY KEY,
      rail text NOT NULL,
      reference text NOT NULL CHECK (length(reference) BETWEEN 1 AND 64),
      payout_id uuid,
      shop_id uuid,
      state text,
      word text NOT NULL CHECK (length(word) BETWEEN 1 AND 64),
      kind text NOT NULL CHECK (kind IN ('status', 'amount', 'reference')),
      detail text NOT NULL DEFAULT '' CHECK (length(detail) <= 500),
      opened_at timestamptz NOT NULL DEFAULT now(),
      closed_at timestamptz,
      audit_id bigint UNIQUE REFERENCES audit,
      CONSTRAINT discrepancies_closed_by_somebody CHECK ((closed_at IS NULL) = (audit_id IS NULL)),
      CONSTRAINT discrepancies_payout_and_shop CHECK ((payout_id IS NULL) = (shop_id IS NULL)))
    """,
    # The same contradiction is opened once, however often it is repeated.
    "CREATE UNIQUE INDEX discrepancies_once ON discrepancies (rail, reference, kind, word, detail)"
    " WHERE closed_at IS NULL",
    "CREATE INDEX discrepancies_by_payout ON discrepancies (payout_id) WHERE payout_id IS NOT NULL",
    "ALTER TABLE payouts ADD COLUMN return_seq bigint",
    "ALTER TABLE payouts ADD CONSTRAINT payouts_returned_iff_refunded CHECK ((return_seq IS NOT NULL) = (state = 'refunded'))"
    " NOT VALID",
    "ALTER TABLE entries DROP CONSTRAINT entries_arithmetic",
    """
    ALTER TABLE entries ADD CONSTRAINT entries_arithmetic CHECK (CASE kind
      WHEN 'hold' THEN contra = 'holds' AND posted_delta_minor = 0 AND held_delta_minor = amount_minor
      WHEN 'capture' THEN contra = 'provider_clearing'
        AND posted_delta_minor = -amount_minor AND held_delta_minor = -amount_minor
      WHEN 'release' THEN contra = 'holds' AND posted_delta_minor = 0 AND held_delta_minor = -amount_minor
      WHEN 'payout_return' THEN contra = 'provider_clearing'
        AND posted_delta_minor = amount_minor AND held_delta_minor = 0
      WHEN 'adjustment' THEN contra = 'adjustments'
        AND abs(posted_delta_minor) = amount_minor AND held_delta_minor = 0
      ELSE false END) NOT VALID
    """,
    "CREATE UNIQUE INDEX entries_one_return_per_payout ON entries (payout_id, shop_id) WHERE kind = 'payout_return'",
    # An event is a word like the answer to a call, and stands in the same list.
    "ALTER TABLE payout_attempts DROP CONSTRAINT payout_attempts_action_check",
    """
    ALTER TABLE payout_attempts ADD CONSTRAINT payout_attempts_action_check
      CHECK (action IN ('submit', 'look_up', 'event')) NOT VALID
    """,
    "ALTER TABLE payout_attempts DROP CONSTRAINT payout_attempts_outcome_check",
    """
    ALTER TABLE payout_attempts ADD CONSTRAINT payout_attempts_outcome_check
      CHECK (outcome IN ('paid', 'declined', 'submitted', 'not_accepted', 'not_found', 'returned', 'unknown'))
      NOT VALID
    """,
    "ALTER TABLE payout_attempts DROP CONSTRAINT payout_attempts_outcome_of_action",
    """
    ALTER TABLE payout_attempts ADD CONSTRAINT payout_attempts_outcome_of_action CHECK (CASE action
      WHEN 'submit' THEN outcome NOT IN ('not_found', 'returned')
      WHEN 'look_up' THEN outcome NOT IN ('not_accepted', 'returned')
      ELSE outcome IN ('paid', 'declined', 'submitted', 'returned') AND finished_at IS NOT NULL END) NOT VALID
    """,
]

# The functions of the first schema, with what is new in them.
GUARDS = [
    """
    CREATE OR REPLACE FUNCTION payouts_allow_move() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
      IF NEW.version <> OLD.version + 1 OR (OLD.state || '>' || NEW.state) NOT IN (
           'queued>sending', 'queued>failed', 'queued>canceled', 'queued>expired',
           'sending>queued', 'sending>submitted', 'sending>verifying', 'sending>success', 'sending>failed',
           'submitted>verifying', 'submitted>success', 'submitted>failed',
           'verifying>queued', 'verifying>submitted', 'verifying>success', 'verifying>failed',
           'success>refunded') THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'payouts_moves', TABLE = 'payouts',
          MESSAGE = 'payout may not move from ' || OLD.state || ' to ' || NEW.state;
      END IF;
      RETURN NEW;
    END $$
    """,
    """
    CREATE OR REPLACE FUNCTION entries_move_accounts() RETURNS trigger
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    DECLARE
      accounts_named integer;
      accounts_moved integer;
    BEGIN
      SELECT count(DISTINCT account_id) INTO accounts_named FROM fresh;
      UPDATE accounts a
         SET posted_minor = a.posted_minor + s.posted, held_minor = a.held_minor + s.held, last_seq = s.last_seq
        FROM (SELECT account_id, count(*) AS n, min(seq) AS first_seq, max(seq) AS last_seq,
                     sum(posted_delta_minor)::bigint AS posted, sum(held_delta_minor)::bigint AS held
                FROM fresh GROUP BY account_id) s
       WHERE a.id = s.account_id AND s.first_seq = a.last_seq + 1 AND s.last_seq = a.last_seq + s.n;
      GET DIAGNOSTICS accounts_moved = ROW_COUNT;
      IF accounts_moved <> accounts_named OR EXISTS (
        SELECT 1
          FROM (SELECT account_id, shop_id, posted_after_minor, held_after_minor,
                       coalesce(sum(posted_delta_minor) OVER later, 0) AS posted_later,
                       coalesce(sum(held_delta_minor) OVER later, 0) AS held_later
                  FROM fresh
                WINDOW later AS (PARTITION BY account_id ORDER BY seq DESC
                                 ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)) f
          LEFT JOIN accounts a ON a.id = f.account_id AND a.shop_id = f.shop_id
         WHERE a.id IS NULL
            OR f.posted_after_minor + f.posted_later <> a.posted_minor
            OR f.held_after_minor + f.held_later <> a.held_minor) THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'entries_chain', TABLE = 'entries',
          MESSAGE = 'entries do not continue their account';
      END IF;
      IF EXISTS (
        SELECT 1 FROM fresh f LEFT JOIN payouts p ON p.id = f.payout_id AND p.shop_id = f.shop_id
         WHERE f.kind <> 'adjustment' AND NOT coalesce(
           p.amount_minor = f.amount_minor AND p.account_id = f.account_id AND CASE f.kind
             WHEN 'hold' THEN p.hold_seq = f.seq AND p.state = 'queued'
             WHEN 'capture' THEN p.resolution_seq = f.seq AND p.state = 'success'
             WHEN 'payout_return' THEN p.return_seq = f.seq AND p.state = 'refunded'
             WHEN 'release' THEN p.resolution_seq = f.seq AND p.state IN ('failed', 'canceled', 'expired') END, false)) THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'entries_match_payout', TABLE = 'entries',
          MESSAGE = 'an entry does not match its payout';
      END IF;
      IF EXISTS (
        SELECT 1 FROM fresh f
          JOIN LATERAL (SELECT (array_agg(t.outcome ORDER BY t.attempt_no DESC))[1] AS latest,
                               bool_or(t.outcome = 'paid') AS paid,
                               bool_or(t.action = 'submit' AND t.finished_at IS NULL) AS under_way,
                               coalesce(max(t.attempt_no) FILTER (WHERE t.outcome = 'submitted'), 0)
                                 > coalesce(max(t.attempt_no) FILTER (WHERE t.outcome = 'declined'), 0) AS taken,
                               count(*) AS made FROM payout_attempts t
                         WHERE t.payout_id = f.payout_id AND t.shop_id = f.shop_id) word ON true
         WHERE f.kind = 'release' AND word.made > 0
           AND (word.paid OR word.under_way OR word.taken
                OR coalesce(word.latest, '') NOT IN ('declined', 'not_accepted', 'not_found'))) THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'entries_release_is_definite', TABLE = 'entries',
          MESSAGE = 'money may not be released while its fate at the rail is unknown';
      END IF;
      IF EXISTS (
        SELECT 1 FROM fresh f WHERE f.kind = 'capture' AND NOT EXISTS (
          SELECT 1 FROM payout_attempts t
           WHERE t.payout_id = f.payout_id AND t.shop_id = f.shop_id AND t.outcome = 'paid')) THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'entries_capture_was_paid', TABLE = 'entries',
          MESSAGE = 'money may be captured only when the rail said that it paid';
      END IF;
      IF EXISTS (
        SELECT 1 FROM fresh f WHERE f.kind = 'payout_return' AND NOT EXISTS (
          SELECT 1 FROM payout_attempts t
           WHERE t.payout_id = f.payout_id AND t.shop_id = f.shop_id AND t.outcome = 'returned')) THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'entries_return_was_said', TABLE = 'entries',
          MESSAGE = 'money comes back only when the rail said that it was returned';
      END IF;
      IF EXISTS (
        SELECT 1 FROM fresh f LEFT JOIN audit a ON a.id = f.audit_id
         WHERE f.kind = 'adjustment' AND NOT coalesce(
           a.action = 'balance.topup' AND a.detail ->> 'account_id' = f.account_id::text
           AND a.detail ->> 'amount_minor' = f.posted_delta_minor::text, false)) THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'entries_match_audit', TABLE = 'entries',
          MESSAGE = 'an adjustment must be what its audit row says';
      END IF;
      RETURN NULL;
    END $$
    """,
    """
    CREATE OR REPLACE FUNCTION payouts_end_whole() RETURNS trigger
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    BEGIN
      IF EXISTS (
        SELECT 1 FROM fresh p
          LEFT JOIN entries e ON e.account_id = p.account_id AND e.seq = p.resolution_seq
         WHERE p.resolution_seq IS NOT NULL AND (
           e.payout_id IS DISTINCT FROM p.id
           OR e.kind IS DISTINCT FROM CASE WHEN p.state IN ('success', 'refunded') THEN 'capture' ELSE 'release' END))
      OR EXISTS (
        SELECT 1 FROM fresh p
          LEFT JOIN entries e ON e.account_id = p.account_id AND e.seq = p.return_seq
         WHERE p.return_seq IS NOT NULL
           AND (e.payout_id IS DISTINCT FROM p.id OR e.kind IS DISTINCT FROM 'payout_return')) THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'payouts_end_whole', TABLE = 'payouts',
          MESSAGE = 'a payout ends together with the entry that resolves its hold';
      END IF;
      RETURN NULL;
    END $$
    """,
    """
    CREATE OR REPLACE FUNCTION payout_attempts_submit_once() RETURNS trigger
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    BEGIN
      IF EXISTS (
        SELECT 1 FROM fresh f LEFT JOIN payout_attempts before
            ON before.payout_id = f.payout_id AND before.shop_id = f.shop_id AND before.attempt_no = f.attempt_no - 1
          LEFT JOIN payouts p ON p.id = f.payout_id AND p.shop_id = f.shop_id
         WHERE (CASE f.action WHEN 'submit' THEN p.state = 'sending'
                  WHEN 'look_up' THEN p.state IN ('submitted', 'verifying')
                  ELSE f.attempt_no > 1 AND p.state <> 'refunded' END)
               IS NOT TRUE
            OR f.attempt_no > 1 AND (before.payout_id IS NULL OR before.reference <> f.reference
              OR (f.action = 'submit' AND coalesce(before.outcome, '') NOT IN ('not_accepted', 'not_found')))) THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'payout_attempts_submit_once', TABLE = 'payout_attempts',
          MESSAGE = 'a payout is sent while it is sending, and again only after a definite "not accepted"';
      END IF;
      RETURN NULL;
    END $$
    """,
    "DROP TRIGGER payouts_end_stays ON payouts",
    # How a payout ended stays as it was told, but for what a return adds.
    """
    CREATE TRIGGER payouts_end_stays BEFORE UPDATE OF failure_code, finalized_at, resolution_seq, return_seq,
        provider_reference ON payouts
      FOR EACH ROW WHEN (OLD.resolution_seq IS NOT NULL AND (
          (OLD.finalized_at, OLD.resolution_seq, OLD.provider_reference)
          IS DISTINCT FROM (NEW.finalized_at, NEW.resolution_seq, NEW.provider_reference)
          OR (OLD.failure_code, OLD.return_seq) IS DISTINCT FROM (NEW.failure_code, NEW.return_seq)
            AND NOT (OLD.state = 'success' AND NEW.state = 'refunded'))
        OR OLD.provider_reference IS NOT NULL AND OLD.provider_reference IS DISTINCT FROM NEW.provider_reference)
      EXECUTE FUNCTION refuse_change()
    """,
    # What a rail said stays as it was said, and is applied once.
    """
    CREATE TRIGGER rail_events_stay BEFORE UPDATE ON rail_events
      FOR EACH ROW WHEN (OLD.applied_at IS NOT NULL OR
        (OLD.rail, OLD.event_id, OLD.reference, OLD.outcome, OLD.failure_code, OLD.provider_reference, OLD.amount_minor,
         OLD.currency, OLD.received_at) IS DISTINCT FROM
        (NEW.rail, NEW.event_id, NEW.reference, NEW.outcome, NEW.failure_code, NEW.provider_reference, NEW.amount_minor,
         NEW.currency, NEW.received_at)) EXECUTE FUNCTION refuse_change()
    """,
    *(
        statement
        for table in ("rail_events", "discrepancies")
        for statement in (
            f"""
            CREATE TRIGGER {table}_no_delete BEFORE DELETE ON {table}
              FOR EACH ROW EXECUTE FUNCTION refuse_change()
            """,
            f"""
            CREATE TRIGGER {table}_no_truncate BEFORE TRUNCATE ON {table}
              FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()
            """,
        )
    ),
    """
    CREATE TRIGGER discrepancies_stay BEFORE UPDATE ON discrepancies
      FOR EACH ROW WHEN (OLD.closed_at IS NOT NULL OR
        (OLD.id, OLD.rail, OLD.reference, OLD.payout_id, OLD.shop_id, OLD.state, OLD.word, OLD.kind, OLD.detail, OLD.opened_at)
        IS DISTINCT FROM
        (NEW.id, NEW.rail, NEW.reference, NEW.payout_id, NEW.shop_id, NEW.state, NEW.word, NEW.kind, NEW.detail, NEW.opened_at))
      EXECUTE FUNCTION refuse_change()
    """,
    # People close them, each by an audit row that says so.
    """
    CREATE FUNCTION discrepancies_closed_by_audit() RETURNS trigger
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    BEGIN
      IF NOT EXISTS (SELECT 1 FROM audit a
                      WHERE a.id = NEW.audit_id AND a.action = 'discrepancy.close' AND a.subject = NEW.id::text) THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'discrepancies_closed_by_audit', TABLE = 'discrepancies',
          MESSAGE = 'a discrepancy is closed by an audit row about it';
      END IF;
      RETURN NEW;
    END $$
    """,
    """
    CREATE TRIGGER discrepancies_closed_by_audit BEFORE UPDATE ON discrepancies
      FOR EACH ROW WHEN (NEW.audit_id IS NOT NULL) EXECUTE FUNCTION discrepancies_closed_by_audit()
    """,
    "REVOKE ALL ON FUNCTION discrepancies_closed_by_audit() FROM PUBLIC",
    "DROP POLICY entries_of_worker ON entries",
    """
    CREATE POLICY entries_of_worker ON entries FOR INSERT TO payouts_worker
      WITH CHECK (kind IN ('capture', 'release', 'payout_return'))
    """,
]

GRANTS = [
    "GRANT UPDATE (return_seq) ON payouts TO payouts_worker, payouts_gateway",
    "GRANT SELECT, INSERT, UPDATE (due_at, applied_at, effect) ON rail_events TO payouts_worker",
    "GRANT SELECT, INSERT (id, rail, reference, payout_id, shop_id, state, word, kind, detail) ON discrepancies"
    " TO payouts_worker",
    "GRANT SELECT, UPDATE (closed_at, audit_id) ON discrepancies TO payouts_ops",
    "GRANT SELECT ON rail_events TO payouts_ops, payouts_readonly",
    "GRANT SELECT ON discrepancies TO payouts_readonly",
    *(
        f"GRANT SELECT (return_seq) ON payouts TO {role}"
        for role in ("payouts_gateway", "payouts_ops", "payouts_readonly")
    ),
]


def upgrade() -> None:
    """Add it."""
    for statement in TABLES + GUARDS + GRANTS:
        op.execute(statement)
