"""Payouts that a rail's word ends while they are being sent are ended by one call, which is a transaction of its own.

Their account is held for as long as this takes, and not until whoever asked has come round to the next statement several times.

Old code runs on it.
"""

from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None

# One array for each column; their order is the order in which the payouts end. `sequences`: the version that a payout has then.
# `openings`: what is told, up to its time.
COLUMNS = """
  ids uuid[], shop_ids uuid[], payout_account_ids bigint[], amounts_minor bigint[], tokens uuid[], attempt_nos integer[],
  outcomes text[], details text[], states text[], failure_codes text[], provider_references text[], event_ids uuid[],
  sequences integer[], event_types text[], openings bytea[], urls text[], origins text[], traceparents text[]
"""

STATEMENTS = [
    # What is told of a change, with the time of the transaction that makes it.
    """
    CREATE FUNCTION close_event(opening bytea) RETURNS bytea LANGUAGE sql STABLE AS $$
      SELECT opening || convert_to(to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') || '"}', 'UTF8')
    $$
    """,
    "REVOKE ALL ON FUNCTION close_event(bytea) FROM PUBLIC",
    "GRANT EXECUTE ON FUNCTION close_event(bytea) TO payouts_gateway, payouts_worker",
    # A payout is ended if it is under its lease still, as it was sent, and whoever is to be told is where he was. Others are
    # left as they are; where `wait_ms` is 0, also those whose account somebody else holds.
    # Due rows, payouts, accounts: each statement's snapshot is newer than the locks of the one before.
    # LATERAL with LIMIT: one index probe per id, also on a table that nobody has analysed. IS NOT DISTINCT of shops keeps it
    # off the index that begins with them; and shops from being gone through first, payouts being locked in their order then.
    f"""
    CREATE FUNCTION end_unopposed(wait_ms integer, {COLUMNS}) RETURNS SETOF uuid LANGUAGE plpgsql AS $$
    #variable_conflict use_column
    DECLARE
      places bigint[];
      account_ids bigint[];
    BEGIN
      SELECT array_agg(held.place) INTO places FROM (
        SELECT w.place
          FROM (SELECT * FROM unnest(ids, tokens) WITH ORDINALITY AS u (id, token, place) ORDER BY id) w
         CROSS JOIN LATERAL (
           SELECT true FROM payout_due WHERE payout_id = w.id AND lease_token = w.token LIMIT 1 FOR UPDATE) due) held;
      SELECT array_agg(sent.place), array_agg(DISTINCT sent.account_id) INTO places, account_ids FROM (
        SELECT w.place, w.account_id
          FROM (SELECT u.* FROM unnest(ids, shop_ids, payout_account_ids, sequences, urls)
                  WITH ORDINALITY AS u (id, shop_id, account_id, sequence, url, place)
                  JOIN unnest(places) AS held (place) ON held.place = u.place ORDER BY u.id) w
         CROSS JOIN LATERAL (
           SELECT shop_id, account_id, version, state, callback_url FROM payouts
            WHERE id = w.id LIMIT 1 FOR NO KEY UPDATE) p
          JOIN shops s ON s.id = p.shop_id
         WHERE (p.account_id, p.version, p.state) = (w.account_id, w.sequence - 1, 'sending')
           AND p.shop_id IS NOT DISTINCT FROM w.shop_id
           AND w.url IS NOT DISTINCT FROM coalesce(p.callback_url, s.webhook_url)) sent;
      RETURN QUERY
        WITH locked AS MATERIALIZED (
          SELECT id, last_seq, posted_minor, held_minor FROM lock_accounts(account_ids, wait_ms)),
        fresh AS MATERIALIZED (
          SELECT w.*, l.last_seq + row_number() OVER earlier AS seq,
                 CASE w.state WHEN 'success' THEN 'capture' ELSE 'release' END AS kind,
                 CASE w.state WHEN 'success' THEN 'provider_clearing' ELSE 'holds' END AS contra,
                 CASE w.state WHEN 'success' THEN -w.amount_minor ELSE 0 END AS posted_delta_minor,
                 CAST(l.posted_minor - coalesce(sum(w.amount_minor) FILTER (WHERE w.state = 'success') OVER earlier, 0)
                   AS bigint) AS posted_after_minor,
                 CAST(l.held_minor - sum(w.amount_minor) OVER earlier AS bigint) AS held_after_minor
            FROM unnest(
              ids, shop_ids, payout_account_ids, amounts_minor, attempt_nos, outcomes, details, states, failure_codes,
              provider_references, event_ids, sequences, event_types, openings, urls, origins, traceparents)
              WITH ORDINALITY AS w (id, shop_id, account_id, amount_minor, attempt_no, outcome, detail, state,
                                    failure_code, provider_reference, event_id, sequence, event_type, opening, url, origin,
                                    traceparent, place)
            JOIN unnest(places) AS sent (place) ON sent.place = w.place
            JOIN locked l ON l.id = w.account_id
          WINDOW earlier AS (PARTITION BY w.account_id ORDER BY w.place)),
        finished AS (
          UPDATE payout_attempts a SET finished_at = now(), outcome = f.outcome, detail = f.detail
            FROM fresh f CROSS JOIN LATERAL (
              SELECT ctid AS place FROM payout_attempts
               WHERE payout_id = f.id AND shop_id = f.shop_id AND attempt_no = f.attempt_no LIMIT 1) made
           WHERE a.ctid = made.place AND (a.finished_at IS NULL OR a.outcome = 'unknown' AND f.outcome <> 'unknown')),
        resolutions AS (
          INSERT INTO entries (account_id, seq, shop_id, kind, contra, amount_minor, posted_delta_minor, held_delta_minor,
                               posted_after_minor, held_after_minor, payout_id)
          SELECT f.account_id, f.seq, f.shop_id, f.kind, f.contra, f.amount_minor, f.posted_delta_minor, -f.amount_minor,
                 f.posted_after_minor, f.held_after_minor, f.id FROM fresh f),
        done AS (
          DELETE FROM payout_due WHERE payout_id = ANY (ARRAY (SELECT f.id FROM fresh f))),
        moved AS (
          UPDATE payouts p
             SET state = f.state, version = f.sequence, failure_code = f.failure_code,
                 provider_reference = coalesce(p.provider_reference, f.provider_reference), resolution_seq = f.seq,
                 updated_at = now(), finalized_at = now()
            FROM fresh f CROSS JOIN LATERAL (
              SELECT ctid AS place FROM payouts
               WHERE id = f.id AND shop_id IS NOT DISTINCT FROM f.shop_id LIMIT 1) held
           WHERE p.ctid = held.place),
        shares AS (
          INSERT INTO callback_shares (merchant_id)
          SELECT DISTINCT s.merchant_id FROM fresh f JOIN shops s ON s.id = f.shop_id WHERE f.origin IS NOT NULL ORDER BY 1
              ON CONFLICT DO NOTHING),
        lanes AS (
          INSERT INTO callback_lanes (id, shop_id, merchant_id, origin)
          SELECT DISTINCT callback_lane_id(f.shop_id, f.origin), f.shop_id, s.merchant_id, f.origin
            FROM fresh f JOIN shops s ON s.id = f.shop_id WHERE f.origin IS NOT NULL ORDER BY 1
              ON CONFLICT DO NOTHING),
        told AS (
          INSERT INTO callbacks (event_id, shop_id, payout_id, url, traceparent)
          SELECT f.event_id, f.shop_id, f.id, f.url, f.traceparent FROM fresh f WHERE f.url IS NOT NULL),
        due AS (
          INSERT INTO callback_due (event_id, shop_id, lane_id)
          SELECT f.event_id, f.shop_id, callback_lane_id(f.shop_id, f.origin) FROM fresh f WHERE f.url IS NOT NULL),
        happened AS (
          INSERT INTO events (id, shop_id, payout_id, sequence, type, body)
          SELECT f.event_id, f.shop_id, f.id, f.sequence, f.event_type, close_event(f.opening) FROM fresh f)
        SELECT f.id FROM fresh f;
    END $$
    """,
    f"REVOKE ALL ON FUNCTION end_unopposed(integer, {COLUMNS}) FROM PUBLIC",
    f"GRANT EXECUTE ON FUNCTION end_unopposed(integer, {COLUMNS}) TO payouts_worker",
]


def upgrade() -> None:
    """Add it."""
    for statement in STATEMENTS:
        op.execute(statement)
