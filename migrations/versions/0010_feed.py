"""The feed of events, in an order that can be read page by page; what merchants may see of callbacks, and have sent again.

An event knows the transaction that wrote it (`xid8`, which is never used again; PostgreSQL, "Transaction ID and Snapshot
Information Functions": of a subtransaction it is the id of the whole). A reader takes only events of transactions below the
oldest one that still runs: all that will ever come of those is there, so nothing can appear before the end of a page.
Whoever writes for long, in any database of the server, delays the feed, and so does a prepared transaction; nothing is lost.

Transactions get their ids before they wait for locks, so one may write a payout's event after a younger one has written the
event before it. Such a transaction is repeated: along the sequence of a payout or payin, ids only rise.

What was there before belongs to this migration's transaction, in the order of `sequence`. The table is not rewritten; the index
reads it once. Old code runs on it: it names its columns, and repeats transactions that are told to be.

A dump takes these ids along to a server that counts anew. Before such a server takes writes, its epoch has to pass that of
the events, with `pg_resetwal --epoch` (physical copies and pg_upgrade keep on counting); else what comes next would sort before
what was there, and the feed would wait for the server to catch up.
"""

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

TABLES = [
    "ALTER TABLE events ADD COLUMN txid xid8 NOT NULL DEFAULT pg_current_xact_id()",
    "CREATE INDEX events_feed ON events (shop_id, txid, sequence, id)",
]

GUARDS = [
    # Two joins and no OR, so that each goes by its index.
    """
    CREATE FUNCTION events_in_order() RETURNS trigger
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    BEGIN
      IF EXISTS (SELECT 1 FROM fresh e WHERE e.txid <> pg_current_xact_id()) THEN
        RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = 'events_of_their_transaction', TABLE = 'events',
          MESSAGE = 'an event belongs to the transaction that writes it';
      END IF;
      IF EXISTS (
        SELECT 1 FROM fresh e JOIN events b ON b.payout_id = e.payout_id AND b.shop_id = e.shop_id
         WHERE b.sequence < e.sequence AND b.txid > e.txid)
      OR EXISTS (
        SELECT 1 FROM fresh e JOIN events b ON b.payin_id = e.payin_id AND b.shop_id = e.shop_id
         WHERE b.sequence < e.sequence AND b.txid > e.txid) THEN
        RAISE EXCEPTION USING ERRCODE = '40001', CONSTRAINT = 'events_in_order', TABLE = 'events',
          MESSAGE = 'a younger transaction has written the event before this one';
      END IF;
      RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER events_in_order AFTER INSERT ON events REFERENCING NEW TABLE AS fresh
      FOR EACH STATEMENT EXECUTE FUNCTION events_in_order()
    """,
    "REVOKE ALL ON FUNCTION events_in_order() FROM PUBLIC",
    # The gateway has callbacks sent again; how they end is the worker's to say.
    """
    CREATE TRIGGER callbacks_ended_by_worker BEFORE UPDATE ON callbacks
      FOR EACH ROW WHEN (NEW.state <> 'pending' AND current_user = 'payouts_gateway') EXECUTE FUNCTION refuse_change()
    """,
]

GRANTS = [
    "GRANT SELECT (id, shop_id, payout_id, payin_id, sequence, type, body, created_at, txid) ON events TO payouts_gateway",
    "GRANT SELECT (event_id, shop_id, url, state, created_at, finished_at), UPDATE (state, finished_at)"
    " ON callbacks TO payouts_gateway",
    "GRANT SELECT (event_id, shop_id, due_at, lease_token, resume_at), UPDATE (due_at, in_lane, lost_leases, resume_at)"
    " ON callback_due TO payouts_gateway",
    # All but the address: where a host is, as our network sees it, is for operators.
    """
    GRANT SELECT (event_id, shop_id, attempt_no, started_at, duration_ms, http_status, error, response_excerpt, late)
      ON callback_attempts TO payouts_gateway
    """,
]


def upgrade() -> None:
    """Add it."""
    for statement in TABLES + GUARDS + GRANTS:
        op.execute(statement)
