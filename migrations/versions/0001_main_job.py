"""The ledger, payouts and what is due, events and callbacks, and who may touch them.

Old code: none; this is the first schema.

Money is in minor units (bigint, at most 10^15). Two habits keep it right without trusting any caller:

* Accounts move only through entries: the application's roles may insert entries and may not update accounts.
  `entries_move_accounts` applies a whole statement's entries at once and refuses a broken chain.
* A payout and its entries are written by one statement, so that the checks below see both halves together. They
  replace per-row foreign keys on the hot tables (set-based, one index probe a row) and say more than a key could.
"""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

AMOUNT_MINOR_MAX = 10**15
FINAL = "('success', 'failed', 'canceled', 'expired', 'refunded')"

PARTIES = [
    """
    CREATE TABLE merchants (
      id uuid PRIMARY KEY,
      code text NOT NULL UNIQUE CHECK (code ~ '^[a-z0-9][a-z0-9-]{0,62}$'),
      name text NOT NULL CHECK (length(name) BETWEEN 1 AND 200),
      status text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'suspended', 'closed')),
      created_at timestamptz NOT NULL DEFAULT now())
    """,
    """
    CREATE TABLE shops (
      id uuid PRIMARY KEY,
      merchant_id uuid NOT NULL REFERENCES merchants,
      code text NOT NULL CHECK (code ~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$'),
      currency text NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
      currency_exponent smallint NOT NULL CHECK (currency_exponent BETWEEN 0 AND 4),
      status text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'inactive')),
      is_default boolean NOT NULL DEFAULT false,
      rail text NOT NULL CHECK (length(rail) BETWEEN 1 AND 64),
      webhook_url text CHECK (length(webhook_url) <= 2048),
      webhook_secret_sealed bytea NOT NULL,
      payment_data_schema jsonb,
      created_at timestamptz NOT NULL DEFAULT now(),
      UNIQUE (merchant_id, code), UNIQUE (id, merchant_id), UNIQUE (id, currency))
    """,
    "CREATE UNIQUE INDEX shops_one_default_per_merchant ON shops (merchant_id) WHERE is_default",
    """
    CREATE TABLE api_keys (
      id uuid PRIMARY KEY,
      public_id text NOT NULL UNIQUE CHECK (length(public_id) BETWEEN 8 AND 64),
      merchant_id uuid NOT NULL REFERENCES merchants,
      secret_sealed bytea NOT NULL,
      v1_only boolean NOT NULL DEFAULT false,
      scopes text[] NOT NULL CHECK (cardinality(scopes) >= 1 AND scopes <@ ARRAY[
        'payouts:write', 'payouts:read', 'payins:write', 'payins:read', 'balance:read']),
      allowed_networks cidr[],
      expires_at timestamptz,
      revoked_at timestamptz,
      created_at timestamptz NOT NULL DEFAULT now(),
      UNIQUE (id, merchant_id))
    """,
    # No row for a key: it opens every shop of its merchant.
    """
    CREATE TABLE api_key_shops (
      api_key_id uuid NOT NULL,
      merchant_id uuid NOT NULL,
      shop_id uuid NOT NULL,
      PRIMARY KEY (api_key_id, shop_id),
      FOREIGN KEY (api_key_id, merchant_id) REFERENCES api_keys (id, merchant_id),
      FOREIGN KEY (shop_id, merchant_id) REFERENCES shops (id, merchant_id))
    """,
    """
    CREATE TABLE audit (
      id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
      at timestamptz NOT NULL DEFAULT now(),
      actor text NOT NULL CHECK (length(actor) BETWEEN 1 AND 200),
      action text NOT NULL CHECK (length(action) BETWEEN 1 AND 64),
      subject text NOT NULL CHECK (length(subject) BETWEEN 1 AND 200),
      reason text CHECK (length(reason) BETWEEN 1 AND 1000),
      detail jsonb)
    """,
    "CREATE INDEX audit_by_subject ON audit (subject)",
]

LEDGER = [
    # The only hot row. Not the shops row: keys that refer to shops lock it, and never this one.
    """
    CREATE TABLE accounts (
      id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
      shop_id uuid NOT NULL UNIQUE,
      currency text NOT NULL,
      posted_minor bigint NOT NULL DEFAULT 0,
      held_minor bigint NOT NULL DEFAULT 0 CONSTRAINT accounts_held_not_negative CHECK (held_minor >= 0),
      credit_limit_minor bigint NOT NULL DEFAULT 0 CHECK (credit_limit_minor >= 0),
      last_seq bigint NOT NULL DEFAULT 0 CHECK (last_seq >= 0),
      CONSTRAINT accounts_not_overdrawn CHECK (posted_minor - held_minor >= -credit_limit_minor),
      FOREIGN KEY (shop_id, currency) REFERENCES shops (id, currency))
      WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000)
    """,
    # One row holds both legs: the shop's account and a named contra account; so it is zero-sum by construction.
    f"""
    CREATE TABLE entries (
      account_id bigint NOT NULL,
      seq bigint NOT NULL CHECK (seq >= 1),
      shop_id uuid NOT NULL,
      kind text NOT NULL,
      contra text NOT NULL,
      amount_minor bigint NOT NULL CHECK (amount_minor BETWEEN 1 AND {AMOUNT_MINOR_MAX}),
      posted_delta_minor bigint NOT NULL,
      held_delta_minor bigint NOT NULL,
      posted_after_minor bigint NOT NULL,
      held_after_minor bigint NOT NULL CHECK (held_after_minor >= 0),
      payout_id uuid,
      audit_id bigint REFERENCES audit,
      created_at timestamptz NOT NULL DEFAULT now(),
      PRIMARY KEY (account_id, seq),
      CONSTRAINT entries_subject CHECK (CASE kind
        WHEN 'adjustment' THEN audit_id IS NOT NULL AND payout_id IS NULL
        ELSE payout_id IS NOT NULL AND audit_id IS NULL END),
      CONSTRAINT entries_arithmetic CHECK (CASE kind
        WHEN 'hold' THEN contra = 'holds' AND posted_delta_minor = 0 AND held_delta_minor = amount_minor
        WHEN 'capture' THEN contra = 'provider_clearing'
          AND posted_delta_minor = -amount_minor AND held_delta_minor = -amount_minor
        WHEN 'release' THEN contra = 'holds' AND posted_delta_minor = 0 AND held_delta_minor = -amount_minor
        WHEN 'adjustment' THEN contra = 'adjustments'
          AND abs(posted_delta_minor) = amount_minor AND held_delta_minor = 0
        ELSE false END))
    """,
    "CREATE UNIQUE INDEX entries_one_hold_per_payout ON entries (payout_id, shop_id) WHERE kind = 'hold'",
    """
    CREATE UNIQUE INDEX entries_one_resolution_per_hold ON entries (payout_id, shop_id)
      WHERE kind IN ('capture', 'release')
    """,
    "CREATE UNIQUE INDEX entries_one_per_adjustment ON entries (audit_id) WHERE kind = 'adjustment'",
]

PAYOUTS = [
    # Narrow in indexes, so that a change of state is a HOT update; schedules and leases live in payout_due.
    f"""
    CREATE TABLE payouts (
      id uuid NOT NULL,
      shop_id uuid NOT NULL,
      account_id bigint NOT NULL,
      external_id text COLLATE "C" NOT NULL CHECK (length(external_id) BETWEEN 1 AND 128),
      amount_minor bigint NOT NULL CHECK (amount_minor BETWEEN 1 AND {AMOUNT_MINOR_MAX}),
      currency text NOT NULL,
      recipient_sealed bytea NOT NULL,
      recipient_masked text NOT NULL,
      recipient_digest bytea NOT NULL CHECK (octet_length(recipient_digest) = 32),
      payment_data_digest bytea CHECK (octet_length(payment_data_digest) = 32),
      callback_url text CHECK (length(callback_url) <= 2048),
      details jsonb,
      state text NOT NULL DEFAULT 'queued',
      version integer NOT NULL DEFAULT 1 CHECK (version >= 1),
      failure_code text,
      provider_reference text CHECK (length(provider_reference) BETWEEN 1 AND 200),
      hold_seq bigint NOT NULL,
      resolution_seq bigint,
      created_at timestamptz NOT NULL DEFAULT now(),
      updated_at timestamptz NOT NULL DEFAULT now(),
      finalized_at timestamptz,
      PRIMARY KEY (id, shop_id),
      CONSTRAINT payouts_external_id_unique UNIQUE (shop_id, external_id),
      CONSTRAINT payouts_state CHECK (state IN ('queued', 'sending', 'submitted', 'verifying') OR state IN {FINAL}),
      CONSTRAINT payouts_resolved_iff_final CHECK ((resolution_seq IS NOT NULL) = (state IN {FINAL})),
      CONSTRAINT payouts_finalized_iff_final CHECK ((finalized_at IS NOT NULL) = (state IN {FINAL})),
      CONSTRAINT payouts_failure_iff_failed CHECK ((failure_code IS NOT NULL) = (state IN ('failed', 'refunded'))))
      WITH (fillfactor = 80)
    """,
    # One row per unfinished payout. A lease is a token and a due_at in the future: when it runs out the row is due again.
    """
    CREATE TABLE payout_due (
      payout_id uuid NOT NULL,
      shop_id uuid NOT NULL,
      rail text NOT NULL,
      due_at timestamptz NOT NULL DEFAULT now(),
      lease_token uuid,
      PRIMARY KEY (payout_id, shop_id))
      WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_cost_delay = 0)
    """,
    "CREATE INDEX payout_due_by_rail_and_shop ON payout_due (rail, shop_id, due_at)",
    """
    CREATE TABLE payout_attempts (
      payout_id uuid NOT NULL,
      shop_id uuid NOT NULL,
      attempt_no integer NOT NULL CHECK (attempt_no >= 1),
      action text NOT NULL CHECK (action IN ('submit', 'look_up')),
      rail text NOT NULL,
      reference text NOT NULL CHECK (length(reference) BETWEEN 1 AND 64),
      started_at timestamptz NOT NULL DEFAULT now(),
      finished_at timestamptz,
      outcome text CHECK (outcome IN ('paid', 'declined', 'submitted', 'not_accepted', 'not_found', 'unknown')),
      detail text CHECK (length(detail) <= 200),
      PRIMARY KEY (payout_id, shop_id, attempt_no),
      CONSTRAINT payout_attempts_outcome_of_action CHECK (
        outcome <> CASE action WHEN 'look_up' THEN 'not_accepted' ELSE 'not_found' END),
      CONSTRAINT payout_attempts_finished_iff_outcome CHECK ((finished_at IS NULL) = (outcome IS NULL)))
      WITH (fillfactor = 80)
    """,
    """
    CREATE UNIQUE INDEX payout_attempts_one_open_per_payout ON payout_attempts (payout_id, shop_id)
      WHERE finished_at IS NULL
    """,
]

PAYOUTS += [
    # A reference is one payout's for life; its later attempts must repeat it.
    "CREATE UNIQUE INDEX payout_attempts_reference_of_one_payout ON payout_attempts (reference) WHERE attempt_no = 1",
]

TELLING = [
    """
    CREATE TABLE events (
      id uuid NOT NULL,
      shop_id uuid NOT NULL,
      payout_id uuid NOT NULL,
      sequence integer NOT NULL CHECK (sequence >= 1),
      type text NOT NULL CHECK (type ~ '^[a-z]+[.][a-z_]+$'),
      body bytea NOT NULL CHECK (octet_length(body) BETWEEN 2 AND 20000),
      created_at timestamptz NOT NULL DEFAULT now(),
      PRIMARY KEY (id, shop_id),
      UNIQUE (payout_id, shop_id, sequence))
    """,
    """
    CREATE TABLE callbacks (
      event_id uuid NOT NULL,
      shop_id uuid NOT NULL,
      payout_id uuid NOT NULL,
      url text NOT NULL CHECK (length(url) <= 2048),
      state text NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'delivered', 'exhausted', 'rejected')),
      created_at timestamptz NOT NULL DEFAULT now(),
      finished_at timestamptz,
      PRIMARY KEY (event_id, shop_id),
      CONSTRAINT callbacks_finished_iff_not_pending CHECK ((finished_at IS NOT NULL) = (state <> 'pending')))
      WITH (fillfactor = 80)
    """,
    "CREATE INDEX callbacks_by_payout ON callbacks (payout_id, shop_id)",
    """
    CREATE TABLE callback_due (
      event_id uuid NOT NULL,
      shop_id uuid NOT NULL,
      due_at timestamptz NOT NULL DEFAULT now(),
      step integer NOT NULL DEFAULT 0 CHECK (step >= 0),
      attempts_made integer NOT NULL DEFAULT 0 CHECK (attempts_made >= 0),
      lease_token uuid,
      PRIMARY KEY (event_id, shop_id))
      WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_cost_delay = 0)
    """,
    "CREATE INDEX callback_due_by_time ON callback_due (due_at)",
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
      PRIMARY KEY (event_id, shop_id, attempt_no))
    """,
]

# The sandbox rail's own memory: what a bank would keep on its side. Nothing of ours joins it but the tests and the demo.
SANDBOX = [
    "CREATE SCHEMA sandbox",
    f"""
    CREATE TABLE sandbox.payments (
      reference text PRIMARY KEY,
      amount_minor bigint NOT NULL CHECK (amount_minor BETWEEN 1 AND {AMOUNT_MINOR_MAX}),
      currency text NOT NULL,
      state text NOT NULL CHECK (state IN ('absent', 'submitted', 'paid', 'declined')),
      failure_code text,
      authoritative boolean NOT NULL,
      submits integer NOT NULL DEFAULT 1,
      settles_at timestamptz,
      created_at timestamptz NOT NULL DEFAULT now())
    """,
]

GUARDS = [
    """
    CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
      RAISE EXCEPTION USING ERRCODE = '23001', CONSTRAINT = TG_NAME, TABLE = TG_TABLE_NAME,
        MESSAGE = TG_TABLE_NAME || ' does not allow this ' || TG_OP;
    END $$
    """,
    *(
        statement
        for table in ("entries", "events", "audit")
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
    """
    CREATE TRIGGER payouts_no_delete BEFORE DELETE ON payouts
      FOR EACH ROW EXECUTE FUNCTION refuse_change()
    """,
    """
    CREATE TRIGGER payouts_no_truncate BEFORE TRUNCATE ON payouts
      FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()
    """,
    # All terms but the seal of the recipient: the owner may seal it anew under another master key.
    """
    CREATE TRIGGER payouts_terms_fixed BEFORE UPDATE OF id, shop_id, account_id, external_id, amount_minor, currency,
        recipient_sealed, recipient_masked, recipient_digest, payment_data_digest, callback_url, details, hold_seq,
        created_at ON payouts
      FOR EACH ROW WHEN (
        (OLD.id, OLD.shop_id, OLD.account_id, OLD.external_id, OLD.amount_minor, OLD.currency, OLD.recipient_masked,
         OLD.recipient_digest, OLD.payment_data_digest, OLD.callback_url, OLD.details, OLD.hold_seq, OLD.created_at)
        IS DISTINCT FROM
        (NEW.id, NEW.shop_id, NEW.account_id, NEW.external_id, NEW.amount_minor, NEW.currency, NEW.recipient_masked,
         NEW.recipient_digest, NEW.payment_data_digest, NEW.callback_url, NEW.details, NEW.hold_seq, NEW.created_at))
      EXECUTE FUNCTION refuse_change()
    """,
    """
    CREATE TRIGGER shops_terms_fixed BEFORE UPDATE OF id, merchant_id, currency, currency_exponent ON shops
      FOR EACH ROW WHEN ((OLD.id, OLD.merchant_id, OLD.currency, OLD.currency_exponent)
        IS DISTINCT FROM (NEW.id, NEW.merchant_id, NEW.currency, NEW.currency_exponent))
      EXECUTE FUNCTION refuse_change()
    """,
    # The same moves as common.domain.payout.MOVES; a test compares the two, pair by pair.
    """
    CREATE FUNCTION payouts_allow_move() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
      IF NEW.version <> OLD.version + 1 OR (OLD.state || '>' || NEW.state) NOT IN (
           'queued>sending', 'queued>failed', 'queued>canceled', 'queued>expired',
           'sending>queued', 'sending>submitted', 'sending>verifying', 'sending>success', 'sending>failed',
           'submitted>verifying', 'submitted>success', 'submitted>failed',
           'verifying>queued', 'verifying>submitted', 'verifying>success', 'verifying>failed') THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'payouts_moves', TABLE = 'payouts',
          MESSAGE = 'payout may not move from ' || OLD.state || ' to ' || NEW.state;
      END IF;
      RETURN NEW;
    END $$
    """,
    """
    CREATE TRIGGER payouts_moves BEFORE UPDATE OF state ON payouts
      FOR EACH ROW WHEN (OLD.state IS DISTINCT FROM NEW.state) EXECUTE FUNCTION payouts_allow_move()
    """,
    # Locks accounts without the right to update them, in id order; with `wait_ms` 0 those that others hold are left out.
    # What is returned is read by a second statement, whose snapshot is newer than the locks: nobody's word is stale.
    """
    CREATE FUNCTION lock_accounts(account_ids bigint[], wait_ms integer)
      RETURNS TABLE (id bigint, shop_id uuid, posted_minor bigint, held_minor bigint, credit_limit_minor bigint,
                     last_seq bigint, shop_status text, merchant_status text)
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    #variable_conflict use_column
    DECLARE
      locked bigint[];
    BEGIN
      IF wait_ms > 0 THEN
        PERFORM set_config('lock_timeout', wait_ms || 'ms', true);
        SELECT array_agg(l.id) INTO locked FROM (
          SELECT a.id FROM accounts a WHERE a.id = ANY (account_ids) ORDER BY a.id FOR NO KEY UPDATE) l;
      ELSE
        SELECT array_agg(l.id) INTO locked FROM (
          SELECT a.id FROM accounts a WHERE a.id = ANY (account_ids) ORDER BY a.id FOR NO KEY UPDATE SKIP LOCKED) l;
      END IF;
      RETURN QUERY
        SELECT a.id, a.shop_id, a.posted_minor, a.held_minor, a.credit_limit_minor, a.last_seq, s.status, m.status
          FROM accounts a JOIN shops s ON s.id = a.shop_id JOIN merchants m ON m.id = s.merchant_id
         WHERE a.id = ANY (locked);
    END $$
    """,
    # Applies the statement's entries to their accounts, and refuses a gap, a wrong running balance, an entry that its
    # payout does not bear out, and the release of money whose fate at the rail is not known.
    """
    CREATE FUNCTION entries_move_accounts() RETURNS trigger
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
             WHEN 'release' THEN p.resolution_seq = f.seq AND p.state IN ('failed', 'canceled', 'expired') END, false)) THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'entries_match_payout', TABLE = 'entries',
          MESSAGE = 'an entry does not match its payout';
      END IF;
      IF EXISTS (
        SELECT 1 FROM fresh f
          JOIN LATERAL (SELECT (array_agg(t.outcome ORDER BY t.attempt_no DESC))[1] AS latest,
                               bool_or(t.outcome = 'paid') AS paid, count(*) AS made FROM payout_attempts t
                         WHERE t.payout_id = f.payout_id AND t.shop_id = f.shop_id) word ON true
         WHERE f.kind = 'release' AND word.made > 0
           AND (word.paid OR coalesce(word.latest, '') NOT IN ('declined', 'not_accepted', 'not_found'))) THEN
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
    CREATE TRIGGER entries_move_accounts AFTER INSERT ON entries REFERENCING NEW TABLE AS fresh
      FOR EACH STATEMENT EXECUTE FUNCTION entries_move_accounts()
    """,
    """
    CREATE FUNCTION payouts_start_whole() RETURNS trigger
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    BEGIN
      IF EXISTS (
        SELECT 1 FROM fresh p
          LEFT JOIN accounts a ON a.id = p.account_id AND a.shop_id = p.shop_id AND a.currency = p.currency
          LEFT JOIN entries e ON e.account_id = p.account_id AND e.seq = p.hold_seq
          LEFT JOIN payout_due d ON d.payout_id = p.id AND d.shop_id = p.shop_id
         WHERE p.state <> 'queued' OR p.version <> 1 OR a.id IS NULL OR d.payout_id IS NULL
            OR e.payout_id IS DISTINCT FROM p.id OR e.kind IS DISTINCT FROM 'hold') THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'payouts_start_whole', TABLE = 'payouts',
          MESSAGE = 'a payout starts queued, with its hold, its account and its due row';
      END IF;
      RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER payouts_start_whole AFTER INSERT ON payouts REFERENCING NEW TABLE AS fresh
      FOR EACH STATEMENT EXECUTE FUNCTION payouts_start_whole()
    """,
    """
    CREATE FUNCTION payouts_end_whole() RETURNS trigger
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    BEGIN
      IF EXISTS (
        SELECT 1 FROM fresh p
          LEFT JOIN entries e ON e.account_id = p.account_id AND e.seq = p.resolution_seq
         WHERE p.resolution_seq IS NOT NULL AND (
           e.payout_id IS DISTINCT FROM p.id
           OR e.kind IS DISTINCT FROM CASE WHEN p.state IN ('success', 'refunded') THEN 'capture' ELSE 'release' END)) THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'payouts_end_whole', TABLE = 'payouts',
          MESSAGE = 'a payout ends together with the entry that resolves its hold';
      END IF;
      RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER payouts_end_whole AFTER UPDATE ON payouts REFERENCING NEW TABLE AS fresh
      FOR EACH STATEMENT EXECUTE FUNCTION payouts_end_whole()
    """,
    # A second submit needs proof that the one before was not accepted.
    """
    CREATE FUNCTION payout_attempts_submit_once() RETURNS trigger
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    BEGIN
      IF EXISTS (
        SELECT 1 FROM fresh f LEFT JOIN payout_attempts before
            ON before.payout_id = f.payout_id AND before.shop_id = f.shop_id AND before.attempt_no = f.attempt_no - 1
          LEFT JOIN payouts p ON p.id = f.payout_id AND p.shop_id = f.shop_id
         WHERE (CASE f.action WHEN 'submit' THEN p.state = 'sending' ELSE p.state IN ('submitted', 'verifying') END)
               IS NOT TRUE
            OR f.attempt_no > 1 AND (before.payout_id IS NULL OR before.reference <> f.reference
              OR (f.action = 'submit' AND coalesce(before.outcome, '') NOT IN ('not_accepted', 'not_found')))) THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'payout_attempts_submit_once', TABLE = 'payout_attempts',
          MESSAGE = 'a payout is sent while it is sending, and again only after a definite "not accepted"';
      END IF;
      RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER payout_attempts_submit_once AFTER INSERT ON payout_attempts REFERENCING NEW TABLE AS fresh
      FOR EACH STATEMENT EXECUTE FUNCTION payout_attempts_submit_once()
    """,
]

GUARDS += [
    # What was learned stays; only "unknown" may still give way to what is learned late.
    """
    CREATE TRIGGER payout_attempts_outcome_stays BEFORE UPDATE OF outcome ON payout_attempts
      FOR EACH ROW WHEN (OLD.outcome IS NOT NULL AND OLD.outcome IS DISTINCT FROM NEW.outcome
        AND (OLD.outcome <> 'unknown' OR NEW.outcome IS NULL))
      EXECUTE FUNCTION refuse_change()
    """,
    # How a payout ended stays as it was told.
    """
    CREATE TRIGGER payouts_end_stays BEFORE UPDATE OF failure_code, finalized_at, resolution_seq, provider_reference
        ON payouts
      FOR EACH ROW WHEN (OLD.resolution_seq IS NOT NULL AND
        (OLD.failure_code, OLD.finalized_at, OLD.resolution_seq, OLD.provider_reference)
        IS DISTINCT FROM (NEW.failure_code, NEW.finalized_at, NEW.resolution_seq, NEW.provider_reference)
        OR OLD.provider_reference IS NOT NULL AND OLD.provider_reference IS DISTINCT FROM NEW.provider_reference)
      EXECUTE FUNCTION refuse_change()
    """,
    """
    CREATE TRIGGER payouts_version_follows_state BEFORE UPDATE OF version ON payouts
      FOR EACH ROW WHEN (OLD.version <> NEW.version AND OLD.state = NEW.state) EXECUTE FUNCTION refuse_change()
    """,
    """
    CREATE TRIGGER api_keys_stay_revoked BEFORE UPDATE OF revoked_at ON api_keys
      FOR EACH ROW WHEN (OLD.revoked_at IS NOT NULL AND OLD.revoked_at IS DISTINCT FROM NEW.revoked_at)
      EXECUTE FUNCTION refuse_change()
    """,
    # An event tells the status that its payout has at that moment, under that version.
    """
    CREATE FUNCTION events_match_payout() RETURNS trigger
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    BEGIN
      IF EXISTS (
        SELECT 1 FROM fresh e LEFT JOIN payouts p ON p.id = e.payout_id AND p.shop_id = e.shop_id
         WHERE p.id IS NULL OR p.resolution_seq IS NULL OR e.type <> 'payout.' || p.state OR e.sequence <> p.version) THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'events_match_payout', TABLE = 'events',
          MESSAGE = 'an event tells the status that its payout has';
      END IF;
      RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER events_match_payout AFTER INSERT ON events REFERENCING NEW TABLE AS fresh
      FOR EACH STATEMENT EXECUTE FUNCTION events_match_payout()
    """,
    # What is due belongs to an unfinished payout, and an unfinished payout stays due.
    """
    CREATE FUNCTION payout_due_follows_payout() RETURNS trigger
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    BEGIN
      IF TG_OP = 'INSERT' AND EXISTS (
        SELECT 1 FROM moved d LEFT JOIN payouts p ON p.id = d.payout_id AND p.shop_id = d.shop_id
         WHERE p.id IS NULL OR p.resolution_seq IS NOT NULL)
      OR TG_OP = 'DELETE' AND EXISTS (
        SELECT 1 FROM moved d JOIN payouts p ON p.id = d.payout_id AND p.shop_id = d.shop_id
         WHERE p.resolution_seq IS NULL) THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'payout_due_follows_payout', TABLE = 'payout_due',
          MESSAGE = 'a due row belongs to an unfinished payout, for as long as it is one';
      END IF;
      RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER payout_due_inserted AFTER INSERT ON payout_due REFERENCING NEW TABLE AS moved
      FOR EACH STATEMENT EXECUTE FUNCTION payout_due_follows_payout()
    """,
    """
    CREATE TRIGGER payout_due_deleted AFTER DELETE ON payout_due REFERENCING OLD TABLE AS moved
      FOR EACH STATEMENT EXECUTE FUNCTION payout_due_follows_payout()
    """,
    # Each role writes the entries that are its business.
    "ALTER TABLE entries ENABLE ROW LEVEL SECURITY",
    "CREATE POLICY entries_are_read ON entries FOR SELECT USING (true)",
    "CREATE POLICY entries_of_gateway ON entries FOR INSERT TO payouts_gateway WITH CHECK (kind = 'hold')",
    "CREATE POLICY entries_of_worker ON entries FOR INSERT TO payouts_worker WITH CHECK (kind IN ('capture', 'release'))",
    "CREATE POLICY entries_of_ops ON entries FOR INSERT TO payouts_ops WITH CHECK (kind = 'adjustment')",
    # Functions that act as the owner are nobody else's: a trigger on a table of one's own would run them.
    *(
        f"REVOKE ALL ON FUNCTION {name}() FROM PUBLIC"
        for name in (
            "refuse_change",
            "payouts_allow_move",
            "entries_move_accounts",
            "payouts_start_whole",
            "payouts_end_whole",
            "payout_attempts_submit_once",
            "payout_due_follows_payout",
            "events_match_payout",
        )
    ),
]

GRANTS = [
    "REVOKE ALL ON FUNCTION lock_accounts(bigint[], integer) FROM PUBLIC",
    "GRANT EXECUTE ON FUNCTION lock_accounts(bigint[], integer) TO payouts_gateway, payouts_worker, payouts_ops",
    # Each role sees what it works with; sealed recipients only the worker, which has to send them.
    "GRANT SELECT ON merchants, api_keys, api_key_shops, accounts TO payouts_gateway",
    """
    GRANT SELECT (id, shop_id, account_id, external_id, amount_minor, currency, recipient_masked, recipient_digest,
      payment_data_digest, callback_url, details, state, version, failure_code, provider_reference, created_at,
      updated_at, finalized_at) ON payouts TO payouts_gateway
    """,
    "GRANT INSERT ON payouts, entries, payout_due TO payouts_gateway",
    "GRANT SELECT ON merchants, shops, accounts, entries, payouts, payout_due, payout_attempts, events, callbacks,"
    " callback_due, callback_attempts TO payouts_worker",
    "GRANT INSERT ON entries, payout_attempts, events, callbacks, callback_due, callback_attempts TO payouts_worker",
    """
    GRANT UPDATE (state, version, failure_code, provider_reference, resolution_seq, updated_at, finalized_at)
      ON payouts TO payouts_worker
    """,
    "GRANT UPDATE (due_at, lease_token), DELETE ON payout_due TO payouts_worker",
    "GRANT UPDATE (finished_at, outcome, detail) ON payout_attempts TO payouts_worker",
    "GRANT UPDATE (state, finished_at) ON callbacks TO payouts_worker",
    "GRANT UPDATE (due_at, step, attempts_made, lease_token), DELETE ON callback_due TO payouts_worker",
    "GRANT USAGE ON SCHEMA sandbox TO payouts_worker, payouts_readonly",
    "GRANT SELECT, INSERT, UPDATE ON sandbox.payments TO payouts_worker",
    "GRANT SELECT ON sandbox.payments TO payouts_readonly",
    "GRANT INSERT ON merchants, shops, api_keys, api_key_shops, entries, audit TO payouts_ops",
    "GRANT INSERT (shop_id, currency) ON accounts TO payouts_ops",
    "GRANT UPDATE (name, status) ON merchants TO payouts_ops",
    "GRANT UPDATE (status, is_default, rail, webhook_url, webhook_secret_sealed, payment_data_schema) ON shops"
    " TO payouts_ops",
    "GRANT UPDATE (revoked_at, expires_at) ON api_keys TO payouts_ops",
    "GRANT INSERT ON callback_due TO payouts_ops",
    "GRANT UPDATE (due_at, step) ON callback_due TO payouts_ops",
    "GRANT UPDATE (state, finished_at) ON callbacks TO payouts_ops",
    *(
        f"GRANT SELECT ON merchants, api_key_shops, accounts, entries, payout_due, payout_attempts, events, callbacks,"
        f" callback_due, callback_attempts, audit, alembic_version TO {role}"
        for role in ("payouts_ops", "payouts_readonly")
    ),
    *(
        f"""
        GRANT SELECT (id, shop_id, account_id, external_id, amount_minor, currency, recipient_masked, callback_url,
          details, state, version, failure_code, provider_reference, hold_seq, resolution_seq, created_at, updated_at,
          finalized_at) ON payouts TO {role}
        """
        for role in ("payouts_ops", "payouts_readonly")
    ),
    *(
        f"GRANT SELECT (id, merchant_id, code, currency, currency_exponent, status, is_default, rail, webhook_url,"
        f" payment_data_schema, created_at) ON shops TO {role}"
        for role in ("payouts_gateway", "payouts_ops", "payouts_readonly")
    ),
    *(
        f"GRANT SELECT (id, public_id, merchant_id, v1_only, scopes, allowed_networks, expires_at, revoked_at,"
        f" created_at) ON api_keys TO {role}"
        for role in ("payouts_ops", "payouts_readonly")
    ),
    "GRANT SELECT ON alembic_version TO payouts_gateway, payouts_worker",
]


def upgrade() -> None:
    """Create everything."""
    for statement in PARTIES + LEDGER + PAYOUTS + TELLING + SANDBOX + GUARDS + GRANTS:
        op.execute(statement)
