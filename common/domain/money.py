"""Money: integers of minor units inside, decimal strings at the currency's scale outside. Never a float."""

import re
from typing import Final

# The largest amount and balance the ledger stores, in minor units.
AMOUNT_MINOR_MAX: Final = 10**15

# ISO 4217 (list one): digits after the point. All currencies not named in the other rows have two.
_CODES_BY_EXPONENT: Final[dict[int, str]] = {
    0: "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF",
    2: "AED AFN ALL AMD ANG AOA ARS AUD AWG AZN BAM BBD BDT BGN BMD BND BOB BRL BSD BTN BWP BYN BZD CAD CDF CHF CNY"
    " COP CRC CUP CVE CZK DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GTQ GYD HKD HNL HTG HUF IDR ILS INR"
    " IRR JMD KES KGS KHR KPW KYD KZT LAK LBP LKR LRD LSL MAD MDL MGA MKD MMK MNT MOP MRU MUR MVR MWK MXN MYR MZN NAD"
    " NGN NIO NOK NPR NZD PAB PEN PGK PHP PKR PLN QAR RON RSD RUB SAR SBD SCR SDG SEK SGD SHP SLE SOS SRD SSP STN SVC"
    " SYP SZL THB TJS TMT TOP TRY TTD TWD TZS UAH USD UYU UZS VED VES WST XCD XCG YER ZAR ZMW ZWG",
    3: "BHD IQD JOD KWD LYD OMR TND",
    4: "CLF UYW",
}
CURRENCY_EXPONENTS: Final = {code: exponent for exponent, codes in _CODES_BY_EXPONENT.items() for code in codes.split()}

_PLAIN_DECIMAL: Final = re.compile(r"[0-9]{1,32}(?:\.([0-9]{1,32}))?", re.ASCII)


def parse_amount(text: object, exponent: int) -> int | None:
    """Minor units of a positive plain decimal string, or None when it is anything else.

    Anything else: not a string, a sign, an exponent, spaces, digits that are not ASCII, more digits after the point
    than the currency has, zero, or more than `AMOUNT_MINOR_MAX`.
    """
    if not isinstance(text, str):
        return None
    match = _PLAIN_DECIMAL.fullmatch(text)
    if match is None:
        return None
    whole, _, fraction = text.partition(".")
    if len(fraction) > exponent:
        return None
    amount_minor = int(whole + fraction.ljust(exponent, "0"))
    return amount_minor if 0 < amount_minor <= AMOUNT_MINOR_MAX else None


def render_amount(amount_minor: int, exponent: int) -> str:
    """A decimal string at the currency's scale: 500000 at 2 is "5000.00", at 0 "500000"."""
    if exponent == 0:
        return str(amount_minor)
    sign = "-" if amount_minor < 0 else ""
    digits = str(abs(amount_minor)).rjust(exponent + 1, "0")
    return f"{sign}{digits[:-exponent]}.{digits[-exponent:]}"
