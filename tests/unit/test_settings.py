"""Nonsense in the environment is refused at start: every variable by name, all at once, and never a value."""

import base64
import hashlib
from dataclasses import fields

import pytest

from common.settings import Settings, SettingsInvalid

KEY = base64.b64encode(bytes(range(32))).decode()
SECRET = "s3cr3t"
GOOD = {
    "DATABASE_URL": f"postgresql://payouts:{SECRET}@db/payouts",
    "PAYOUTS_MASTER_KEYS": f"1:{KEY}",
    "PAYOUTS_CONTENT_KEY": KEY,
}


PASSWORD = "kJ3-xW9_pQ7.tR5~mN1z"
MASTER_KEY, CONTENT_KEY = (base64.b64encode(hashlib.sha256(name).digest()).decode() for name in (b"master", b"content"))
PRODUCTION = {
    "PAYOUTS_ENV": "production",
    "DATABASE_URL": f"postgresql://payouts:{PASSWORD}@db/payouts?sslmode=verify-full",
    "AMQP_URL": f"amqps://payouts:{PASSWORD}@mq/payouts,amqp://payouts:{PASSWORD}@127.0.0.1/payouts",
    "PAYOUTS_MASTER_KEYS": f"1:{MASTER_KEY}",
    "PAYOUTS_CONTENT_KEY": CONTENT_KEY,
    "PAYOUTS_CALLBACK_HTTPS_ONLY": "1",
}


def refusal(**environment: str) -> str:
    """What is said about an environment that must be refused."""
    with pytest.raises(SettingsInvalid) as raised:
        Settings.from_environ(GOOD | environment)
    return str(raised.value)


def test_what_must_be_set_is_enough() -> None:
    settings = Settings.from_environ(GOOD)
    assert (settings.database_url, settings.amqp_urls, settings.port) == (GOOD["DATABASE_URL"], (), 8080)
    assert settings.keyring.current_id == 1


def test_the_defaults_are_those_of_the_contract() -> None:
    settings = Settings.from_environ(GOOD)
    assert (settings.signature_window_seconds, settings.key_cache_seconds) == (60, 5.0)
    assert settings.callback_private_addresses is False
    assert settings.callback_https_only is False
    assert settings.callback_attempts_keep_days == 90
    assert (settings.callback_timeout_seconds, settings.callback_lease_seconds) == (17.0, 60.0)
    assert settings.accept_batch_max <= 128


def test_everything_that_is_missing_is_named_at_once() -> None:
    with pytest.raises(SettingsInvalid) as raised:
        Settings.from_environ({})
    assert str(raised.value) == "; ".join(f"{name}: must be set" for name in sorted(GOOD))


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        *(("PORT", value) for value in (SECRET, "0", "65536", "-1", "", "80.0", "1e3")),
        *(("PAYOUTS_SIGNATURE_WINDOW_SECONDS", value) for value in ("29", "301", SECRET, "")),
        *(("PAYOUTS_KEY_CACHE_SECONDS", value) for value in ("5.1", "-0.1", "nan", "inf", SECRET)),
        *(("PAYOUTS_BODY_TIMEOUT_SECONDS", value) for value in ("0", "61", "nan", "-inf", SECRET)),
        *(("PAYOUTS_CALLBACK_PRIVATE_ADDRESSES", value) for value in ("yes", "true", "2", "", SECRET)),
        *(("PAYOUTS_CALLBACK_HTTPS_ONLY", value) for value in ("yes", "", SECRET)),
        *(("PAYOUTS_CALLBACK_ATTEMPTS_KEEP_DAYS", value) for value in ("29", "3651", "", SECRET)),
        *(("PAYOUTS_CALLBACK_PORTS", value) for value in ("0", "80;443", "65536", SECRET, "80,x")),
        *(("PAYOUTS_CALLBACK_NETWORKS_FORBIDDEN", value) for value in ("10.0.0.1/8", "2001:db8::/129", SECRET)),
        *(("PAYOUTS_LOG_FORMAT", value) for value in ("", "JSON", "text", SECRET)),
        *(("PAYOUTS_LOG_LEVEL", value) for value in ("", "INFO", "trace", SECRET)),
        *(("PAYOUTS_ACCEPT_BATCH_MAX", value) for value in ("0", "129", SECRET)),
        *(("PAYOUTS_DATABASE_POOL_MAX", value) for value in ("1", "101", SECRET)),
        *(
            ("PAYOUTS_CONTENT_KEY", value)
            for value in ("", SECRET, KEY[:-4], KEY + KEY, base64.b64encode(bytes(31)).decode(), f"{KEY[:-2]}é")
        ),
        *(
            ("PAYOUTS_MASTER_KEYS", value)
            for value in (
                "",
                SECRET,
                KEY,
                f":{KEY}",
                f"0:{KEY}",
                f"65536:{KEY}",
                f"x:{KEY}",
                f"-1:{KEY}",
                "1:",
                f"1:{SECRET}",
                f"1:{KEY},",
                f"1:{KEY},2",
            )
        ),
    ],
)
def test_nonsense_is_refused_by_the_name_of_its_variable_and_without_its_value(variable: str, value: str) -> None:
    said = refusal(**{variable: value})
    assert said.startswith(f"{variable}: ")
    assert SECRET not in said
    assert KEY[:20] not in said


@pytest.mark.parametrize(
    "value", ["", " ", "sqlite:///payouts", "mysql://root@db/payouts", "not a url", "postgresql://db:port/payouts"]
)
def test_a_database_url_that_is_none_of_postgresql_is_refused(value: str) -> None:
    assert refusal(DATABASE_URL=value).startswith("DATABASE_URL: ")


@pytest.mark.parametrize(
    "where",
    [
        *("h:99999/x", "h:0/x", "..a/x", f"{'a' * 64}/x"),
        *("h/x?host=127.0.0.1:99999", "h/x?host=a&host=..b", "h/x?port=5432,0", "h/x?port=soon"),
    ],
)
def test_hosts_and_ports_that_nobody_can_connect_to_are_refused(where: str) -> None:
    assert refusal(DATABASE_URL=f"postgresql://payouts:{SECRET}@{where}") == (
        "DATABASE_URL: must name hosts, and ports of 1 to 65535"
    )


@pytest.mark.parametrize(
    "where",
    ["[::1]:5432/x", "a,b:5433/x", "/x?host=a:1&host=b:2", f"/x?host=/{'folder' * 20}", "/x?host=::1&port=5432"],
)
def test_several_hosts_addresses_and_folders_of_sockets_are_hosts(where: str) -> None:
    url = f"postgresql://{where}"
    assert Settings.from_environ(GOOD | {"DATABASE_URL": url}).database_url == url


@pytest.mark.parametrize("query", ["connect_timeout=10", "sslmode=require&user=me", "sslmode=require&ssl=disable"])
def test_a_parameter_that_is_not_for_the_url_to_say_is_refused(query: str) -> None:
    assert "sslmode" in refusal(DATABASE_URL=f"{GOOD['DATABASE_URL']}?{query}")


def test_what_looks_like_a_parameter_and_is_the_rest_of_a_password_is_not_told() -> None:
    said = refusal(DATABASE_URL="postgresql://payouts:one-half@x?other-half=x@db/payouts")
    assert said.startswith("DATABASE_URL: ")
    assert "half" not in said


def test_one_id_for_two_master_keys_is_refused() -> None:
    other = base64.b64encode(bytes(32)).decode()
    assert refusal(PAYOUTS_MASTER_KEYS=f"1:{KEY},1:{other}").startswith("PAYOUTS_MASTER_KEYS: ")


def test_a_variable_of_ours_that_does_not_exist_is_refused_and_others_are_none_of_our_business() -> None:
    assert refusal(PAYOUTS_SIGNATURE_WINDOW="60") == "PAYOUTS_SIGNATURE_WINDOW: no such setting"
    assert Settings.from_environ(GOOD | {"PAYOUT": "x", "HOME": "/", "payouts_x": "y"}).port == 8080


def test_all_that_is_wrong_is_said_at_once() -> None:
    said = refusal(PORT="x", PAYOUTS_LOG_FORMAT="y", PAYOUTS_NONE="z", PAYOUTS_CONTENT_KEY="")
    assert [part.split(":")[0] for part in said.split("; ")] == [
        "PAYOUTS_CONTENT_KEY",
        "PORT",
        "PAYOUTS_LOG_FORMAT",
        "PAYOUTS_NONE",
    ]


@pytest.mark.parametrize(
    ("lease", "timeout"),
    [
        ("PAYOUTS_CALLBACK_LEASE_SECONDS", "PAYOUTS_CALLBACK_TIMEOUT_SECONDS"),
        ("PAYOUTS_SETTLE_LEASE_SECONDS", "PAYOUTS_RAIL_TIMEOUT_SECONDS"),
    ],
)
def test_a_lease_that_ends_before_its_call_is_written_down_is_refused(lease: str, timeout: str) -> None:
    said = refusal(**{lease: "30", timeout: "25.1"})
    assert said == f"{lease}: must exceed {timeout} by 5"
    Settings.from_environ(GOOD | {lease: "30", timeout: "25"})


def test_production_is_said_and_not_guessed() -> None:
    assert Settings.from_environ(GOOD).environment == "development"
    assert Settings.from_environ(PRODUCTION).environment == "production"
    assert refusal(PAYOUTS_ENV="prod") == "PAYOUTS_ENV: must be one of development, production"


@pytest.mark.parametrize(
    ("variable", "value", "word"),
    [
        ("DATABASE_URL", f"postgresql://payouts:{PASSWORD}@db/payouts", "sslmode"),
        ("DATABASE_URL", f"postgresql://payouts:{PASSWORD}@db/payouts?sslmode=require", "sslmode"),
        ("DATABASE_URL", "postgresql://payouts:payouts@127.0.0.1/payouts", "password"),
        ("DATABASE_URL", "postgresql://payouts:change-me-change-me@127.0.0.1/payouts", "password"),
        ("AMQP_URL", f"amqp://payouts:{PASSWORD}@mq/payouts", "amqps://"),
        ("AMQP_URL", f"amqps://payouts:{PASSWORD}@mq-1/payouts,amqp://payouts:{PASSWORD}@mq-2/payouts", "amqps://"),
        ("AMQP_URL", f"amqps://payouts:{PASSWORD}@mq/payouts?no_verify_ssl=1", "verify"),
        ("AMQP_URL", "amqp://guest:guest@127.0.0.1/", "password"),
        ("PAYOUTS_MASTER_KEYS", f"1:{KEY}", "random"),
        ("PAYOUTS_MASTER_KEYS", f"1:{MASTER_KEY},2:{KEY}", "random"),
        ("PAYOUTS_MASTER_KEYS", f"1:{MASTER_KEY},2:{MASTER_KEY}", "twice"),
        ("PAYOUTS_CONTENT_KEY", KEY, "random"),
        ("PAYOUTS_CONTENT_KEY", MASTER_KEY, "no master key"),
        ("PAYOUTS_LOG_FORMAT", "console", "json"),
        ("PAYOUTS_LOG_LEVEL", "debug", "debug"),
        ("PAYOUTS_CALLBACK_PRIVATE_ADDRESSES", "1", "0"),
        ("PAYOUTS_CALLBACK_HTTPS_ONLY", "0", "1"),
        ("PYTHONASYNCIODEBUG", "1", "not be set"),
        ("PYTHONDEVMODE", "1", "not be set"),
    ],
)
def test_production_refuses_what_is_right_on_a_developers_machine_alone(variable: str, value: str, word: str) -> None:
    changed = PRODUCTION | {variable: value}
    Settings.from_environ(changed | {"PAYOUTS_ENV": "development"})

    said = refusal(**changed)

    assert said.startswith(f"{variable}: ")
    assert said.endswith(", in production")
    assert word in said
    assert "; " not in said
    assert not [secret for secret in (PASSWORD, MASTER_KEY, CONTENT_KEY, KEY, "guest", "change-me") if secret in said]


def test_production_names_all_that_it_refuses_at_once() -> None:
    said = refusal(PAYOUTS_ENV="production", AMQP_URL="amqp://guest:guest@mq/", PAYOUTS_LOG_FORMAT="console")
    assert [part.split(":")[0] for part in said.split("; ")] == [
        *("DATABASE_URL", "DATABASE_URL", "AMQP_URL", "AMQP_URL"),
        *("PAYOUTS_MASTER_KEYS", "PAYOUTS_CONTENT_KEY", "PAYOUTS_CONTENT_KEY"),
        *("PAYOUTS_LOG_FORMAT", "PAYOUTS_CALLBACK_HTTPS_ONLY"),
    ]


def test_the_highest_master_key_seals_and_all_of_them_open() -> None:
    other = base64.b64encode(bytes(32)).decode()
    keyring = Settings.from_environ(GOOD | {"PAYOUTS_MASTER_KEYS": f"7:{KEY},12:{other},3:{KEY}"}).keyring
    assert keyring.current_id == 12
    assert keyring.master_keys == {7: bytes(range(32)), 12: bytes(32), 3: bytes(range(32))}


def test_ports_are_read_as_a_set_and_an_empty_list_means_any() -> None:
    assert Settings.from_environ(GOOD | {"PAYOUTS_CALLBACK_PORTS": "443,8443"}).callback_ports == {443, 8443}
    assert Settings.from_environ(GOOD | {"PAYOUTS_CALLBACK_PORTS": ""}).callback_ports == frozenset()


def test_networks_are_read_of_both_versions_and_none_is_no_network() -> None:
    named = Settings.from_environ(GOOD | {"PAYOUTS_CALLBACK_NETWORKS_FORBIDDEN": "192.0.2.0/24, 2001:db8::/32"})
    assert [str(network) for network in named.callback_networks_forbidden] == ["192.0.2.0/24", "2001:db8::/32"]
    assert Settings.from_environ(GOOD).callback_networks_forbidden == ()


def test_settings_do_not_print_what_is_secret() -> None:
    settings = Settings.from_environ(GOOD | {"AMQP_URL": "amqp://payouts:rabb1t@mq/"})
    assert not [word for word in (SECRET, "rabb1t", KEY, repr(bytes(range(32)))) if word in repr(settings)]


def test_settings_do_not_change() -> None:
    settings = Settings.from_environ(GOOD)
    with pytest.raises(AttributeError):
        settings.port = 1  # type: ignore[misc]


def test_every_setting_says_what_it_is_for_and_carries_its_unit() -> None:
    for item in fields(Settings):
        setting = item.metadata["setting"]
        assert setting.doc
        assert not item.name.endswith(("timeout", "interval", "delay", "lease", "window"))
