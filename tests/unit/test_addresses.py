# ruff: noqa: RUF001, SIM905 characters that look like others are a subject here, and words are easier to read than literals
import re
import socket
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from yarl import URL

from common.domain.addresses import URL_CHARACTERS_MAX, is_public, origin_of, parse_callback_url, spellings_of

ANY_PORT: Final[frozenset[int]] = frozenset()
DEFAULT_PORTS: Final = frozenset({80, 443, 8080, 8443})

# The first and the last address of every forbidden network, and what the well-known tricks make of 127.0.0.1.
FORBIDDEN: Final = """
    0.0.0.0 0.255.255.255 10.0.0.0 10.255.255.255 100.64.0.0 100.127.255.255 127.0.0.0 127.255.255.255 168.63.129.16
    169.254.0.0 169.254.169.254 169.254.255.255 172.16.0.0 172.31.255.255 192.0.0.0 192.0.0.8 192.0.0.255 192.0.2.0
    192.0.2.255 192.31.196.0 192.31.196.255 192.52.193.0 192.52.193.255 192.88.99.0 192.88.99.255 192.168.0.0
    192.168.255.255 192.175.48.0 192.175.48.255 198.18.0.0 198.19.255.255 198.51.100.0 198.51.100.255 203.0.113.0
    203.0.113.255 224.0.0.0 239.255.255.255 240.0.0.0 255.255.255.255 :: ::1 ::127.0.0.1 ::ffff:127.0.0.1
    ::ffff:0:127.0.0.1 64:ff9b::7f00:1 64:ff9b::808:808 64:ff9b:1::1 100::1 1fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff
    2001:: 2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:1ff:ffff:ffff:ffff:ffff:ffff:ffff 2001:db8::
    2001:db8:ffff:ffff:ffff:ffff:ffff:ffff 2002:: 2002:7f00:1:: 2002:ffff:ffff:ffff:ffff:ffff:ffff:ffff
    2620:4f:8000:: 2620:4f:8000:ffff:ffff:ffff:ffff:ffff 3fff:: 3fff:fff:ffff:ffff:ffff:ffff:ffff:ffff 4000::
    5f00::1 fc00::1 fd00:ec2::254 fe80::1 fe80::1%eth0 fec0::1 ff02::1 ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff
""".split()

# The neighbours of the forbidden networks, and addresses that everybody knows.
PUBLIC: Final = """
    1.0.0.0 8.8.8.8 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0 168.63.129.15
    168.63.129.17 169.253.255.255 169.255.0.0 172.15.255.255 172.32.0.0 192.0.1.0 192.0.3.0 192.167.255.255
    192.169.0.0 198.17.255.255 198.20.0.0 203.0.112.255 203.0.114.0 223.255.255.255 ::ffff:8.8.8.8 2001:200::
    2001:4860:4860::8888 2001:db7:ffff::1 2001:db9:: 2003:: 2606:4700:4700::1111 2620:4f:7fff::1 2620:4f:8001::
    3fff:1000::
""".split()

# 127.0.0.1, ::1 and localhost as resolvers, browsers and attackers spell them.
LOOPBACK_SPELLINGS: Final = """
    127.0.0.1 127.1 127.0.1 2130706433 0x7f000001 0X7F000001 0x7f.0.0.1 0x7f.1 017700000001 0177.0.0.1 0177.0.0.01
    127.0.0.0x1 00000177.1 127.0.0.1. 2130706433. 0 0x 4294967296
    １２７.０.０.１ １２７．０．０．１ 127。0。0。1 127｡0｡0｡1 ①②⑦.⓪.⓪.①
    𝟏𝟐𝟕.𝟎.𝟎.𝟏 ١٢٧.0.0.1 %31%32%37.0.0.1 127.0.0.%31 [::1] [0:0:0:0:0:0:0:1] [::0001] [::ffff:127.0.0.1]
    [::ffff:7f00:1] [::127.0.0.1] [64:ff9b::127.0.0.1] [2002:7f00:1::] [::1%25lo] [::1%lo] [fe80::1%25eth0] [::１]
    localhost LOCALHOST localhost. ｌocalhost ⓛocalhost %6cocalhost db.localhost a.b.localhost.
""".split()


@pytest.mark.parametrize("address", FORBIDDEN)
def test_forbidden_networks_are_not_public_from_the_first_address_to_the_last(address: str) -> None:
    assert not is_public(ip_address(address))


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_public_up_to_the_edge_of_forbidden_networks(address: str) -> None:
    assert is_public(ip_address(address))


@given(st.ip_addresses())
def test_no_address_is_public_that_the_standard_library_calls_special(address: IPv4Address | IPv6Address) -> None:
    assume(isinstance(address, IPv4Address) or address.ipv4_mapped is None)
    if address.is_private or address.is_multicast or address.is_reserved or address.is_link_local:
        assert not is_public(address)


@given(st.ip_addresses(v=4))
def test_a_mapped_address_is_judged_as_the_address_it_maps(address: IPv4Address) -> None:
    assert is_public(IPv6Address(f"::ffff:{address}")) == is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "https://merchant.example.com/webhooks/payout",
        "http://merchant.example.com",
        "HTTPS://Merchant.Example.COM/Path?x=1&y=%2F#part",
        "https://merchant.example.com:8443/a",
        "https://merchant.example.com:/a",
        "https://merchant.example.com./a",
        "https://merchant.example.com?user=a@b",
        "https://my_shop.example.com/~a/b;c/!$&'()*+,=:@",
        "https://bücher.example/путь",
        "https://xn--bcher-kva.example/",
        "https://1.example/",
        "https://0x7f.example/",
        "https://localhost.example.com/",
        "https://notlocalhost/",
        "https://8.8.8.8/hook",
        "http://[2606:4700:4700::1111]:8080/hook",
        "http://[::ffff:8.8.8.8]/hook",
    ],
)
def test_a_good_url_is_returned_as_given(url: str) -> None:
    assert parse_callback_url(url, private_allowed=False, ports=DEFAULT_PORTS) == url


@pytest.mark.parametrize(
    "text",
    [
        None,
        5,
        b"https://merchant.example/",
        ["https://merchant.example/"],
        "",
        "merchant.example/hook",
        "//merchant.example/hook",
        "/hook",
        "https:/merchant.example/hook",
        "https:merchant.example",
        "https://",
        "https:///hook",
        "https://:443/hook",
        "https://?x",
        "ftp://merchant.example/",
        "file:///etc/passwd",
        "gopher://merchant.example/",
        "javascript://merchant.example/%0aalert(1)",
        "httpſ://merchant.example/",
        "https://user@merchant.example/",
        "https://user:password@merchant.example/",
        "https://@merchant.example/",
        "https://[]@/",
        "https://merchant.example\\@evil.example/",
        "https://merchant.example:22/",
        "https://merchant.example:0/",
        "https://merchant.example:65536/",
        "https://merchant.example:443443/",
        "https://merchant.example:８０/",
        "https://merchant.example:4_43/",
        "https://merchant.example:+443/",
        "https://merchant.example:-1/",
        "https://merchant.example:abc/",
        " https://merchant.example/",
        "https://merchant.example/ ",
        "https://merchant.example/a b",
        "https://merchant.example/a\r\nX-Injected: 1",
        "https://merchant.example/a\tb",
        "https://merchant.example/\x00",
        "https://merchant.example/\x7f",
        "https://merchant.example/\x85",
        "https://merchant.example/\u2028",
        "https://merchant.example/\u3000",
        "https://merchant.example/\ud800",
        "https://merchant\x00.example/",
        "https://mer\u200bchant.example/",
        "https://mer\u00adchant.example/",
        "https://merchant．example／hook：80＠evil.example/",
        "https://merchant..example/",
        "https://.example/",
        "https://*.example/",
        "https://mer%63hant.example/",
        "https://" + "a" * 64 + ".example/",
        "https://" + "a." * 127 + "ab/",
        "https://[v1.a:b]/",
        "https://[::1/",
        "https://::1/",
        "https://[::1]evil.example/",
        "https://127.0.0.1[::1]/",
        "https://[1.2.3.4]/",
        "https://1.2.3.4.5/",
        "https://256.1.1.1/",
        "https://08.8.8.8/",
        "https://134744072/",
        "https://merchant.example/" + "a" * URL_CHARACTERS_MAX,
    ],
)
@pytest.mark.parametrize("private_allowed", [False, True])
def test_what_is_no_url_for_a_callback_is_none(text: object, private_allowed: bool) -> None:
    assert parse_callback_url(text, private_allowed=private_allowed, ports=DEFAULT_PORTS) is None


@pytest.mark.parametrize("host", LOOPBACK_SPELLINGS)
def test_this_machine_is_refused_in_every_spelling(host: str) -> None:
    assert parse_callback_url(f"http://{host}/", private_allowed=False, ports=ANY_PORT) is None


@pytest.mark.parametrize("address", FORBIDDEN)
def test_every_forbidden_address_is_refused_as_a_literal(address: str) -> None:
    host = f"[{address}]" if ":" in address else address
    assert parse_callback_url(f"http://{host}/", private_allowed=False, ports=ANY_PORT) is None


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "１２７.０.０.１", "[::1]", "[::ffff:127.0.0.1]", "10.1.2.3", "localhost", "a.localhost."]
)
def test_private_hosts_pass_where_they_are_allowed(host: str) -> None:
    url = f"http://{host}:9000/hook"
    assert parse_callback_url(url, private_allowed=True, ports=ANY_PORT) == url


def test_ports_are_those_of_the_set_and_any_when_it_is_empty() -> None:
    url = "https://merchant.example:9443/"
    assert parse_callback_url(url, private_allowed=False, ports=ANY_PORT) == url
    assert parse_callback_url(url, private_allowed=False, ports=frozenset({9443})) == url
    assert parse_callback_url(url, private_allowed=False, ports=frozenset({443})) is None
    assert parse_callback_url("https://merchant.example/", private_allowed=False, ports=frozenset({80})) is None


def test_http_passes_only_where_it_is_allowed() -> None:
    for url, allowed in (("http://merchant.example/", False), ("HTTPS://merchant.example/", True)):
        assert parse_callback_url(url, private_allowed=False, ports=ANY_PORT) == url
        judged = parse_callback_url(url, private_allowed=False, https_only=True, ports=ANY_PORT)
        assert judged == (url if allowed else None)


def test_the_longest_url_has_2048_characters() -> None:
    url = "https://merchant.example/".ljust(2048, "a")
    assert parse_callback_url(url, private_allowed=False, ports=ANY_PORT) == url
    assert parse_callback_url(url + "a", private_allowed=False, ports=ANY_PORT) is None


_HOSTS = st.one_of(
    st.text(max_size=30),
    st.text("0123456789.xabcdef", max_size=20),
    st.text("０１２７①。．127.[]:@%\\", max_size=16),
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(lambda address: f"[{address}]"),
    st.integers(0, 2**33).map(str),
    st.integers(0, 2**33).map(hex),
    st.integers(0, 2**33).map(lambda number: f"0{number:o}"),
)


@given(_HOSTS, st.text(max_size=20), st.sampled_from(["http://", "https://", "HTTP://", "//", ""]))
@example("[]@", "/", "http://")
@example("\ud800", "\udfff", "http://")
@example("é" * 1024, "", "http://")
def test_no_text_raises_and_no_accepted_host_is_a_private_address_to_the_system(
    host: str, rest: str, scheme: str
) -> None:
    """`inet_aton` is the reader to fear: it takes what `getaddrinfo` takes without DNS."""
    url = parse_callback_url(scheme + host + rest, private_allowed=False, ports=ANY_PORT)
    if url is None:
        return
    assert url == scheme + host + rest
    sent_to = URL(url).raw_host
    assert sent_to is not None
    assert sent_to.isascii()
    try:
        packed = socket.inet_aton(sent_to)
    except OSError:
        return
    assert is_public(IPv4Address(packed))


@pytest.mark.parametrize(
    "url",
    [
        "https://shop.example/told", "HTTPS://Shop.Example:443", "https://shop.example:?x", "http://shop.example:80#x",
        "http://shop.example:8080/", "http://8.8.8.8/", "http://[2606:4700::1111]:8443/", "https://b\u00fccher.example/told",
        "https://B\u00dcCHER.example:443/told", "https://xn--bcher-kva.example/told",
    ],
)  # fmt: skip
def test_every_url_of_an_origin_begins_with_one_of_its_spellings(url: str) -> None:
    assert parse_callback_url(url, private_allowed=False, ports=frozenset()) == url
    begins = re.match("[A-Za-z]+://[^/?#]+", url)
    assert begins
    assert begins[0].lower() in spellings_of(origin_of(url))


def test_spellings_of_an_origin_are_of_no_other() -> None:
    spelled = {
        origin: set(spellings_of(origin))
        for origin in ("https://a.example", "http://a.example", "https://a.example:80", "https://a.example.org")
    }
    for origin, spellings in spelled.items():
        assert {origin_of(spelling) for spelling in spellings} == {origin}
