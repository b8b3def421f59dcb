"""What must always be true of the money, as queries that return who breaks it. Used by tests, by `payouts verify`.

All rules look at one snapshot; on a busy database that is one REPEATABLE READ transaction, read only.
"""

from dataclasses import dataclass
from typing import Final

from sqlalchemy import text

from common.db.engine import Engine

OFFENDERS_SHOWN: Final = 10


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule in words, and the query whose rows break it. The first column names the offender."""

    name: str
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
        "An account's balances and sequence are those of its last entry, or zero without one.",
        """
        SELECT a.id FROM accounts a
          LEFT JOIN LATERAL (SELECT e.seq, e.posted_after_minor, e.held_after_minor FROM entries e
                              WHERE e.account_id = a.id ORDER BY e.seq DESC LIMIT 1) e ON true
         WHERE (a.posted_minor, a.held_minor, a.last_seq)
               <> (coalesce(e.posted_after_minor, 0), coalesce(e.held_after_minor, 0), coalesce(e.seq, 0))
        """,
    ),
    Rule(
        "entries_chain",
        "Each entry continues the one before it: no gap in the sequence, balances that add up.",
        """
        SELECT account_id || '/' || seq FROM (
          SELECT account_id, seq, posted_after_minor - posted_delta_minor AS posted_before,
                 held_after_minor - held_delta_minor AS held_before,
                 coalesce(lag(seq) OVER w, 0) AS seq_prior, coalesce(lag(posted_after_minor) OVER w, 0) AS posted_prior,
                 coalesce(lag(held_after_minor) OVER w, 0) AS held_prior
            FROM entries WINDOW w AS (PARTITION BY account_id ORDER BY seq)) c
         WHERE seq <> seq_prior + 1 OR posted_before <> posted_prior OR held_before <> held_prior
        """,
    ),
    Rule(
        "held_equals_unfinished_payouts",
        "What an account holds is the sum of its unfinished payouts.",
        """
        SELECT a.id FROM accounts a
          LEFT JOIN (SELECT account_id, sum(amount_minor) AS held FROM payouts
                      WHERE resolution_seq IS NULL GROUP BY account_id) p ON p.account_id = a.id
         WHERE a.held_minor <> coalesce(p.held, 0)
        """,
    ),
    Rule(
        "payout_has_its_hold",
        "Every payout points at the one entry that held exactly its amount.",
        """
        SELECT p.id FROM payouts p
          LEFT JOIN entries e ON e.account_id = p.account_id AND e.seq = p.hold_seq AND e.kind = 'hold'
         WHERE e.payout_id IS DISTINCT FROM p.id OR e.amount_minor IS DISTINCT FROM p.amount_minor
        """,
    ),
    Rule(
        "payout_has_its_resolution",
        "A finished payout points at a capture when it was paid and at a release otherwise, of exactly its amount.",
        """
        SELECT p.id FROM payouts p
          LEFT JOIN entries e ON e.account_id = p.account_id AND e.seq = p.resolution_seq
         WHERE p.resolution_seq IS NOT NULL
           AND (e.payout_id IS DISTINCT FROM p.id OR e.amount_minor IS DISTINCT FROM p.amount_minor
                OR e.kind IS DISTINCT FROM CASE WHEN p.state IN ('success', 'refunded') THEN 'capture' ELSE 'release' END)
        """,
    ),
    Rule(
        "refunded_payout_has_its_return",
        "A refunded payout points at the entry that brought exactly its amount back, and the rail said so.",
        """
        SELECT p.id FROM payouts p
          LEFT JOIN entries e ON e.account_id = p.account_id AND e.seq = p.return_seq AND e.kind = 'payout_return'
         WHERE p.state = 'refunded' AND (
           e.payout_id IS DISTINCT FROM p.id OR e.amount_minor IS DISTINCT FROM p.amount_minor OR NOT EXISTS (
             SELECT 1 FROM payout_attempts t
              WHERE t.payout_id = p.id AND t.shop_id = p.shop_id AND t.outcome = 'returned'))
        """,
    ),
    Rule(
        "entry_has_its_payout",
        "Every hold, capture, release and return belongs to a payout that points back at it.",
        """
        SELECT e.account_id || '/' || e.seq FROM entries e
          LEFT JOIN payouts p ON p.id = e.payout_id AND p.shop_id = e.shop_id AND p.account_id = e.account_id
         WHERE e.kind <> 'adjustment'
           AND e.seq IS DISTINCT FROM
               CASE e.kind WHEN 'hold' THEN p.hold_seq WHEN 'payout_return' THEN p.return_seq ELSE p.resolution_seq END
        """,
    ),
    Rule(
        "unfinished_payout_is_due",
        "Every unfinished payout has a due row, so that nothing is forgotten.",
        """
        SELECT p.id FROM payouts p WHERE p.resolution_seq IS NULL
           AND NOT EXISTS (SELECT 1 FROM payout_due d WHERE d.payout_id = p.id AND d.shop_id = p.shop_id)
        """,
    ),
    Rule(
        "due_payout_is_unfinished",
        "Every due row belongs to an unfinished payout.",
        """
        SELECT d.payout_id FROM payout_due d
          LEFT JOIN payouts p ON p.id = d.payout_id AND p.shop_id = d.shop_id
         WHERE p.id IS NULL OR p.resolution_seq IS NOT NULL
        """,
    ),
    Rule(
        "sent_payout_has_an_attempt",
        "A payout that is or may be at its rail, or was paid, has an attempt with its reference.",
        """
        SELECT p.id FROM payouts p
         WHERE p.state IN ('sending', 'submitted', 'verifying', 'success', 'refunded')
           AND NOT EXISTS (SELECT 1 FROM payout_attempts t WHERE t.payout_id = p.id AND t.shop_id = p.shop_id)
        """,
    ),
    Rule(
        "failure_is_definite",
        "No money was released while the last word of the rail was missing or ambiguous.",
        """
        SELECT p.id FROM payouts p
          JOIN LATERAL (SELECT t.outcome FROM payout_attempts t WHERE t.payout_id = p.id AND t.shop_id = p.shop_id
                         ORDER BY t.attempt_no DESC LIMIT 1) latest ON true
         WHERE p.state IN ('failed', 'canceled', 'expired')
           AND coalesce(latest.outcome, '') NOT IN ('declined', 'not_accepted', 'not_found')
        """,
    ),
    Rule(
        "money_follows_the_rail",
        "Money was captured only when the rail said that it paid, and never released when it did.",
        """
        SELECT p.id FROM payouts p
         WHERE p.resolution_seq IS NOT NULL AND (p.state IN ('success', 'refunded')) <> EXISTS (
           SELECT 1 FROM payout_attempts t
            WHERE t.payout_id = p.id AND t.shop_id = p.shop_id AND t.outcome = 'paid')
        """,
    ),
    Rule(
        "history_leads_to_the_state",
        "A payout's history has a line for each version since it was first written, and the last one is its state.",
        """
        SELECT p.id FROM payouts p
          LEFT JOIN (SELECT payout_id, shop_id, max(version) AS version, max(version) - min(version) + 1 - count(*) AS gaps,
                            (array_agg(state ORDER BY version DESC))[1] AS state
                       FROM payout_moves GROUP BY payout_id, shop_id) m ON m.payout_id = p.id AND m.shop_id = p.shop_id
         WHERE p.version <> coalesce(m.version, 1) OR coalesce(m.gaps, 0) <> 0 OR p.state <> coalesce(m.state, 'queued')
        """,
    ),
    Rule(
        "entry_is_of_its_account",
        "Every entry carries the shop of its account.",
        """
        SELECT e.account_id || '/' || e.seq FROM entries e LEFT JOIN accounts a ON a.id = e.account_id
         WHERE e.shop_id IS DISTINCT FROM a.shop_id
        """,
    ),
    Rule(
        "adjustment_matches_its_audit",
        "Every adjustment is what its audit row says: the account and the amount.",
        """
        SELECT e.account_id || '/' || e.seq FROM entries e LEFT JOIN audit a ON a.id = e.audit_id
         WHERE e.kind = 'adjustment' AND NOT coalesce(
           a.action = 'balance.topup' AND a.detail ->> 'account_id' = e.account_id::text
           AND a.detail ->> 'amount_minor' = e.posted_delta_minor::text, false)
        """,
    ),
    Rule(
        "event_tells_what_happened",
        "No event tells a status that its payout did not come to.",
        """
        SELECT coalesce(p.id, e.id) FROM events e LEFT JOIN payouts p ON p.id = e.payout_id AND p.shop_id = e.shop_id
         WHERE p.id IS NULL OR NOT EXISTS (
           SELECT 1 FROM payout_moves m WHERE m.payout_id = e.payout_id AND m.shop_id = e.shop_id
              AND m.version = e.sequence AND e.type = 'payout.' || m.state)
        """,
    ),
    Rule(
        "finished_payout_has_its_event",
        "Every finished payout has the event that tells its status, and its callback when somebody is to be called.",
        """
        SELECT p.id FROM payouts p
          LEFT JOIN events e ON e.payout_id = p.id AND e.shop_id = p.shop_id AND e.type = 'payout.' || p.state
          LEFT JOIN callbacks c ON c.event_id = e.id AND c.shop_id = e.shop_id
         WHERE p.resolution_seq IS NOT NULL
           AND (e.id IS NULL OR (p.callback_url IS NOT NULL AND c.event_id IS NULL))
        """,
    ),
    Rule(
        "callback_due_iff_pending",
        "A callback is due exactly while it is pending.",
        """
        SELECT coalesce(c.event_id, d.event_id) FROM callbacks c
          FULL JOIN callback_due d ON d.event_id = c.event_id AND d.shop_id = c.shop_id
         WHERE (c.state IS NOT DISTINCT FROM 'pending') <> (d.event_id IS NOT NULL)
        """,
    ),
    Rule(
        "delivered_callback_has_a_2xx",
        "A delivered callback has an attempt that was answered with 2xx.",
        """
        SELECT c.event_id FROM callbacks c
         WHERE c.state = 'delivered' AND NOT EXISTS (
           SELECT 1 FROM callback_attempts t WHERE t.event_id = c.event_id AND t.shop_id = c.shop_id
              AND t.http_status BETWEEN 200 AND 299)
        """,
    ),
)


async def verify(engine: Engine) -> list[Finding]:
    """Ask every rule, on one snapshot. A rule that holds comes back with a count of zero."""
    async with engine.connect() as connection:
        snapshot = await connection.execution_options(isolation_level="REPEATABLE READ")
        await snapshot.execute(text("SET TRANSACTION READ ONLY"))
        await snapshot.execute(text("SET LOCAL statement_timeout = 0"))
        findings = []
        for rule in RULES:
            query = text(
                f"SELECT count(*) AS n, (array_agg(offender::text))[1:{OFFENDERS_SHOWN}] AS first"
                f" FROM ({rule.query}) AS broken (offender)"
            )
            row = (await snapshot.execute(query)).one()
            findings.append(Finding(rule, row.n, tuple(row.first or ())))
        return findings
