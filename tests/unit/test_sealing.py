"""A sealed value opens for its own row, owner and purpose alone, across rotations of the master key."""

from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.domain.ids import new_id
from common.recipients import Recipient, open_recipient, seal_recipient
from common.sealing import API_KEY_PURPOSE, RECIPIENT_PURPOSE, WEBHOOK_SECRET_PURPOSE, Keyring, SealBroken

OLD, NEW, CONTENT = bytes(range(32)), bytes(range(32, 64)), bytes(range(64, 96))
KEYRING = Keyring({1: OLD}, 1, CONTENT)
OWNER, ROW = UUID(int=1), UUID(int=2)
NOW = 1_764_928_800.0
DAY = 86_400
SECRET = b"sk_of_a_merchant"


def seal(keyring: Keyring = KEYRING, plain: bytes = SECRET, now: float = NOW) -> bytes:
    return keyring.seal(plain, owner=OWNER, row=ROW, purpose=RECIPIENT_PURPOSE, now=now)


def unseal(
    sealed: bytes, keyring: Keyring = KEYRING, *, owner: UUID = OWNER, row: UUID = ROW, purpose: str = RECIPIENT_PURPOSE
) -> bytes:
    return keyring.open(sealed, owner=owner, row=row, purpose=purpose)


@given(st.binary(max_size=500), st.uuids(), st.uuids(), st.floats(0, 4e9))
def test_a_sealed_value_opens_as_it_was(plain: bytes, owner: UUID, row: UUID, now: float) -> None:
    sealed = KEYRING.seal(plain, owner=owner, row=row, purpose=API_KEY_PURPOSE, now=now)
    assert KEYRING.open(sealed, owner=owner, row=row, purpose=API_KEY_PURPOSE) == plain


def test_a_sealed_value_opens_for_no_other_row_owner_or_purpose() -> None:
    sealed = seal()
    for wrong in (
        {"row": uuid4()},
        {"owner": uuid4()},
        {"row": OWNER, "owner": ROW},
        {"purpose": API_KEY_PURPOSE},
        {"purpose": WEBHOOK_SECRET_PURPOSE},
        {"purpose": ""},
    ):
        with pytest.raises(SealBroken):
            unseal(sealed, **wrong)


@pytest.mark.parametrize("position", range(len(seal())))
def test_a_sealed_value_with_any_byte_changed_does_not_open(position: int) -> None:
    sealed = bytearray(seal())
    sealed[position] ^= 1
    with pytest.raises(SealBroken):
        unseal(bytes(sealed))


@pytest.mark.parametrize("length", range(len(seal())))
def test_a_sealed_value_that_was_cut_does_not_open(length: int) -> None:
    with pytest.raises(SealBroken):
        unseal(seal()[:length])


@given(st.binary(max_size=200))
def test_bytes_that_were_never_sealed_raise_nothing_but_seal_broken(garbage: bytes) -> None:
    with pytest.raises(SealBroken):
        unseal(garbage)


def test_a_value_of_a_master_key_we_do_not_have_does_not_open() -> None:
    with pytest.raises(SealBroken, match="no master key 1"):
        unseal(seal(), Keyring({2: OLD}, 2, CONTENT))


def test_another_master_key_under_the_same_id_does_not_open() -> None:
    with pytest.raises(SealBroken):
        unseal(seal(), Keyring({1: NEW}, 1, CONTENT))


def test_after_a_rotation_old_values_open_and_new_ones_are_sealed_with_the_new_key() -> None:
    before = seal()
    rotated = Keyring({1: OLD, 2: NEW}, 2, CONTENT)
    after = seal(rotated)
    assert unseal(before, rotated) == unseal(after, rotated) == SECRET
    assert unseal(after, Keyring({2: NEW}, 2, CONTENT)) == SECRET
    with pytest.raises(SealBroken):
        unseal(after, KEYRING)


def test_a_value_opens_on_every_later_day_and_data_keys_change_daily() -> None:
    first, second = seal(now=NOW), seal(now=NOW + DAY)
    assert unseal(first) == unseal(second) == SECRET
    moved = first[:3] + second[3:7] + first[7:]
    with pytest.raises(SealBroken):
        unseal(moved)


def test_equal_values_are_sealed_differently_each_time_and_show_nothing() -> None:
    sealed = {seal() for _ in range(100)}
    assert len(sealed) == 100
    assert not [value for value in sealed if SECRET in value]


def test_digests_compare_content_of_one_owner_across_rotations_of_the_master_key() -> None:
    rotated = Keyring({1: OLD, 2: NEW}, 2, CONTENT)
    digest = KEYRING.digest("recipient|01712345678", owner=OWNER)
    assert digest == rotated.digest("recipient|01712345678", owner=OWNER)
    assert len(digest) == 32
    assert digest != KEYRING.digest("recipient|01712345679", owner=OWNER)
    assert digest != KEYRING.digest("recipient|01712345678", owner=ROW)
    assert digest != Keyring({1: OLD}, 1, NEW).digest("recipient|01712345678", owner=OWNER)


def test_keys_and_recipients_are_not_printed() -> None:
    printed = repr(KEYRING) + str(KEYRING) + repr(Recipient("4111111111111111", {"pin": "998877"}))
    assert not [word for word in (repr(OLD), repr(CONTENT), "4111", "998877") if word in printed]


@given(
    st.text(st.characters(codec="utf-8"), max_size=50),
    st.none() | st.dictionaries(st.text(st.characters(codec="utf-8")), st.integers() | st.booleans()),
)
def test_a_recipient_opens_for_its_payout_alone(number: str, payment_data: dict[str, object] | None) -> None:
    payout_id = new_id()
    recipient = Recipient(number, payment_data)
    sealed = seal_recipient(KEYRING, recipient, shop_id=OWNER, payout_id=payout_id, now=NOW)
    assert open_recipient(KEYRING, sealed, shop_id=OWNER, payout_id=payout_id) == recipient
    with pytest.raises(SealBroken):
        open_recipient(KEYRING, sealed, shop_id=OWNER, payout_id=new_id())
