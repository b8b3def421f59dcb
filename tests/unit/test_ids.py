"""Ids and references: what a payout is called, inside, towards merchants and towards rails."""

from uuid import UUID

from common.domain.ids import PAYOUT, new_id, new_payout_id, parse_id, payout_reference, render_id

SHOP, ANOTHER_SHOP = new_id(), new_id()


def test_a_payout_that_was_forgotten_and_is_created_again_has_the_reference_it_had() -> None:
    before, again = new_payout_id(), new_payout_id()
    assert before != again
    reference = payout_reference(before, SHOP, "PAY-1")
    assert payout_reference(again, SHOP, "PAY-1") == reference
    assert parse_id(PAYOUT, reference) is not None


def test_another_shop_and_another_external_id_have_another_reference() -> None:
    payout_id = new_payout_id()
    named = {payout_reference(payout_id, shop, name) for shop in (SHOP, ANOTHER_SHOP) for name in ("PAY-1", "PAY-2")}
    assert len(named) == 4


def test_the_reference_of_a_shop_and_an_external_id_is_the_same_in_every_version() -> None:
    shop_id = UUID("018f5e7a-1b2c-7d3e-8f40-a1b2c3d4e5f6")
    assert payout_reference(new_payout_id(), shop_id, "PAY-1") == "po_7qanj1w6vb24rah2h71j16v41d"


def test_payouts_that_were_accepted_when_the_id_was_the_reference_keep_it() -> None:
    payout_id = new_id()
    assert payout_reference(payout_id, SHOP, "PAY-1") == render_id(PAYOUT, payout_id)


def test_ids_of_payouts_are_valid_and_follow_the_time_as_all_ids_do() -> None:
    made = [new_payout_id() for _ in range(3)]
    assert {payout_id.version for payout_id in made} == {8}
    assert {payout_id.variant for payout_id in made} == {new_id().variant}
    apart = [payout_id.int >> 80 for payout_id in (new_id(), new_payout_id(), new_id())]
    assert apart == sorted(apart)
