"""The checker: silent on an honest history, and for every way to falsify one, the rule that names who was falsified."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from uuid import uuid4

import pytest

from common.db.engine import Tx, in_transaction
from common.db.invariants import OFFENDERS_SHOWN, RULES, verify
from tests.conftest import Server
from tests.factories import engine, execute
from tests.flows import Desk, assert_sound, broken_rules, cloned, desk, forge, pass_over, take_callbacks
from worker.callbacks.recording import Ended, record_attempts
from worker.callbacks.send import Attempt
from worker.hearing import hear

URL = "http://127.0.0.1:9/told"


@dataclass(frozen=True, slots=True)
class Story:
    """The name of a database with an honest history, to clone, and what cases call its rows."""

    database: str
    names: dict[str, str]


async def _live_honestly(working: Desk) -> dict[str, str]:
    """Payouts in every state of this release, and callbacks: one delivered, one still pending."""
    merchant = await working.merchant()
    other = await working.merchant()
    recipients = {"success": "01712345678", "failed": "017000000100", "submitted": "017000000001"}
    ids = {
        name: await working.create(merchant, recipient=number, callback_url=URL) for name, number in recipients.items()
    }
    ids["verifying"] = await working.create(merchant, recipient="017000000200")
    ids["other"] = await working.create(other)
    ids["refunded"] = await working.create(other, recipient="017000000300")
    await working.settle(working.settler(rail_timeout_seconds=1.0))
    while await working.state(ids["refunded"]) != "refunded":
        await hear(working.worker)
    ids["sending"] = await working.create(merchant)
    await working.claim()
    ids["queued"] = await working.create(merchant)
    payins = {
        name: await working.create_payin(other, amount_minor=amount_minor, callback_url=URL)
        for name, amount_minor in {"paid_in": 1000, "pending_in": 1001, "failed_in": 1002, "refunded_in": 1004}.items()
    }
    await working.collect()
    while await working.payin_state(payins["refunded_in"]) != "refunded":
        await execute(working.owner, "UPDATE rail_events SET due_at = now() WHERE applied_at IS NULL")
        await hear(working.worker)
    await execute(
        working.owner,
        "UPDATE callback_due SET due_at = now() + interval '1 hour' WHERE event_id IN ("
        "SELECT id FROM events WHERE payin_id IS NOT NULL)",
    )
    delivered = await working.one("SELECT id FROM events WHERE payout_id = :id", id=ids["success"])
    pending = await working.one("SELECT id FROM events WHERE payout_id = :id", id=ids["failed"])
    await _deliver_only(working, str(delivered.id))
    names = {name: str(payout_id) for name, payout_id in ids.items()}
    for name in ("success", "failed", "submitted", "verifying", "sending", "queued"):
        assert await working.state(ids[name]) == name
        row = await working.one("SELECT hold_seq, resolution_seq FROM payouts WHERE id = :id", id=ids[name])
        names[f"{name}_hold"], names[f"{name}_end"] = str(row.hold_seq), str(row.resolution_seq)
    row = await working.one("SELECT return_seq FROM payouts WHERE id = :id", id=ids["refunded"])
    of_shop = "SELECT id FROM callback_lanes WHERE shop_id = :id"
    lane, other_lane = [await working.one(of_shop, id=shop.id) for shop in (merchant.shop, other.shop)]
    credit = await working.one("SELECT credit_seq FROM payins WHERE id = :id", id=payins["paid_in"])
    return names | {
        **{name: str(payin_id) for name, payin_id in payins.items()},
        "paid_in_credit": str(credit.credit_seq),
        "refunded_return": str(row.return_seq),
        "account": str(merchant.shop.account_id),
        "other_account": str(other.shop.account_id),
        "shop": str(merchant.shop.id),
        "fresh": str(uuid4()),
        "delivered": str(delivered.id),
        "lane": str(lane.id),
        "other_lane": str(other_lane.id),
        "pending": str(pending.id),
    }


async def _deliver_only(working: Desk, event_id: str) -> None:
    async def deliver(tx: Tx) -> None:
        token = uuid4()
        claimed = await take_callbacks(tx, token, 10)
        (callback,) = [item for item in claimed if str(item.event_id) == event_id]
        taken = Attempt(200, None, b"", "127.0.0.1", 1, 0.0)
        await record_attempts(tx, [Ended(callback, token, taken, 0.0, 0.0)], now=0.0)

    await in_transaction(working.worker, deliver)
    again = "UPDATE callback_due SET lease_token = NULL, due_at = now(), in_lane = true, attempts_made = 0"
    await execute(working.owner, again)
    await execute(working.owner, "UPDATE callback_lanes SET in_flight = 0, ready_at = now()")


@pytest.fixture(scope="module")
def story(server: Server, template: str) -> Iterator[Story]:
    cloning = cloned(server, template)

    async def build() -> Story:
        url = await cloning.__aenter__()
        async with desk(url) as working:
            names = await _live_honestly(working)
            await assert_sound(working.owner)
        return Story(url.rpartition("/")[2], names)

    with asyncio.Runner() as runner:
        yield runner.run(build())
        runner.run(cloning.__aexit__(None, None, None))


# The rule, what is falsified, and whom the rule must name.
FORGERIES: list[tuple[str, str, set[str]]] = [
    ("history_leads_to_the_state", "DELETE FROM payout_moves WHERE payout_id = '{success}'", {"{success}"}),
    ("history_leads_to_the_state", "UPDATE payout_moves SET version = 12 WHERE payout_id = '{success}' AND version = 2",
     {"{success}"}),
    ("history_leads_to_the_state", "DELETE FROM payout_moves WHERE payout_id = '{success}' AND version = 3", {"{success}"}),
    ("history_leads_to_the_state", "UPDATE payout_moves SET state = 'failed' WHERE payout_id = '{success}'", {"{success}"}),
    ("history_leads_to_the_state", "UPDATE payouts SET version = version + 1 WHERE id = '{failed}'", {"{failed}"}),
    ("account_equals_last_entry", "UPDATE accounts SET posted_minor = posted_minor + 1 WHERE id = {account}",
     {"{account}"}),
    ("account_equals_last_entry", "UPDATE accounts SET held_minor = held_minor + 1 WHERE id = {account}",
     {"{account}"}),
    ("account_equals_last_entry", "UPDATE accounts SET last_seq = last_seq + 1 WHERE id = {account}", {"{account}"}),
    ("account_equals_last_entry", "DELETE FROM entries WHERE account_id = {account}", {"{account}"}),
    ("entries_chain", "DELETE FROM entries WHERE account_id = {account} AND seq = {failed_hold}",
     {"{account}/{submitted_hold}"}),
    ("entries_chain", "DELETE FROM entries WHERE account_id = {account} AND seq = 1", {"{account}/{success_hold}"}),
    ("entries_chain",
     "UPDATE entries SET posted_after_minor = posted_after_minor + 1 WHERE account_id = {account} AND seq = {failed_hold}",
     {"{account}/{failed_hold}", "{account}/{submitted_hold}"}),
    ("entries_chain",
     "UPDATE entries SET held_after_minor = held_after_minor + 1 WHERE account_id = {account} AND seq = {failed_hold}",
     {"{account}/{failed_hold}", "{account}/{submitted_hold}"}),
    ("held_equals_unfinished_payouts", "UPDATE payouts SET amount_minor = 999 WHERE id = '{queued}'", {"{account}"}),
    ("held_equals_unfinished_payouts", "DELETE FROM payouts WHERE id = '{sending}'", {"{account}"}),
    ("held_equals_unfinished_payouts",
     "UPDATE payouts SET account_id = {other_account} WHERE id = '{verifying}'", {"{account}"}),
    ("held_equals_unfinished_payouts", "DELETE FROM payout_due WHERE payout_id = '{queued}'", {"{account}"}),
    ("payout_has_its_hold", "UPDATE payouts SET account_id = {other_account} WHERE id = '{verifying}'", {"{verifying}"}),
    ("payout_has_its_hold", "UPDATE payouts SET hold_seq = 1 WHERE id = '{queued}'", {"{queued}"}),
    ("payout_has_its_hold", "UPDATE payouts SET hold_seq = {sending_hold} WHERE id = '{queued}'", {"{queued}"}),
    ("payout_has_its_hold", "UPDATE payouts SET hold_seq = 999 WHERE id = '{success}'", {"{success}"}),
    ("payout_has_its_hold", "UPDATE payouts SET amount_minor = amount_minor + 1 WHERE id = '{submitted}'",
     {"{submitted}"}),
    ("payout_has_its_resolution", "UPDATE payouts SET resolution_seq = hold_seq WHERE id = '{success}'",
     {"{success}"}),
    ("payout_has_its_resolution", "UPDATE payouts SET resolution_seq = {failed_end} WHERE id = '{success}'",
     {"{success}"}),
    ("payout_has_its_resolution", "UPDATE payouts SET state = 'failed', failure_code = 'other' WHERE id = '{success}'",
     {"{success}"}),
    ("payout_has_its_resolution", "UPDATE payouts SET state = 'success', failure_code = NULL WHERE id = '{failed}'",
     {"{failed}"}),
    ("payout_has_its_resolution", "UPDATE payouts SET amount_minor = amount_minor + 1 WHERE id = '{failed}'",
     {"{failed}"}),
    ("entry_has_its_payout", "DELETE FROM payouts WHERE id = '{success}'",
     {"{account}/{success_hold}", "{account}/{success_end}"}),
    ("entry_has_its_payout", "UPDATE payouts SET resolution_seq = NULL, finalized_at = NULL, state = 'sending'"
     " WHERE id = '{success}'", {"{account}/{success_end}"}),
    ("unfinished_payout_is_due", "DELETE FROM payout_due WHERE payout_id = '{verifying}'", {"{verifying}"}),
    ("unfinished_payout_is_due", "UPDATE payout_due SET shop_id = '{fresh}' WHERE payout_id = '{queued}'", {"{queued}"}),
    ("due_payout_is_unfinished",
     "INSERT INTO payout_due (payout_id, shop_id, rail) SELECT id, shop_id, 'sandbox' FROM payouts WHERE id = '{success}'",
     {"{success}"}),
    ("due_payout_is_unfinished",
     "INSERT INTO payout_due (payout_id, shop_id, rail) VALUES ('{fresh}', '{shop}', 'sandbox')", {"{fresh}"}),
    *(
        ("sent_payout_has_an_attempt", f"DELETE FROM payout_attempts WHERE payout_id = '{{{name}}}'", {f"{{{name}}}"})
        for name in ("sending", "submitted", "verifying", "success")
    ),
    *(
        ("failure_is_definite",
         f"UPDATE payout_attempts SET outcome = '{outcome}' WHERE payout_id = '{{failed}}'", {"{failed}"})
        for outcome in ("unknown", "submitted", "paid")
    ),
    ("failure_is_definite",
     "UPDATE payout_attempts SET outcome = NULL, finished_at = NULL WHERE payout_id = '{failed}'", {"{failed}"}),
    ("money_follows_the_rail", "UPDATE payout_attempts SET outcome = 'declined' WHERE payout_id = '{success}'",
     {"{success}"}),
    ("entry_is_of_its_account", "UPDATE entries SET shop_id = '{fresh}' WHERE account_id = {account} AND seq = 1",
     {"{account}/1"}),
    ("adjustment_matches_its_audit", "UPDATE audit SET action = 'key.add' WHERE action = 'balance.topup'",
     {"{account}/1", "{other_account}/1"}),
    ("event_tells_what_happened", "UPDATE events SET type = 'payout.failed' WHERE id = '{delivered}'", {"{success}"}),
    *(
        ("money_follows_the_rail",
         f"UPDATE payout_attempts SET outcome = '{outcome}' WHERE payout_id = '{{success}}'", {"{success}"})
        for outcome in ("declined", "unknown", "not_accepted")
    ),
    ("money_follows_the_rail",
     "WITH paid AS (UPDATE payout_attempts SET outcome = 'paid' WHERE payout_id = '{failed}' RETURNING *)"
     " INSERT INTO payout_attempts SELECT payout_id, shop_id, 2, 'look_up', rail, reference, now(), now(), 'not_found'"
     " FROM paid", {"{failed}"}),
    ("entry_is_of_its_account", "UPDATE entries SET shop_id = '{fresh}' WHERE account_id = {account} AND seq = 1",
     {"{account}/1"}),
    ("adjustment_matches_its_audit",
     "UPDATE entries SET audit_id = (SELECT min(id) FROM audit) WHERE account_id = {account} AND kind = 'adjustment'",
     {"{account}/1"}),
    ("adjustment_matches_its_audit",
     "UPDATE audit SET detail = jsonb_set(detail, '{{amount_minor}}', '1') WHERE id = ("
     "SELECT audit_id FROM entries WHERE account_id = {account} AND seq = 1)", {"{account}/1"}),
    ("adjustment_matches_its_audit",
     "UPDATE audit SET detail = jsonb_set(detail, '{{account_id}}', '{other_account}') WHERE id = ("
     "SELECT audit_id FROM entries WHERE account_id = {account} AND seq = 1)", {"{account}/1"}),
    ("event_tells_what_happened",
     "INSERT INTO events SELECT '{fresh}', shop_id, payout_id, 99, 'payout.failed', body FROM events"
     " WHERE id = '{delivered}'", {"{success}"}),
    ("event_tells_what_happened", "UPDATE events SET type = 'payout.refunded' WHERE payout_id = '{success}'", {"{success}"}),
    ("refunded_payout_has_its_return", "UPDATE payouts SET return_seq = 1 WHERE id = '{refunded}'", {"{refunded}"}),
    ("refunded_payout_has_its_return", "DELETE FROM payout_attempts WHERE outcome = 'returned'", {"{refunded}"}),
    ("entry_has_its_payout", "UPDATE payouts SET return_seq = NULL, state = 'success', failure_code = NULL"
     " WHERE id = '{refunded}'", {"{other_account}/{refunded_return}"}),
    ("finished_payout_has_its_event", "DELETE FROM events WHERE payout_id = '{failed}'", {"{failed}"}),
    ("finished_payout_has_its_event", "UPDATE events SET type = 'payout.failed' WHERE payout_id = '{success}'",
     {"{success}"}),
    ("finished_payout_has_its_event", "DELETE FROM callbacks WHERE event_id = '{delivered}'", {"{success}"}),
    ("entry_has_its_payin", "UPDATE payins SET credit_seq = 1 WHERE id = '{paid_in}'",
     {"{other_account}/{paid_in_credit}"}),
    ("entry_has_its_payin", "UPDATE payins SET account_id = {account} WHERE id = '{paid_in}'",
     {"{other_account}/{paid_in_credit}"}),
    ("paid_payin_has_its_credit", "UPDATE payins SET credit_seq = NULL, state = 'pending', finalized_at = NULL"
     " WHERE id = '{paid_in}'", {"{paid_in}"}),
    ("paid_payin_has_its_credit", "UPDATE payins SET amount_minor = amount_minor + 1 WHERE id = '{paid_in}'", {"{paid_in}"}),
    ("paid_payin_has_its_credit",
     "UPDATE payins SET credit_seq = 1, state = 'success', failure_code = NULL WHERE id = '{failed_in}'", {"{failed_in}"}),
    ("refunded_payin_has_its_refund", "UPDATE payins SET refund_seq = credit_seq WHERE id = '{refunded_in}'",
     {"{refunded_in}"}),
    ("refunded_payin_has_its_refund", "UPDATE payins SET refund_seq = NULL, state = 'success' WHERE id = '{refunded_in}'",
     {"{refunded_in}"}),
    ("credit_follows_the_rail", "DELETE FROM payin_words WHERE payin_id = '{paid_in}'", {"{paid_in}"}),
    ("credit_follows_the_rail", "UPDATE payin_words SET amount_minor = amount_minor + 1 WHERE payin_id = '{paid_in}'",
     {"{paid_in}"}),
    ("credit_follows_the_rail", "UPDATE payin_words SET outcome = 'paid' WHERE payin_id = '{failed_in}'", {"{failed_in}"}),
    ("pending_payin_is_due", "DELETE FROM payin_due WHERE payin_id = '{pending_in}'", {"{pending_in}"}),
    ("due_payin_is_pending", "INSERT INTO payin_due (payin_id, shop_id, rail, due_at)"
     " SELECT id, shop_id, rail, now() FROM payins WHERE id = '{paid_in}'", {"{paid_in}"}),
    ("due_payin_is_pending", "INSERT INTO payin_due (payin_id, shop_id, rail, due_at)"
     " VALUES ('{fresh}', '{shop}', 'sandbox', now())", {"{fresh}"}),
    ("payin_history_leads_to_the_state", "DELETE FROM payin_moves WHERE payin_id = '{refunded_in}' AND version = 2",
     {"{refunded_in}"}),
    ("payin_history_leads_to_the_state", "UPDATE payin_moves SET state = 'failed' WHERE payin_id = '{paid_in}'",
     {"{paid_in}"}),
    ("ended_payin_has_its_event", "DELETE FROM events WHERE payin_id = '{failed_in}'", {"{failed_in}"}),
    ("ended_payin_has_its_event", "DELETE FROM callbacks WHERE payin_id = '{paid_in}'", {"{paid_in}"}),
    ("event_tells_what_happened", "UPDATE events SET type = 'payin.failed' WHERE payin_id = '{paid_in}'", {"{paid_in}"}),
    ("pending_callback_is_due", "DELETE FROM callback_due WHERE event_id = '{pending}'", {"{pending}"}),
    ("due_callback_is_pending", "INSERT INTO callback_due (event_id, shop_id, lane_id)"
     " VALUES ('{delivered}', '{shop}', '{lane}')",
     {"{delivered}"}),
    ("due_callback_is_pending", "INSERT INTO callback_due (event_id, shop_id, lane_id)"
     " VALUES ('{fresh}', '{shop}', '{lane}')",
     {"{fresh}"}),
    ("due_callback_has_its_lane", "UPDATE callback_due SET lane_id = '{fresh}' WHERE event_id = '{pending}'", {"{pending}"}),
    ("due_callback_has_its_lane", "UPDATE callback_due SET lane_id = '{other_lane}' WHERE event_id = '{pending}'",
     {"{pending}"}),
    ("lane_counts_its_leases", "UPDATE callback_lanes SET in_flight = 1 WHERE id = '{lane}'", {"{lane}"}),
    ("lane_counts_its_leases", "UPDATE callback_due SET lease_token = gen_random_uuid() WHERE event_id = '{pending}'",
     {"{lane}"}),
    ("lane_comes_to_its_turn", "UPDATE callback_lanes SET ready_at = now() + interval '1 minute' WHERE id = '{lane}'",
     {"{lane}"}),
    ("lane_comes_to_its_turn", "UPDATE callback_lanes SET ready_at = 'infinity'", {"{lane}", "{other_lane}"}),
    ("delivered_callback_has_a_2xx", "UPDATE callback_attempts SET http_status = 302", {"{delivered}"}),
    ("delivered_callback_has_a_2xx", "DELETE FROM callback_attempts", {"{delivered}"}),
    ("delivered_callback_has_a_2xx",
     "UPDATE callbacks SET state = 'delivered', finished_at = now() WHERE event_id = '{pending}'", {"{pending}"}),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "forgery", "offenders"), FORGERIES, ids=[f"{f[0]}: {f[1][:60]}" for f in FORGERIES])
async def test_names_who_was_falsified(
    server: Server, story: Story, rule: str, forgery: str, offenders: set[str]
) -> None:
    async with cloned(server, story.database) as url:
        await forge(server, url, forgery.format_map(story.names))
        async with desk(url) as working:
            broken = await broken_rules(working.owner)
            found = await pass_over(working.worker, rows_max=2)
    assert set(broken.get(rule, ())) == {offender.format_map(story.names) for offender in offenders}
    assert found == {name: set(named) for name, named in broken.items()}, "in steps it is the same"


def test_there_is_a_forgery_for_every_rule() -> None:
    assert {rule for rule, _, _ in FORGERIES} == {rule.name for rule in RULES}


async def test_names_the_first_few_of_many_and_counts_them_all(server: Server, database_url: str) -> None:
    async with desk(database_url) as working:
        many = OFFENDERS_SHOWN + 5
        await working.create_many(await working.merchant(), many)
        await forge(server, database_url, "DELETE FROM payout_due")
        (finding,) = [found for found in await verify(working.owner) if found.rule.name == "unfinished_payout_is_due"]
        assert (finding.count, len(finding.offenders)) == (many, OFFENDERS_SHOWN)


async def test_an_empty_database_is_sound(database_url: str) -> None:
    async with desk(database_url) as working:
        await assert_sound(working.owner)


@pytest.mark.parametrize("role", ["payouts_readonly", "payouts_ops"])
async def test_whoever_reads_may_check(server: Server, story: Story, role: str) -> None:
    async with cloned(server, story.database) as url:
        pool = engine(url, role=role)
        await assert_sound(pool)
        await pool.dispose()
