"""What must always be true of the money, as queries that return who breaks it. Used by tests, by `payouts verify`, and in
small steps by the sweep.

Every rule is one statement, so it looks at one snapshot; and as every change of ours is one transaction, it holds in any
snapshot, whatever is under way. A rule walks a table in the order of its key: asked about a page of it, it reads that page
and what its rows lead to.
"""

from dataclasses import dataclass
from typing import Final

from sqlalchemy import text

from common.db.engine import Engine, Tx

OFFENDERS_SHOWN: Final = 10

# A place in a walk: the key there, each part as text. None: before the first row, or behind the last.
Position = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Walk:
    """A table in the order of its key (columns and their types), under the alias that the rules give it.

    `written_at`: when a row came to be, where that is known. `weight`: how many rows one of these leads to, more or less.
    """

    table: str
    alias: str
    key: tuple[tuple[str, str], ...]
    written_at: str = "NULL::timestamptz"
    weight: int = 1

    @property
    def order(self) -> str:
        """The columns of the key."""
        return ", ".join(f"{self.alias}.{column}" for column, _ in self.key)

    @property
    def within(self) -> str:
        """The condition that a row is behind `:behind` and not behind `:upto`."""
        return f"{self._compared('behind', '>')} AND {self._compared('upto', '<=')}"

    def _compared(self, name: str, operator: str) -> str:
        place = f"CAST(:{name} AS text[])"
        parts = ", ".join(f"CAST(({place})[{n}] AS {kind})" for n, (_, kind) in enumerate(self.key, 1))
        return f"({place} IS NULL OR ({self.order}) {operator} ({parts}))"


# An account leads to everything unfinished of its shop.
ACCOUNTS: Final = Walk("accounts", "a", (("id", "bigint"),), weight=50)
ENTRIES: Final = Walk("entries", "e", (("account_id", "bigint"), ("seq", "bigint")), "e.created_at")
PAYOUTS: Final = Walk("payouts", "p", (("id", "uuid"),), "p.created_at")
PAYOUT_DUE: Final = Walk(
    "payout_due",
    "d",
    (("payout_id", "uuid"),),
    "(SELECT p.created_at FROM payouts p WHERE p.id = d.payout_id AND p.shop_id = d.shop_id)",
)
PAYINS: Final = Walk("payins", "p", (("id", "uuid"),), "p.created_at")
PAYIN_DUE: Final = Walk(
    "payin_due",
    "d",
    (("payin_id", "uuid"),),
    "(SELECT p.created_at FROM payins p WHERE p.id = d.payin_id AND p.shop_id = d.shop_id)",
)
EVENTS: Final = Walk("events", "e", (("id", "uuid"),), "e.created_at")
CALLBACKS: Final = Walk("callbacks", "c", (("event_id", "uuid"),), "c.created_at")
CALLBACK_DUE: Final = Walk(
    "callback_due",
    "d",
    (("event_id", "uuid"),),
    "(SELECT c.created_at FROM callbacks c WHERE c.event_id = d.event_id AND c.shop_id = d.shop_id)",
)
LANES: Final = Walk("callback_lanes", "l", (("id", "uuid"),), "l.created_at")
WALKS: Final = (ACCOUNTS, ENTRIES, PAYOUTS, PAYOUT_DUE, PAYINS, PAYIN_DUE, EVENTS, CALLBACKS, CALLBACK_DUE, LANES)


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule in words, the table it walks, and the query whose rows break it. The first column names the offender."""

    name: str
    walk: Walk
    guards: str
    query: str


@dataclass(frozen=True, slots=True)
class Finding:
    """How a rule fared. `offenders` are the first few of `count`."""

    rule: Rule
    count: int
    offenders: tuple[str, ...]


RULES: Final = (
    Rule(
        "account_equals_last_entry",
        ACCOUNTS,
        "An account's balances and sequence are those of its last entry, or zero without one.",
        f"""
        SELECT a.id FROM accounts a
          LEFT JOIN LATERAL (SELECT e.seq, e.posted_after_minor, e.held_after_minor FROM entries e
                              WHERE e.account_id = a.id ORDER BY e.seq DESC LIMIT 1) e ON true
         WHERE {ACCOUNTS.within} AND (a.posted_minor, a.held_minor, a.last_seq)
               <> (coalesce(e.posted_after_minor, 0), coalesce(e.held_after_minor, 0), coalesce(e.seq, 0))
        """,
    ),
    Rule(
        "entries_chain",
        ENTRIES,
        "Each entry continues the one before it: no gap in the sequence, balances that add up.",
        f"""
        SELECT e.account_id || '/' || e.seq FROM entries e
          LEFT JOIN entries prior ON prior.account_id = e.account_id AND prior.seq = e.seq - 1
         WHERE {ENTRIES.within}
           AND ((prior.seq IS NULL) <> (e.seq = 1)
                OR (e.posted_after_minor - e.posted_delta_minor, e.held_after_minor - e.held_delta_minor)
                   <> (coalesce(prior.posted_after_minor, 0), coalesce(prior.held_after_minor, 0)))
        """,
    ),
    Rule(
        "held_equals_unfinished_payouts",
        ACCOUNTS,
        "What an account holds is the sum of its unfinished payouts, as they are due.",
        f"""
        WITH RECURSIVE rails AS (
          (SELECT rail FROM payout_due ORDER BY rail LIMIT 1)
          UNION ALL
          SELECT next.rail FROM rails CROSS JOIN LATERAL (
            SELECT d.rail FROM payout_due d WHERE d.rail > rails.rail ORDER BY d.rail LIMIT 1) next)
        SELECT a.id FROM accounts a
         CROSS JOIN LATERAL (
           SELECT coalesce(sum(p.amount_minor), 0) AS minor FROM rails
             JOIN payout_due d ON d.rail = rails.rail AND d.shop_id = a.shop_id
             JOIN payouts p ON p.id = d.payout_id AND p.shop_id = d.shop_id
            WHERE p.account_id = a.id AND p.resolution_seq IS NULL) unfinished
         WHERE {ACCOUNTS.within} AND a.held_minor <> unfinished.minor
        """,
    ),
    Rule(
        "payout_has_its_hold",
        PAYOUTS,
        "Every payout points at the one entry that held exactly its amount.",
        f"""
        SELECT p.id FROM payouts p
          LEFT JOIN entries e ON e.account_id = p.account_id AND e.seq = p.hold_seq AND e.kind = 'hold'
         WHERE {PAYOUTS.within}
           AND (e.payout_id IS DISTINCT FROM p.id OR e.amount_minor IS DISTINCT FROM p.amount_minor)
        """,
    ),
    Rule(
        "payout_has_its_resolution",
        PAYOUTS,
        "A finished payout points at a capture when it was paid and at a release otherwise, of exactly its amount.",
        f"""
        SELECT p.id FROM payouts p
          LEFT JOIN entries e ON e.account_id = p.account_id AND e.seq = p.resolution_seq
         WHERE {PAYOUTS.within} AND p.resolution_seq IS NOT NULL
           AND (e.payout_id IS DISTINCT FROM p.id OR e.amount_minor IS DISTINCT FROM p.amount_minor
                OR e.kind IS DISTINCT FROM CASE WHEN p.state IN ('success', 'refunded') THEN 'capture' ELSE 'release' END)
        """,
    ),
    Rule(
        "refunded_payout_has_its_return",
        PAYOUTS,
        "A refunded payout points at the entry that brought exactly its amount back, and the rail said so.",
        f"""
        SELECT p.id FROM payouts p
          LEFT JOIN entries e ON e.account_id = p.account_id AND e.seq = p.return_seq AND e.kind = 'payout_return'
         WHERE {PAYOUTS.within} AND p.state = 'refunded' AND (
           e.payout_id IS DISTINCT FROM p.id OR e.amount_minor IS DISTINCT FROM p.amount_minor OR NOT EXISTS (
             SELECT 1 FROM payout_attempts t
              WHERE t.payout_id = p.id AND t.shop_id = p.shop_id AND t.outcome = 'returned'))
        """,
    ),
    Rule(
        "entry_has_its_payout",
        ENTRIES,
        "Every hold, capture, release and return belongs to a payout that points back at it.",
        f"""
        SELECT e.account_id || '/' || e.seq FROM entries e
          LEFT JOIN payouts p ON p.id = e.payout_id AND p.shop_id = e.shop_id AND p.account_id = e.account_id
         WHERE {ENTRIES.within} AND e.kind IN ('hold', 'capture', 'release', 'payout_return')
           AND e.seq IS DISTINCT FROM
               CASE e.kind WHEN 'hold' THEN p.hold_seq WHEN 'payout_return' THEN p.return_seq ELSE p.resolution_seq END
        """,
    ),
    Rule(
        "unfinished_payout_is_due",
        PAYOUTS,
        "Every unfinished payout has a due row, so that nothing is forgotten.",
        f"""
        SELECT p.id FROM payouts p
         WHERE {PAYOUTS.within} AND p.resolution_seq IS NULL
           AND NOT EXISTS (SELECT 1 FROM payout_due d WHERE d.payout_id = p.id AND d.shop_id = p.shop_id)
        """,
    ),
    Rule(
        "due_payout_is_unfinished",
        PAYOUT_DUE,
        "Every due row belongs to an unfinished payout.",
        f"""
        SELECT d.payout_id FROM payout_due d
          LEFT JOIN payouts p ON p.id = d.payout_id AND p.shop_id = d.shop_id
         WHERE {PAYOUT_DUE.within} AND (p.id IS NULL OR p.resolution_seq IS NOT NULL)
        """,
    ),
    Rule(
        "sent_payout_has_an_attempt",
        PAYOUTS,
        "A payout that is or may be at its rail, or was paid, has an attempt with its reference.",
        f"""
        SELECT p.id FROM payouts p
         WHERE {PAYOUTS.within} AND p.state IN ('sending', 'submitted', 'verifying', 'success', 'refunded')
           AND NOT EXISTS (SELECT 1 FROM payout_attempts t WHERE t.payout_id = p.id AND t.shop_id = p.shop_id)
        """,
    ),
    Rule(
        "failure_is_definite",
        PAYOUTS,
        "No money was released while the last word of the rail was missing or ambiguous, or a call was under way.",
        f"""
        SELECT p.id FROM payouts p
          JOIN LATERAL (SELECT (array_agg(t.outcome ORDER BY t.attempt_no DESC))[1] AS latest,
                               bool_or(t.action = 'submit' AND t.finished_at IS NULL) AS under_way,
                               coalesce(max(t.attempt_no) FILTER (WHERE t.outcome = 'submitted'), 0)
                                 > coalesce(max(t.attempt_no) FILTER (WHERE t.outcome = 'declined'), 0) AS taken,
                               count(*) AS made FROM payout_attempts t
                         WHERE t.payout_id = p.id AND t.shop_id = p.shop_id) word ON word.made > 0
         WHERE {PAYOUTS.within} AND p.state IN ('failed', 'canceled', 'expired')
           AND (word.under_way OR word.taken
                OR coalesce(word.latest, '') NOT IN ('declined', 'not_accepted', 'not_found'))
        """,
    ),
    Rule(
        "money_follows_the_rail",
        PAYOUTS,
        "Money was captured only when the rail said that it paid, and never released when it did.",
        f"""
        SELECT p.id FROM payouts p
         CROSS JOIN LATERAL (
           SELECT count(*) AS times FROM payout_attempts t
            WHERE t.payout_id = p.id AND t.shop_id = p.shop_id AND t.outcome = 'paid') said
         WHERE {PAYOUTS.within} AND p.resolution_seq IS NOT NULL
           AND (p.state IN ('success', 'refunded')) <> (said.times > 0)
        """,
    ),
    Rule(
        "history_leads_to_the_state",
        PAYOUTS,
        "A payout's history has a line for each version since it was first written, and the last one is its state.",
        f"""
        SELECT p.id FROM payouts p
         CROSS JOIN LATERAL (
           SELECT max(m.version) AS version, max(m.version) - min(m.version) + 1 - count(*) AS gaps,
                  (array_agg(m.state ORDER BY m.version DESC))[1] AS state
             FROM payout_moves m WHERE m.payout_id = p.id AND m.shop_id = p.shop_id) m
         WHERE {PAYOUTS.within}
           AND (p.version <> coalesce(m.version, 1) OR coalesce(m.gaps, 0) <> 0 OR p.state <> coalesce(m.state, 'queued'))
        """,
    ),
    Rule(
        "entry_has_its_payin",
        ENTRIES,
        "Every credit and refund belongs to a payin that points back at it.",
        f"""
        SELECT e.account_id || '/' || e.seq FROM entries e
          LEFT JOIN payins p ON p.id = e.payin_id AND p.shop_id = e.shop_id AND p.account_id = e.account_id
         WHERE {ENTRIES.within} AND e.kind IN ('payin', 'payin_refund')
           AND e.seq IS DISTINCT FROM CASE e.kind WHEN 'payin' THEN p.credit_seq ELSE p.refund_seq END
        """,
    ),
    Rule(
        "paid_payin_has_its_credit",
        PAYINS,
        "A payin that was paid points at the entry that credited exactly its amount; any other has none.",
        f"""
        SELECT p.id FROM payins p
          LEFT JOIN entries e ON e.payin_id = p.id AND e.shop_id = p.shop_id AND e.kind = 'payin'
         WHERE {PAYINS.within} AND CASE WHEN p.state IN ('success', 'refunded')
           THEN (e.account_id, e.seq, e.amount_minor) IS DISTINCT FROM (p.account_id, p.credit_seq, p.amount_minor)
           ELSE e.seq IS NOT NULL END
        """,
    ),
    Rule(
        "refunded_payin_has_its_refund",
        PAYINS,
        "A payin that was refunded points at the entry that took exactly its amount back; any other has none.",
        f"""
        SELECT p.id FROM payins p
          LEFT JOIN entries e ON e.payin_id = p.id AND e.shop_id = p.shop_id AND e.kind = 'payin_refund'
         WHERE {PAYINS.within} AND CASE WHEN p.state = 'refunded'
           THEN (e.account_id, e.seq, e.amount_minor) IS DISTINCT FROM (p.account_id, p.refund_seq, p.amount_minor)
           ELSE e.seq IS NOT NULL END
        """,
    ),
    Rule(
        "credit_follows_the_rail",
        PAYINS,
        "Money was credited only when the rail named exactly this sum, and was never missed when it did.",
        f"""
        SELECT p.id FROM payins p
         CROSS JOIN LATERAL (
           SELECT count(*) AS times FROM payin_words w WHERE w.payin_id = p.id AND w.shop_id = p.shop_id
              AND w.outcome IN ('paid', 'returned') AND w.amount_minor = p.amount_minor AND w.currency = p.currency) said
         WHERE {PAYINS.within} AND (p.state IN ('success', 'refunded')) <> (said.times > 0)
        """,
    ),
    Rule(
        "pending_payin_is_due",
        PAYINS,
        "Every pending payin has a due row, so that its rail is asked.",
        f"""
        SELECT p.id FROM payins p
         WHERE {PAYINS.within} AND p.state = 'pending'
           AND NOT EXISTS (SELECT 1 FROM payin_due d WHERE d.payin_id = p.id AND d.shop_id = p.shop_id)
        """,
    ),
    Rule(
        "due_payin_is_pending",
        PAYIN_DUE,
        "Every due row of a payin belongs to a pending one.",
        f"""
        SELECT d.payin_id FROM payin_due d
          LEFT JOIN payins p ON p.id = d.payin_id AND p.shop_id = d.shop_id
         WHERE {PAYIN_DUE.within} AND p.state IS DISTINCT FROM 'pending'
        """,
    ),
    Rule(
        "payin_history_leads_to_the_state",
        PAYINS,
        "A payin's history has a line for each version after the first, and the last one is its state.",
        f"""
        SELECT p.id FROM payins p
         CROSS JOIN LATERAL (
           SELECT count(*) AS lines, (array_agg(m.state ORDER BY m.version DESC))[1] AS state
             FROM payin_moves m WHERE m.payin_id = p.id AND m.shop_id = p.shop_id) m
         WHERE {PAYINS.within} AND (p.version <> m.lines + 1 OR p.state <> coalesce(m.state, 'pending'))
        """,
    ),
    Rule(
        "ended_payin_has_its_event",
        PAYINS,
        "Every payin that ended has the event that tells its status, and its callback when somebody is to be called.",
        f"""
        SELECT p.id FROM payins p
          LEFT JOIN events e ON e.payin_id = p.id AND e.shop_id = p.shop_id AND e.type = 'payin.' || p.state
          LEFT JOIN callbacks c ON c.event_id = e.id AND c.shop_id = e.shop_id
         WHERE {PAYINS.within} AND p.state <> 'pending'
           AND (e.id IS NULL OR (p.callback_url IS NOT NULL AND c.event_id IS NULL))
        """,
    ),
    Rule(
        "entry_is_of_its_account",
        ENTRIES,
        "Every entry carries the shop of its account.",
        f"""
        SELECT e.account_id || '/' || e.seq FROM entries e LEFT JOIN accounts a ON a.id = e.account_id
         WHERE {ENTRIES.within} AND e.shop_id IS DISTINCT FROM a.shop_id
        """,
    ),
    Rule(
        "adjustment_matches_its_audit",
        ENTRIES,
        "Every adjustment is what its audit row says: the account and the amount.",
        f"""
        SELECT e.account_id || '/' || e.seq FROM entries e LEFT JOIN audit a ON a.id = e.audit_id
         WHERE {ENTRIES.within} AND e.kind = 'adjustment' AND NOT coalesce(
           a.action = 'balance.topup' AND a.detail ->> 'account_id' = e.account_id::text
           AND a.detail ->> 'amount_minor' = e.posted_delta_minor::text, false)
        """,
    ),
    Rule(
        "event_tells_what_happened",
        EVENTS,
        "No event tells a status that its payout or payin did not come to.",
        f"""
        SELECT coalesce(e.payout_id, e.payin_id, e.id) FROM events e
         WHERE {EVENTS.within} AND NOT EXISTS (
           SELECT 1 FROM payout_moves m WHERE m.payout_id = e.payout_id AND m.shop_id = e.shop_id
              AND m.version = e.sequence AND e.type = 'payout.' || m.state)
           AND NOT EXISTS (
           SELECT 1 FROM payin_moves m WHERE m.payin_id = e.payin_id AND m.shop_id = e.shop_id
              AND m.version = e.sequence AND e.type = 'payin.' || m.state)
        """,
    ),
    Rule(
        "finished_payout_has_its_event",
        PAYOUTS,
        "Every finished payout has the event that tells its status, and its callback when somebody is to be called.",
        f"""
        SELECT p.id FROM payouts p
          LEFT JOIN events e ON e.payout_id = p.id AND e.shop_id = p.shop_id AND e.type = 'payout.' || p.state
          LEFT JOIN callbacks c ON c.event_id = e.id AND c.shop_id = e.shop_id
         WHERE {PAYOUTS.within} AND p.resolution_seq IS NOT NULL
           AND (e.id IS NULL OR (p.callback_url IS NOT NULL AND c.event_id IS NULL))
        """,
    ),
    Rule(
        "pending_callback_is_due",
        CALLBACKS,
        "Every pending callback has a due row, so that nobody is left untold.",
        f"""
        SELECT c.event_id FROM callbacks c
         WHERE {CALLBACKS.within} AND c.state = 'pending' AND NOT EXISTS (
           SELECT 1 FROM callback_due d WHERE d.event_id = c.event_id AND d.shop_id = c.shop_id)
        """,
    ),
    Rule(
        "due_callback_is_pending",
        CALLBACK_DUE,
        "Every due row of a callback belongs to a pending one.",
        f"""
        SELECT d.event_id FROM callback_due d
          LEFT JOIN callbacks c ON c.event_id = d.event_id AND c.shop_id = d.shop_id
         WHERE {CALLBACK_DUE.within} AND c.state IS DISTINCT FROM 'pending'
        """,
    ),
    Rule(
        "due_callback_has_its_lane",
        CALLBACK_DUE,
        "Every due row of a callback waits in a lane of its shop.",
        f"""
        SELECT d.event_id FROM callback_due d
         WHERE {CALLBACK_DUE.within} AND NOT EXISTS (
           SELECT 1 FROM callback_lanes l WHERE l.id = d.lane_id AND l.shop_id = d.shop_id)
        """,
    ),
    Rule(
        "lane_counts_its_leases",
        LANES,
        "What a lane has in flight is the number of leases on its callbacks.",
        f"""
        SELECT l.id FROM callback_lanes l
          LEFT JOIN (SELECT d.lane_id, count(*) AS n FROM callback_due d WHERE d.lease_token IS NOT NULL
                      GROUP BY d.lane_id) leases ON leases.lane_id = l.id
         WHERE {LANES.within} AND l.in_flight <> coalesce(leases.n, 0)
        """,
    ),
    Rule(
        "lane_comes_to_its_turn",
        LANES,
        "A lane that has room comes to its turn when its next callback is due, once it knows of it.",
        f"""
        SELECT l.id FROM callback_lanes l
         CROSS JOIN LATERAL (
           SELECT d.due_at, d.in_lane FROM callback_due d WHERE d.lane_id = l.id AND d.lease_token IS NULL
            ORDER BY d.due_at LIMIT 1) next
         WHERE {LANES.within} AND next.in_lane AND l.held_at IS NULL AND l.in_flight < l.cap
           AND l.ready_at > greatest(next.due_at, l.blocked_until, now()) + interval '5 s'
        """,
    ),
    Rule(
        "delivered_callback_has_a_2xx",
        CALLBACKS,
        "A callback that was delivered in the last 29 days has an attempt that was answered with 2xx.",
        # Attempts are kept for 30 days at least.
        f"""
        SELECT c.event_id FROM callbacks c
         WHERE {CALLBACKS.within} AND c.state = 'delivered' AND c.finished_at > now() - interval '29 days' AND NOT EXISTS (
           SELECT 1 FROM callback_attempts t WHERE t.event_id = c.event_id AND t.shop_id = c.shop_id
              AND t.started_at >= c.created_at - interval '1 day'
              AND t.http_status BETWEEN 200 AND 299)
        """,
    ),
)


async def verify(engine: Engine) -> list[Finding]:
    """Ask every rule about everything, on one snapshot. A rule that holds comes back with a count of zero."""
    async with engine.connect() as connection:
        snapshot = await connection.execution_options(isolation_level="REPEATABLE READ")
        await snapshot.execute(text("SET TRANSACTION READ ONLY"))
        await snapshot.execute(text("SET LOCAL statement_timeout = 0"))
        return [await find_offenders(snapshot, rule, behind=None, upto=None) for rule in RULES]


async def find_offenders(tx: Tx, rule: Rule, *, behind: Position | None, upto: Position | None) -> Finding:
    """Ask a rule about the rows of its walk behind one place and up to another. One statement: one snapshot."""
    query = text(
        f"SELECT count(*) AS n, (array_agg(offender::text))[1:{OFFENDERS_SHOWN}] AS first"
        f" FROM ({rule.query}) AS broken (offender)"
    )
    row = (await tx.execute(query, {"behind": behind, "upto": upto})).one()
    return Finding(rule, row.n, tuple(row.first or ()))
