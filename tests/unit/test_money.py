"""Amounts survive the way in and out, and nothing but a plain positive decimal string is one."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.domain.money import AMOUNT_MINOR_MAX, CURRENCY_EXPONENTS, parse_amount, render_amount

amounts_minor = st.integers(1, AMOUNT_MINOR_MAX)
exponents = st.sampled_from(sorted(set(CURRENCY_EXPONENTS.values())))

TRAPS = [
    *(
        "",
        " ",
        "1 ",
        " 1",
        "1\n",
        "\t1",
        "+1",
        "-1",
        "-0",
        "1e2",
        "1E2",
        "1e-2",
        "1_0",
        "1,0",
        "1,000.00",
        "0x10",
        "0b1",
        "1.",
        ".1",
    ),
    *(
        ".",
        "1..0",
        "1.0.0",
        "NaN",
        "nan",
        "Infinity",
        "inf",
        "-Infinity",
        "٣",
        "\uff11",
        "1\u066b5",
        "½",
        "²",
        "Ⅷ",
        "1.٣",
        "1\x00",
        "1\u200b",
    ),
    *(
        "\ufeff1",
        "1\u00a0",
        "\u22121",
        "BDT 1",
        "1 BDT",
        "0",
        "0.0",
        "00",
        "1/2",
        "1" * 33,
        "1." + "0" * 33,
        "9" * 5000,
        "\ud800",
    ),
]


@given(amounts_minor, exponents)
def test_an_amount_survives_the_way_out_and_back(amount_minor: int, exponent: int) -> None:
    assert parse_amount(render_amount(amount_minor, exponent), exponent) == amount_minor


@given(st.integers(-AMOUNT_MINOR_MAX, AMOUNT_MINOR_MAX), exponents)
def test_an_amount_is_written_at_its_scale_and_means_what_it_says(amount_minor: int, exponent: int) -> None:
    text = render_amount(amount_minor, exponent)
    assert Decimal(text) == Decimal(amount_minor).scaleb(-exponent)
    assert len(text.partition(".")[2]) == exponent
    assert ("." in text) == (exponent > 0)


@given(amounts_minor, exponents, st.integers(0, 10), st.data())
def test_leading_zeros_and_shorter_fractions_mean_the_same(
    amount_minor: int, exponent: int, zeros: int, data: st.DataObject
) -> None:
    text = "0" * zeros + render_amount(amount_minor, exponent)
    while "." in text and text[-1] in "0." and data.draw(st.booleans()):
        text = text[:-1]
    assert parse_amount(text, exponent) == (None if text.endswith(".") else amount_minor)


@given(st.text(), exponents)
def test_whatever_is_taken_for_an_amount_is_ascii_digits_and_a_point(text: str, exponent: int) -> None:
    amount_minor = parse_amount(text, exponent)
    if amount_minor is not None:
        assert set(text) <= set("0123456789.")
        assert Decimal(text).scaleb(exponent) == amount_minor
        assert 0 < amount_minor <= AMOUNT_MINOR_MAX


@given(st.decimals(allow_nan=False, allow_infinity=False, places=5), exponents)
def test_a_decimal_is_an_amount_exactly_when_it_fits_the_currency(value: Decimal, exponent: int) -> None:
    text = f"{value:f}"
    fits = 0 < value.scaleb(exponent) <= AMOUNT_MINOR_MAX and len(text.partition(".")[2]) <= exponent
    assert (parse_amount(text, exponent) is not None) == fits


@pytest.mark.parametrize("text", TRAPS, ids=ascii)
def test_anything_but_a_plain_positive_decimal_string_is_no_amount(text: str) -> None:
    assert [parse_amount(text, exponent) for exponent in (0, 2, 3, 4)] == [None] * 4


@pytest.mark.parametrize("value", [None, 1, 1.0, True, b"1", ["1"], {"amount": "1"}, Decimal(1), 10**15])
def test_anything_but_a_string_is_no_amount(value: object) -> None:
    assert parse_amount(value, 2) is None


@pytest.mark.parametrize("exponent", [0, 2, 3, 4])
def test_the_largest_amount_fits_and_one_minor_unit_more_does_not(exponent: int) -> None:
    assert parse_amount(render_amount(AMOUNT_MINOR_MAX, exponent), exponent) == AMOUNT_MINOR_MAX
    assert parse_amount(render_amount(AMOUNT_MINOR_MAX + 1, exponent), exponent) is None


@pytest.mark.parametrize(
    ("amount_minor", "exponent", "text"),
    [
        (500000, 2, "5000.00"),
        (5000, 0, "5000"),
        (5000, 3, "5.000"),
        (1, 2, "0.01"),
        (1, 4, "0.0001"),
        (0, 2, "0.00"),
        (-5, 2, "-0.05"),
    ],
)
def test_amounts_are_written_as_the_contract_shows(amount_minor: int, exponent: int, text: str) -> None:
    assert render_amount(amount_minor, exponent) == text


@pytest.mark.parametrize(
    ("code", "exponent"),
    [
        ("BDT", 2),
        ("USD", 2),
        ("JPY", 0),
        ("KRW", 0),
        ("UGX", 0),
        ("ISK", 0),
        ("KWD", 3),
        ("BHD", 3),
        ("TND", 3),
        ("CLF", 4),
        ("UYW", 4),
    ],
)
def test_currencies_have_the_digits_of_iso_4217(code: str, exponent: int) -> None:
    assert CURRENCY_EXPONENTS[code] == exponent


def test_every_currency_is_listed_once_by_its_three_letters() -> None:
    assert all(len(code) == 3 and code.isascii() and code.isupper() for code in CURRENCY_EXPONENTS)
    assert set(CURRENCY_EXPONENTS.values()) == {0, 2, 3, 4}
    assert len(CURRENCY_EXPONENTS) > 150
