"""Relations between settings that are wise. Those that must hold are refused at every start."""

from collections.abc import Iterator

from yarl import URL

from common.secrecy import is_safe_way_to_broker, is_safe_way_to_database
from common.settings import Settings
from ops.doctor import Finding, Verdict, good_if


def check_settings(settings: Settings) -> Iterator[Finding]:
    """What the settings of this process have to do with each other."""
    yield Finding("settings", Verdict.GOOD, f"readable, and without contradictions; for {settings.environment}")
    yield good_if(
        settings.drain_seconds >= settings.rail_timeout_seconds,
        "leaving",
        f"a worker has {settings.drain_seconds:g} s to leave, a call to a rail {settings.rail_timeout_seconds:g} s",
        "calls that are cut off wait for a look-up: PAYOUTS_DRAIN_SECONDS of at least PAYOUTS_RAIL_TIMEOUT_SECONDS",
    )
    yield good_if(
        settings.settle_shop_concurrency <= settings.settle_concurrency,
        "share per shop",
        f"{settings.settle_shop_concurrency} of {settings.settle_concurrency} calls",
        "one shop can take all: PAYOUTS_SETTLE_SHOP_CONCURRENCY below PAYOUTS_SETTLE_CONCURRENCY",
    )
    yield good_if(
        settings.rail_connect_timeout_seconds < settings.rail_timeout_seconds,
        "time-outs of rails",
        f"{settings.rail_connect_timeout_seconds:g} s to connect, {settings.rail_timeout_seconds:g} s for the call",
        "a rail that is away is taken for one that may have paid: PAYOUTS_RAIL_CONNECT_TIMEOUT_SECONDS below the other",
    )
    yield good_if(
        settings.callback_lane_concurrency < settings.callback_concurrency,
        "share per lane",
        f"{settings.callback_lane_concurrency} of {settings.callback_concurrency} callbacks",
        "one endpoint can take all: PAYOUTS_CALLBACK_LANE_CONCURRENCY below PAYOUTS_CALLBACK_CONCURRENCY",
    )
    yield good_if(
        settings.database_lock_timeout_seconds < settings.database_statement_timeout_seconds,
        "database time-outs",
        f"{settings.database_lock_timeout_seconds:g} s for a lock, {settings.database_statement_timeout_seconds:g} s"
        " for a statement",
        "a lock that cannot be had is taken for a slow database: PAYOUTS_DATABASE_LOCK_TIMEOUT_SECONDS below the other",
    )
    yield good_if(
        not settings.callback_private_addresses,
        "callback addresses",
        "private ones are allowed" if settings.callback_private_addresses else "public ones alone",
        "merchants reach what is inside your network: PAYOUTS_CALLBACK_PRIVATE_ADDRESSES=0 in production",
    )
    yield good_if(
        is_safe_way_to_database(settings.database_url),
        "way to the database",
        "encrypted and verified, or on this machine"
        if is_safe_way_to_database(settings.database_url)
        else "others can listen, or pretend to be the database",
        "sslmode=verify-full in DATABASE_URL, across a network that you do not trust",
    )
    open_ways = [URL(url).host or "" for url in settings.amqp_urls if not is_safe_way_to_broker(url)]
    if settings.amqp_urls:
        yield good_if(
            not open_ways,
            "way to the broker",
            f"open to others: {', '.join(open_ways)}" if open_ways else "encrypted and verified, or on this machine",
            "amqps:// with a certificate that is verified, across a network that you do not trust",
        )
