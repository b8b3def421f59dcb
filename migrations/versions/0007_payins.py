"""Payins: money that comes in under a reference of ours, credited once, for exactly the amount the rail says was paid.

Old code runs on it: it knows payouts only, and their events and callbacks stay as they are. Rails speak of payins when the old
workers have left: those would take a word about one for nobody's. Checks that are wider than those
they replace are not validated: what is there fits them.
"""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

AMOUNT_MINOR_MAX = 10**15
FINAL = "('success', 'failed', 'expired', 'refunded')"

TABLES = [
    "LOCK TABLE entries, events, callbacks, discrepancies IN ACCESS EXCLUSIVE MODE",
    # `reference`: what its payer quotes. Narrow in indexes, so that a change of state is a HOT update.
    f"""
    CREATE TABLE payins (
      id uuid NOT NULL,
      shop_id uuid NOT NULL,
      account_id bigint NOT NULL,
      external_id text COLLATE "C" NOT NULL CHECK (length(external_id) BETWEEN 1 AND 128),
      amount_minor bigint NOT NULL CHECK (amount_minor BETWEEN 1 AND {AMOUNT_MINOR_MAX}),
      currency text NOT NULL,
      rail text NOT NULL,
      reference text NOT NULL UNIQUE CHECK (length(reference) BETWEEN 1 AND 64),
      payment_link text CHECK (length(payment_link) <= 2300),
      payment_data_digest bytea CHECK (octet_length(payment_data_digest) = 32),
      callback_url text CHECK (length(callback_url) <= 2048),
      details jsonb,
      state text NOT NULL DEFAULT 'pending' CONSTRAINT payins_state CHECK (state = 'pending' OR state IN {FINAL}),
      version integer NOT NULL DEFAULT 1 CHECK (version >= 1),
      failure_code text,
      provider_reference text CHECK (length(provider_reference) BETWEEN 1 AND 200),
      credit_seq bigint,
      refund_seq bigint,
      expires_at timestamptz,
      created_at timestamptz NOT NULL DEFAULT now(),
      updated_at timestamptz NOT NULL DEFAULT now(),
      finalized_at timestamptz,
      PRIMARY KEY (id, shop_id),
      CONSTRAINT payins_external_id_unique UNIQUE (shop_id, external_id),
      CONSTRAINT payins_credited_iff_paid CHECK ((credit_seq IS NOT NULL) = (state IN ('success', 'refunded'))),
      CONSTRAINT payins_returned_iff_refunded CHECK ((refund_seq IS NOT NULL) = (state = 'refunded')),
      CONSTRAINT payins_finalized_iff_final CHECK ((finalized_at IS NOT NULL) = (state IN {FINAL})),
      CONSTRAINT payins_failure_iff_failed CHECK ((failure_code IS NOT NULL) = (state = 'failed')))
      WITH (fillfactor = 80)
    """,
    """
    CREATE TABLE payin_moves (
      payin_id uuid NOT NULL,
      shop_id uuid NOT NULL,
      version integer NOT NULL CHECK (version >= 2),
      state text NOT NULL,
      at timestamptz NOT NULL DEFAULT now(),
      PRIMARY KEY (payin_id, shop_id, version))
    """,
    # One row per pending payin: when its rail is asked again. The lease is as for payouts.
    """
    CREATE TABLE payin_due (
      payin_id uuid NOT NULL,
      shop_id uuid NOT NULL,
      rail text NOT NULL,
      due_at timestamptz NOT NULL,
      look_ups integer NOT NULL DEFAULT 0 CHECK (look_ups >= 0),
      lease_token uuid,
      PRIMARY KEY (payin_id, shop_id))
      WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_cost_delay = 0)
    """,
    "CREATE INDEX payin_due_by_rail ON payin_due (rail, due_at)",
    # What a rail said that moved a payin, by look-up or by itself.
    f"""
    CREATE TABLE payin_words (
      payin_id uuid NOT NULL,
      shop_id uuid NOT NULL,
      word_no integer NOT NULL CHECK (word_no >= 1),
      source text NOT NULL CHECK (source IN ('look_up', 'event')),
      rail text NOT NULL,
      outcome text NOT NULL CHECK (outcome IN ('paid', 'declined', 'returned', 'not_found')),
      amount_minor bigint CHECK (amount_minor BETWEEN 1 AND {AMOUNT_MINOR_MAX}),
      currency text,
      failure_code text,
      provider_reference text CHECK (length(provider_reference) BETWEEN 1 AND 200),
      at timestamptz NOT NULL DEFAULT now(),
      PRIMARY KEY (payin_id, shop_id, word_no),
      FOREIGN KEY (payin_id, shop_id) REFERENCES payins (id, shop_id))
    """,
    "ALTER TABLE rails ADD COLUMN payin_link text"
    " CONSTRAINT rails_payin_link_has_reference CHECK (payin_link LIKE '%{reference}%' AND length(payin_link) <= 2048)",
    "ALTER TABLE entries ADD COLUMN payin_id uuid",
    "ALTER TABLE entries DROP CONSTRAINT entries_subject",
    """
    ALTER TABLE entries ADD CONSTRAINT entries_subject CHECK (CASE
      WHEN kind = 'adjustment' THEN audit_id IS NOT NULL AND num_nonnulls(payout_id, payin_id) = 0
      WHEN kind IN ('payin', 'payin_refund') THEN payin_id IS NOT NULL AND num_nonnulls(payout_id, audit_id) = 0
      ELSE payout_id IS NOT NULL AND num_nonnulls(payin_id, audit_id) = 0 END) NOT VALID
    """,
    "ALTER TABLE entries DROP CONSTRAINT entries_arithmetic",
    """
    ALTER TABLE entries ADD CONSTRAINT entries_arithmetic CHECK (CASE kind
      WHEN 'hold' THEN contra = 'holds' AND posted_delta_minor = 0 AND held_delta_minor = amount_minor
      WHEN 'capture' THEN contra = 'provider_clearing'
        AND posted_delta_minor = -amount_minor AND held_delta_minor = -amount_minor
      WHEN 'release' THEN contra = 'holds' AND posted_delta_minor = 0 AND held_delta_minor = -amount_minor
      WHEN 'payout_return' THEN contra = 'provider_clearing'
        AND posted_delta_minor = amount_minor AND held_delta_minor = 0
      WHEN 'payin' THEN contra = 'provider_clearing' AND posted_delta_minor = amount_minor AND held_delta_minor = 0
      WHEN 'payin_refund' THEN contra = 'provider_clearing'
        AND posted_delta_minor = -amount_minor AND held_delta_minor = 0
      WHEN 'adjustment' THEN contra = 'adjustments'
        AND abs(posted_delta_minor) = amount_minor AND held_delta_minor = 0
      ELSE false END) NOT VALID
    """,
    "CREATE UNIQUE INDEX entries_one_credit_per_payin ON entries (payin_id, shop_id) WHERE kind = 'payin'",
    "CREATE UNIQUE INDEX entries_one_refund_per_payin ON entries (payin_id, shop_id) WHERE kind = 'payin_refund'",
    # Events and their callbacks tell of a payout or of a payin.
    *(
        statement
        for table in ("events", "callbacks")
        for statement in (
            f"ALTER TABLE {table} ADD COLUMN payin_id uuid",
            f"ALTER TABLE {table} ALTER COLUMN payout_id DROP NOT NULL",
            f"ALTER TABLE {table} ADD CONSTRAINT {table}_subject CHECK (num_nonnulls(payout_id, payin_id) = 1) NOT VALID",
        )
    ),
    "CREATE UNIQUE INDEX events_one_per_payin_and_version ON events (payin_id, shop_id, sequence) WHERE payin_id IS NOT NULL",
    "ALTER TABLE discrepancies ADD COLUMN payin_id uuid",
    "ALTER TABLE discrepancies DROP CONSTRAINT discrepancies_payout_and_shop",
    "ALTER TABLE discrepancies ADD CONSTRAINT discrepancies_subject_and_shop"
    " CHECK (num_nonnulls(payout_id, payin_id) = num_nonnulls(shop_id)) NOT VALID",
    "ALTER TABLE discrepancies DROP CONSTRAINT discrepancies_kind_check",
    # `funds`: what went back to a payer is not on the account.
    "ALTER TABLE discrepancies ADD CONSTRAINT discrepancies_kind_check"
    " CHECK (kind IN ('status', 'amount', 'reference', 'funds')) NOT VALID",
]

GUARDS = [
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
         WHERE f.kind IN ('hold', 'capture', 'release', 'payout_return') AND NOT coalesce(
           p.amount_minor = f.amount_minor AND p.account_id = f.account_id AND CASE f.kind
             WHEN 'hold' THEN p.hold_seq = f.seq AND p.state = 'queued'
             WHEN 'capture' THEN p.resolution_seq = f.seq AND p.state = 'success'
             WHEN 'payout_return' THEN p.return_seq = f.seq AND p.state = 'refunded'
             WHEN 'release' THEN p.resolution_seq = f.seq AND p.state IN ('failed', 'canceled', 'expired') END, false)) THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'entries_match_payout', TABLE = 'entries',
          MESSAGE = 'an entry does not match its payout';
      END IF;
      IF EXISTS (
        SELECT 1 FROM fresh f LEFT JOIN payins p ON p.id = f.payin_id AND p.shop_id = f.shop_id
         WHERE f.kind IN ('payin', 'payin_refund') AND NOT coalesce(
           p.amount_minor = f.amount_minor AND p.account_id = f.account_id AND CASE f.kind
             WHEN 'payin' THEN p.credit_seq = f.seq AND p.state = 'success'
             ELSE p.refund_seq = f.seq AND p.state = 'refunded' END, false)) THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'entries_match_payin', TABLE = 'entries',
          MESSAGE = 'an entry does not match its payin';
      END IF;
      IF EXISTS (
        SELECT 1 FROM fresh f JOIN payins p ON p.id = f.payin_id AND p.shop_id = f.shop_id
         WHERE f.kind IN ('payin', 'payin_refund') AND NOT EXISTS (
           SELECT 1 FROM payin_words w
            WHERE w.payin_id = p.id AND w.shop_id = p.shop_id AND w.amount_minor = p.amount_minor AND w.currency = p.currency
              AND (w.outcome = 'returned' OR w.outcome = 'paid' AND f.kind = 'payin'))) THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'entries_payin_was_said', TABLE = 'entries',
          MESSAGE = 'money of a payin moves only when the rail said so, and only the sum it said';
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
    CREATE FUNCTION payins_start_whole() RETURNS trigger
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    BEGIN
      IF EXISTS (
        SELECT 1 FROM fresh p
          LEFT JOIN accounts a ON a.id = p.account_id AND a.shop_id = p.shop_id AND a.currency = p.currency
          LEFT JOIN payin_due d ON d.payin_id = p.id AND d.shop_id = p.shop_id AND d.rail = p.rail
         WHERE p.state <> 'pending' OR p.version <> 1 OR a.id IS NULL OR d.payin_id IS NULL) THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'payins_start_whole', TABLE = 'payins',
          MESSAGE = 'a payin starts pending, with its account and its due row';
      END IF;
      RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER payins_start_whole AFTER INSERT ON payins REFERENCING NEW TABLE AS fresh
      FOR EACH STATEMENT EXECUTE FUNCTION payins_start_whole()
    """,
    """
    CREATE TRIGGER payins_terms_fixed BEFORE UPDATE OF id, shop_id, account_id, external_id, amount_minor, currency, rail,
        reference, payment_link, payment_data_digest, callback_url, details, expires_at, created_at ON payins
      FOR EACH ROW WHEN (
        (OLD.id, OLD.shop_id, OLD.account_id, OLD.external_id, OLD.amount_minor, OLD.currency, OLD.rail, OLD.reference,
         OLD.payment_link, OLD.payment_data_digest, OLD.callback_url, OLD.details, OLD.expires_at, OLD.created_at)
        IS DISTINCT FROM
        (NEW.id, NEW.shop_id, NEW.account_id, NEW.external_id, NEW.amount_minor, NEW.currency, NEW.rail, NEW.reference,
         NEW.payment_link, NEW.payment_data_digest, NEW.callback_url, NEW.details, NEW.expires_at, NEW.created_at))
      EXECUTE FUNCTION refuse_change()
    """,
    # The same moves as common.domain.payin.MOVES; a test compares the two, pair by pair.
    """
    CREATE FUNCTION payins_allow_move() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
      IF NEW.version <> OLD.version + 1 OR (OLD.state || '>' || NEW.state) NOT IN (
           'pending>success', 'pending>failed', 'pending>expired', 'success>refunded')
         OR NEW.state = 'expired' AND coalesce(NEW.expires_at > now(), true) THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'payins_moves', TABLE = 'payins',
          MESSAGE = 'payin may not move from ' || OLD.state || ' to ' || NEW.state || ' now';
      END IF;
      RETURN NEW;
    END $$
    """,
    """
    CREATE TRIGGER payins_moves BEFORE UPDATE ON payins
      FOR EACH ROW WHEN (OLD.state IS DISTINCT FROM NEW.state) EXECUTE FUNCTION payins_allow_move()
    """,
    """
    CREATE TRIGGER payins_version_follows_state BEFORE UPDATE OF version ON payins
      FOR EACH ROW WHEN (OLD.version <> NEW.version AND OLD.state = NEW.state) EXECUTE FUNCTION refuse_change()
    """,
    # How a payin ended stays as it was told, but for what a refund adds.
    """
    CREATE TRIGGER payins_end_stays BEFORE UPDATE ON payins
      FOR EACH ROW WHEN (OLD.state <> 'pending' AND (
        (OLD.failure_code, OLD.finalized_at, OLD.credit_seq, OLD.provider_reference)
        IS DISTINCT FROM (NEW.failure_code, NEW.finalized_at, NEW.credit_seq, NEW.provider_reference)
        OR OLD.refund_seq IS DISTINCT FROM NEW.refund_seq AND NOT (OLD.state = 'success' AND NEW.state = 'refunded')))
      EXECUTE FUNCTION refuse_change()
    """,
    # Only a rail's word ends a payin, and not against another word of it.
    """
    CREATE FUNCTION payins_end_whole() RETURNS trigger
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    BEGIN
      IF EXISTS (
        SELECT 1 FROM fresh p
          LEFT JOIN entries credit ON credit.account_id = p.account_id AND credit.seq = p.credit_seq
          LEFT JOIN entries refund ON refund.account_id = p.account_id AND refund.seq = p.refund_seq
         WHERE p.credit_seq IS NOT NULL AND (credit.payin_id IS DISTINCT FROM p.id OR credit.kind IS DISTINCT FROM 'payin')
            OR p.refund_seq IS NOT NULL
               AND (refund.payin_id IS DISTINCT FROM p.id OR refund.kind IS DISTINCT FROM 'payin_refund')) THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'payins_end_whole', TABLE = 'payins',
          MESSAGE = 'a payin is paid or refunded together with the entry that moves its money';
      END IF;
      IF EXISTS (
        SELECT 1 FROM fresh p JOIN before b ON b.id = p.id AND b.shop_id = p.shop_id
          LEFT JOIN LATERAL (
            SELECT (array_agg(w.outcome ORDER BY w.word_no DESC))[1] AS latest, bool_or(w.outcome = 'paid') AS paid
              FROM payin_words w WHERE w.payin_id = p.id AND w.shop_id = p.shop_id) word ON true
         WHERE b.state = 'pending' AND p.state IN ('failed', 'expired')
           AND (coalesce(word.paid, false)
                OR word.latest IS DISTINCT FROM CASE p.state WHEN 'failed' THEN 'declined' ELSE 'not_found' END)) THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'payins_end_was_said', TABLE = 'payins',
          MESSAGE = 'a payin ends unpaid only when the rail said so';
      END IF;
      RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER payins_end_whole AFTER UPDATE ON payins REFERENCING OLD TABLE AS before NEW TABLE AS fresh
      FOR EACH STATEMENT EXECUTE FUNCTION payins_end_whole()
    """,
    """
    CREATE FUNCTION payins_leave_history() RETURNS trigger
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    BEGIN
      INSERT INTO payin_moves (payin_id, shop_id, version, state)
        SELECT f.id, f.shop_id, f.version, f.state
          FROM fresh f JOIN before b ON b.id = f.id AND b.shop_id = f.shop_id WHERE b.version <> f.version;
      RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER payins_leave_history AFTER UPDATE ON payins REFERENCING OLD TABLE AS before NEW TABLE AS fresh
      FOR EACH STATEMENT EXECUTE FUNCTION payins_leave_history()
    """,
    """
    CREATE FUNCTION payin_due_follows_payin() RETURNS trigger
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    BEGIN
      IF TG_OP = 'INSERT' AND EXISTS (
        SELECT 1 FROM moved d LEFT JOIN payins p ON p.id = d.payin_id AND p.shop_id = d.shop_id
         WHERE p.state IS DISTINCT FROM 'pending')
      OR TG_OP = 'DELETE' AND EXISTS (
        SELECT 1 FROM moved d JOIN payins p ON p.id = d.payin_id AND p.shop_id = d.shop_id
         WHERE p.state = 'pending') THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'payin_due_follows_payin', TABLE = 'payin_due',
          MESSAGE = 'a due row belongs to a pending payin, for as long as it is one';
      END IF;
      RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER payin_due_inserted AFTER INSERT ON payin_due REFERENCING NEW TABLE AS moved
      FOR EACH STATEMENT EXECUTE FUNCTION payin_due_follows_payin()
    """,
    """
    CREATE TRIGGER payin_due_deleted AFTER DELETE ON payin_due REFERENCING OLD TABLE AS moved
      FOR EACH STATEMENT EXECUTE FUNCTION payin_due_follows_payin()
    """,
    # A rail speaks of its own payins only.
    """
    CREATE FUNCTION payin_words_of_its_rail() RETURNS trigger
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    BEGIN
      IF NOT EXISTS (SELECT 1 FROM payins p
                      WHERE p.id = NEW.payin_id AND p.shop_id = NEW.shop_id AND p.rail = NEW.rail) THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'payin_words_of_its_rail', TABLE = 'payin_words',
          MESSAGE = 'a payin hears its own rail';
      END IF;
      RETURN NEW;
    END $$
    """,
    """
    CREATE TRIGGER payin_words_of_its_rail BEFORE INSERT ON payin_words
      FOR EACH ROW EXECUTE FUNCTION payin_words_of_its_rail()
    """,
    *(
        statement
        for table in ("payin_moves", "payin_words")
        for statement in (
            f"""
            CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE ON {table}
              FOR EACH ROW EXECUTE FUNCTION refuse_change()
            """,
            f"""
            CREATE TRIGGER {table}_no_truncate BEFORE TRUNCATE ON {table}
              FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()
            """,
        )
    ),
    "CREATE TRIGGER payins_no_delete BEFORE DELETE ON payins FOR EACH ROW EXECUTE FUNCTION refuse_change()",
    "CREATE TRIGGER payins_no_truncate BEFORE TRUNCATE ON payins FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()",
    """
    CREATE FUNCTION events_match_payin() RETURNS trigger
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    BEGIN
      IF EXISTS (
        SELECT 1 FROM fresh e LEFT JOIN payins p ON p.id = e.payin_id AND p.shop_id = e.shop_id
         WHERE e.payin_id IS NOT NULL AND (p.id IS NULL OR p.state = 'pending'
            OR e.type <> 'payin.' || p.state OR e.sequence <> p.version)) THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'events_match_payin', TABLE = 'events',
          MESSAGE = 'an event tells the status that its payin has';
      END IF;
      RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER events_match_payin AFTER INSERT ON events REFERENCING NEW TABLE AS fresh
      FOR EACH STATEMENT EXECUTE FUNCTION events_match_payin()
    """,
    """
    CREATE OR REPLACE FUNCTION events_match_payout() RETURNS trigger
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    BEGIN
      IF EXISTS (
        SELECT 1 FROM fresh e LEFT JOIN payouts p ON p.id = e.payout_id AND p.shop_id = e.shop_id
         WHERE e.payin_id IS NULL AND (p.id IS NULL OR p.resolution_seq IS NULL
            OR e.type <> 'payout.' || p.state OR e.sequence <> p.version)) THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'events_match_payout', TABLE = 'events',
          MESSAGE = 'an event tells the status that its payout has';
      END IF;
      RETURN NULL;
    END $$
    """,
    """
    CREATE OR REPLACE FUNCTION callbacks_match_event() RETURNS trigger
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    BEGIN
      IF EXISTS (
        SELECT 1 FROM fresh c
          LEFT JOIN events e ON e.id = c.event_id AND e.shop_id = c.shop_id
            AND (e.payout_id, e.payin_id) IS NOT DISTINCT FROM (c.payout_id, c.payin_id)
         WHERE e.id IS NULL OR c.state <> 'pending') THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'callbacks_match_event', TABLE = 'callbacks',
          MESSAGE = 'a callback tells an event of its payout or payin';
      END IF;
      IF EXISTS (
        SELECT 1 FROM fresh c
          LEFT JOIN payouts p ON p.id = c.payout_id AND p.shop_id = c.shop_id
          LEFT JOIN payins i ON i.id = c.payin_id AND i.shop_id = c.shop_id
          JOIN shops s ON s.id = c.shop_id
         WHERE c.url IS DISTINCT FROM coalesce(p.callback_url, i.callback_url, s.webhook_url)) THEN
        RAISE EXCEPTION USING ERRCODE = '40001', CONSTRAINT = 'callbacks_match_url', TABLE = 'callbacks',
          MESSAGE = 'a callback goes to the URL of its payout or payin, else of its shop';
      END IF;
      RETURN NULL;
    END $$
    """,
    """
    CREATE OR REPLACE FUNCTION rails_stay_while_named() RETURNS trigger
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    BEGIN
      IF EXISTS (SELECT 1 FROM shops s WHERE s.rail = OLD.name)
         OR EXISTS (SELECT 1 FROM payout_due d WHERE d.rail = OLD.name)
         OR EXISTS (SELECT 1 FROM payin_due d WHERE d.rail = OLD.name) THEN
        RAISE EXCEPTION USING ERRCODE = '23503', CONSTRAINT = 'rails_stay_while_named', TABLE = 'rails',
          MESSAGE = 'a rail stays while a shop, an unfinished payout or a pending payin names it';
      END IF;
      RETURN OLD;
    END $$
    """,
    "DROP TRIGGER discrepancies_stay ON discrepancies",
    """
    CREATE TRIGGER discrepancies_stay BEFORE UPDATE ON discrepancies
      FOR EACH ROW WHEN (OLD.closed_at IS NOT NULL OR
        (OLD.id, OLD.rail, OLD.reference, OLD.payout_id, OLD.payin_id, OLD.shop_id, OLD.state, OLD.word, OLD.kind,
         OLD.detail, OLD.opened_at)
        IS DISTINCT FROM
        (NEW.id, NEW.rail, NEW.reference, NEW.payout_id, NEW.payin_id, NEW.shop_id, NEW.state, NEW.word, NEW.kind,
         NEW.detail, NEW.opened_at))
      EXECUTE FUNCTION refuse_change()
    """,
    *(
        f"REVOKE ALL ON FUNCTION {name}() FROM PUBLIC"
        for name in (
            "payins_start_whole",
            "payins_allow_move",
            "payins_end_whole",
            "payins_leave_history",
            "payin_due_follows_payin",
            "payin_words_of_its_rail",
            "events_match_payin",
        )
    ),
    "DROP POLICY entries_of_worker ON entries",
    """
    CREATE POLICY entries_of_worker ON entries FOR INSERT TO payouts_worker
      WITH CHECK (kind IN ('capture', 'release', 'payout_return', 'payin', 'payin_refund'))
    """,
]

GRANTS = [
    "GRANT SELECT, INSERT ON payins TO payouts_gateway",
    "GRANT INSERT ON payin_due TO payouts_gateway",
    "GRANT SELECT (status, payin_link) ON rails TO payouts_gateway",
    "GRANT SELECT ON payins, payin_moves, payin_due, payin_words TO payouts_worker",
    """
    GRANT UPDATE (state, version, failure_code, provider_reference, credit_seq, refund_seq, updated_at, finalized_at)
      ON payins TO payouts_worker
    """,
    "GRANT UPDATE (due_at, look_ups, lease_token), DELETE ON payin_due TO payouts_worker",
    "GRANT INSERT ON payin_words TO payouts_worker",
    "GRANT INSERT (payin_id) ON discrepancies TO payouts_worker",
    *(
        statement
        for role in ("payouts_ops", "payouts_readonly")
        for statement in (
            f"GRANT SELECT ON payins, payin_moves, payin_due, payin_words TO {role}",
            f"GRANT SELECT (payin_link) ON rails TO {role}",
        )
    ),
]


def upgrade() -> None:
    """Add it."""
    for statement in TABLES + GUARDS + GRANTS:
        op.execute(statement)
