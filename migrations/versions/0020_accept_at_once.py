"""Payouts that nothing speaks against are accepted by one call, which is a transaction of its own.

The account is held for as long as this takes, and not until whoever asked has come round to the next statement several times.

A call that is its own transaction may come late: whoever sent it has given it up, and somebody was told that there is no such
payout. So it accepts nothing once its time is over, by the clock of this server, looked at under the locks: whoever has the
account's lock after that knows that nothing more will come.

Old code runs on it.
"""

from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None

# One array for each column; their order is the order in which the payouts came.
COLUMNS = """
  ids uuid[], shop_ids uuid[], payout_account_ids bigint[], external_ids text[], amounts_minor bigint[], currencies text[],
  recipients_sealed bytea[], recipients_masked text[], recipient_digests bytea[], payment_data_digests bytea[],
  callback_urls text[], details_told text[], rails text[], expiries timestamptz[], traceparents text[]
"""

STATEMENTS = [
    # All payouts of an account are accepted or none of them. Something speaks against them if the shop or its merchant is not
    # active, an id is known already or comes twice, the money does not suffice for all, or one has expired.
    # `accepted_at` NULL: not at all. Accounts that somebody else holds are left out, as `lock_accounts` leaves them out.
    # What is known is read by a second statement, whose snapshot is newer than the locks.
    # LATERAL with LIMIT: one index probe per id, also on a table that nobody has analysed.
    f"""
    CREATE FUNCTION accept_unopposed(account_ids bigint[], wait_ms integer, until timestamptz, {COLUMNS})
      RETURNS TABLE (account_id bigint, accepted_at timestamptz, told_at timestamptz)
      LANGUAGE plpgsql AS $$
    #variable_conflict use_column
    DECLARE
      locked_ids bigint[];
      last_seqs bigint[];
      posted bigint[];
      held bigint[];
      spendable bigint[];
    BEGIN
      SELECT array_agg(l.id), array_agg(l.last_seq), array_agg(l.posted_minor), array_agg(l.held_minor),
             array_agg(CASE WHEN l.shop_status = 'active' AND l.merchant_status = 'active'
                            THEN l.posted_minor - l.held_minor + l.credit_limit_minor END)
        INTO locked_ids, last_seqs, posted, held, spendable
        FROM lock_accounts(account_ids, wait_ms) l;
      RETURN QUERY
        WITH locked AS MATERIALIZED (
          SELECT * FROM unnest(locked_ids, last_seqs, posted, held, spendable)
            AS l (id, last_seq, posted_minor, held_minor, spendable_minor)),
        wanted AS MATERIALIZED (
          SELECT * FROM unnest(
            ids, shop_ids, payout_account_ids, external_ids, amounts_minor, currencies, recipients_sealed, recipients_masked,
            recipient_digests, payment_data_digests, callback_urls, details_told, rails, expiries, traceparents)
            WITH ORDINALITY AS w (id, shop_id, account_id, external_id, amount_minor, currency, recipient_sealed,
                                  recipient_masked, recipient_digest, payment_data_digest, callback_url, details, rail,
                                  expires_at, traceparent, place)),
        unopposed AS MATERIALIZED (
          SELECT w.account_id
            FROM wanted w JOIN locked l ON l.id = w.account_id
            LEFT JOIN LATERAL (
              SELECT true AS there FROM payouts p
               WHERE p.shop_id = w.shop_id AND p.external_id = w.external_id LIMIT 1) known ON true
           GROUP BY w.account_id
          HAVING bool_and(known.there IS NULL AND coalesce(w.expires_at > now(), true))
             AND sum(w.amount_minor) <= min(l.spendable_minor) AND count(DISTINCT w.external_id) = count(*)
             AND clock_timestamp() <= until),
        accepted AS MATERIALIZED (
          SELECT w.*, l.last_seq + row_number() OVER earlier AS seq, l.posted_minor AS posted_after_minor,
                 CAST(l.held_minor + sum(w.amount_minor) OVER earlier AS bigint) AS held_after_minor
            FROM wanted w JOIN unopposed u ON u.account_id = w.account_id JOIN locked l ON l.id = w.account_id
          WINDOW earlier AS (PARTITION BY w.account_id ORDER BY w.place)),
        due AS (
          INSERT INTO payout_due (payout_id, shop_id, rail, expires_at)
          SELECT a.id, a.shop_id, a.rail, a.expires_at FROM accepted a),
        holds AS (
          INSERT INTO entries (account_id, seq, shop_id, kind, contra, amount_minor, posted_delta_minor, held_delta_minor,
                               posted_after_minor, held_after_minor, payout_id)
          SELECT a.account_id, a.seq, a.shop_id, 'hold', 'holds', a.amount_minor, 0, a.amount_minor,
                 a.posted_after_minor, a.held_after_minor, a.id FROM accepted a),
        written AS (
          INSERT INTO payouts (id, shop_id, account_id, external_id, amount_minor, currency, recipient_sealed,
                               recipient_masked, recipient_digest, payment_data_digest, callback_url, details, expires_at,
                               traceparent, hold_seq)
          SELECT a.id, a.shop_id, a.account_id, a.external_id, a.amount_minor, a.currency, a.recipient_sealed,
                 a.recipient_masked, a.recipient_digest, a.payment_data_digest, a.callback_url, CAST(a.details AS jsonb),
                 a.expires_at, a.traceparent, a.seq FROM accepted a)
        SELECT l.id, CASE WHEN EXISTS (SELECT 1 FROM unopposed u WHERE u.account_id = l.id) THEN now() END,
               clock_timestamp()
          FROM locked l;
    END $$
    """,
    f"REVOKE ALL ON FUNCTION accept_unopposed(bigint[], integer, timestamptz, {COLUMNS}) FROM PUBLIC",
    f"GRANT EXECUTE ON FUNCTION accept_unopposed(bigint[], integer, timestamptz, {COLUMNS}) TO payouts_gateway",
]


def upgrade() -> None:
    """Add it."""
    for statement in STATEMENTS:
        op.execute(statement)
