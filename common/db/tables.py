"""The tables as the code sees them. The migrations own the schema; a test compares the two column by column."""

from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Double,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    Uuid,
)
from sqlalchemy.dialects.postgresql import CIDR, INET, JSONB
from sqlalchemy.types import TypeEngine, UserDefinedType

metadata = MetaData()

_TIME = DateTime(timezone=True)


class _TransactionId(UserDefinedType[int]):
    """The id of a transaction that is never used again; SQLAlchemy has no type for it."""

    cache_ok = True

    def get_col_spec(self, **_options: Any) -> str:
        """Its name in PostgreSQL."""
        return "xid8"


def _required(name: str, kind: TypeEngine[Any]) -> Column[Any]:
    return Column(name, kind, nullable=False)


def _optional(name: str, kind: TypeEngine[Any]) -> Column[Any]:
    return Column(name, kind, nullable=True)


merchants = Table(
    "merchants",
    metadata,
    _required("id", Uuid()),
    _required("code", Text()),
    _required("name", Text()),
    _required("status", Text()),
    _required("created_at", _TIME),
)

shops = Table(
    "shops",
    metadata,
    _required("id", Uuid()),
    _required("merchant_id", Uuid()),
    _required("code", Text()),
    _required("currency", Text()),
    _required("currency_exponent", SmallInteger()),
    _required("status", Text()),
    _required("is_default", Boolean()),
    _required("rail", Text()),
    _optional("webhook_url", Text()),
    _optional("payment_data_schema", JSONB()),
    _required("created_at", _TIME),
    _required("callback_http", Boolean()),
    _optional("callback_ports", ARRAY(Integer())),
)

webhook_secrets = Table(
    "webhook_secrets",
    metadata,
    _required("id", Uuid()),
    _required("shop_id", Uuid()),
    _required("sealed", LargeBinary()),
    _required("created_at", _TIME),
    _optional("not_after", _TIME),
)

api_keys = Table(
    "api_keys",
    metadata,
    _required("id", Uuid()),
    _required("public_id", Text()),
    _required("merchant_id", Uuid()),
    _required("secret_sealed", LargeBinary()),
    _required("v1_only", Boolean()),
    _required("scopes", ARRAY(Text())),
    _optional("allowed_networks", ARRAY(CIDR())),
    _optional("expires_at", _TIME),
    _optional("revoked_at", _TIME),
    _required("created_at", _TIME),
)

api_key_shops = Table(
    "api_key_shops",
    metadata,
    _required("api_key_id", Uuid()),
    _required("merchant_id", Uuid()),
    _required("shop_id", Uuid()),
)

audit = Table(
    "audit",
    metadata,
    _required("id", BigInteger()),
    _required("at", _TIME),
    _required("actor", Text()),
    _required("action", Text()),
    _required("subject", Text()),
    _optional("reason", Text()),
    _optional("detail", JSONB()),
)

accounts = Table(
    "accounts",
    metadata,
    _required("id", BigInteger()),
    _required("shop_id", Uuid()),
    _required("currency", Text()),
    _required("posted_minor", BigInteger()),
    _required("held_minor", BigInteger()),
    _required("credit_limit_minor", BigInteger()),
    _required("last_seq", BigInteger()),
)

entries = Table(
    "entries",
    metadata,
    _required("account_id", BigInteger()),
    _required("seq", BigInteger()),
    _required("shop_id", Uuid()),
    _required("kind", Text()),
    _required("contra", Text()),
    _required("amount_minor", BigInteger()),
    _required("posted_delta_minor", BigInteger()),
    _required("held_delta_minor", BigInteger()),
    _required("posted_after_minor", BigInteger()),
    _required("held_after_minor", BigInteger()),
    _optional("payout_id", Uuid()),
    _optional("audit_id", BigInteger()),
    _required("created_at", _TIME),
    _optional("payin_id", Uuid()),
)

payouts = Table(
    "payouts",
    metadata,
    _required("id", Uuid()),
    _required("shop_id", Uuid()),
    _required("account_id", BigInteger()),
    _required("external_id", Text()),
    _required("amount_minor", BigInteger()),
    _required("currency", Text()),
    _required("recipient_sealed", LargeBinary()),
    _required("recipient_masked", Text()),
    _required("recipient_digest", LargeBinary()),
    _optional("payment_data_digest", LargeBinary()),
    _optional("callback_url", Text()),
    _optional("details", JSONB(none_as_null=True)),
    _required("state", Text()),
    _required("version", Integer()),
    _optional("failure_code", Text()),
    _optional("provider_reference", Text()),
    _required("hold_seq", BigInteger()),
    _optional("resolution_seq", BigInteger()),
    _required("created_at", _TIME),
    _required("updated_at", _TIME),
    _optional("finalized_at", _TIME),
    _optional("expires_at", _TIME),
    _optional("return_seq", BigInteger()),
    _optional("traceparent", Text()),
)

payout_moves = Table(
    "payout_moves",
    metadata,
    _required("payout_id", Uuid()),
    _required("shop_id", Uuid()),
    _required("version", Integer()),
    _required("state", Text()),
    _required("at", _TIME),
)

payout_due = Table(
    "payout_due",
    metadata,
    _required("payout_id", Uuid()),
    _required("shop_id", Uuid()),
    _required("rail", Text()),
    _required("due_at", _TIME),
    _optional("lease_token", Uuid()),
    _optional("expires_at", _TIME),
    _optional("verifying_since", _TIME),
)

rails = Table(
    "rails",
    metadata,
    _required("id", Uuid()),
    _required("name", Text()),
    _required("kind", Text()),
    _required("status", Text()),
    _optional("base_url", Text()),
    _optional("secret_sealed", LargeBinary()),
    _required("authoritative", Boolean()),
    _required("lag_seconds", Double()),
    _optional("concurrency", Integer()),
    _required("created_at", _TIME),
    _optional("payin_link", Text()),
)

rail_events = Table(
    "rail_events",
    metadata,
    _required("rail", Text()),
    _required("event_id", Text()),
    _required("reference", Text()),
    _required("outcome", Text()),
    _optional("failure_code", Text()),
    _optional("provider_reference", Text()),
    _optional("amount_minor", BigInteger()),
    _optional("currency", Text()),
    _required("received_at", _TIME),
    _required("due_at", _TIME),
    _optional("applied_at", _TIME),
    _optional("effect", Text()),
)

discrepancies = Table(
    "discrepancies",
    metadata,
    _required("id", Uuid()),
    _required("rail", Text()),
    _required("reference", Text()),
    _optional("payout_id", Uuid()),
    _optional("shop_id", Uuid()),
    _optional("state", Text()),
    _required("word", Text()),
    _required("kind", Text()),
    _required("detail", Text()),
    _required("opened_at", _TIME),
    _optional("closed_at", _TIME),
    _optional("audit_id", BigInteger()),
    _optional("payin_id", Uuid()),
)

resolutions = Table(
    "resolutions",
    metadata,
    _required("id", Uuid()),
    _required("payout_id", Uuid()),
    _required("shop_id", Uuid()),
    _required("reference", Text()),
    _required("outcome", Text()),
    _required("opened_at", _TIME),
    _required("opened_by", BigInteger()),
    _optional("closed_at", _TIME),
    _optional("closed_by", BigInteger()),
    _optional("is_confirmed", Boolean()),
)

payout_attempts = Table(
    "payout_attempts",
    metadata,
    _required("payout_id", Uuid()),
    _required("shop_id", Uuid()),
    _required("attempt_no", Integer()),
    _required("action", Text()),
    _required("rail", Text()),
    _required("reference", Text()),
    _required("started_at", _TIME),
    _optional("finished_at", _TIME),
    _optional("outcome", Text()),
    _optional("detail", Text()),
)

payins = Table(
    "payins",
    metadata,
    _required("id", Uuid()),
    _required("shop_id", Uuid()),
    _required("account_id", BigInteger()),
    _required("external_id", Text()),
    _required("amount_minor", BigInteger()),
    _required("currency", Text()),
    _required("rail", Text()),
    _required("reference", Text()),
    _optional("payment_link", Text()),
    _optional("payment_data_digest", LargeBinary()),
    _optional("callback_url", Text()),
    _optional("details", JSONB(none_as_null=True)),
    _required("state", Text()),
    _required("version", Integer()),
    _optional("failure_code", Text()),
    _optional("provider_reference", Text()),
    _optional("credit_seq", BigInteger()),
    _optional("refund_seq", BigInteger()),
    _optional("expires_at", _TIME),
    _required("created_at", _TIME),
    _required("updated_at", _TIME),
    _optional("finalized_at", _TIME),
)

payin_moves = Table(
    "payin_moves",
    metadata,
    _required("payin_id", Uuid()),
    _required("shop_id", Uuid()),
    _required("version", Integer()),
    _required("state", Text()),
    _required("at", _TIME),
)

payin_due = Table(
    "payin_due",
    metadata,
    _required("payin_id", Uuid()),
    _required("shop_id", Uuid()),
    _required("rail", Text()),
    _required("due_at", _TIME),
    _required("look_ups", Integer()),
    _optional("lease_token", Uuid()),
)

payin_words = Table(
    "payin_words",
    metadata,
    _required("payin_id", Uuid()),
    _required("shop_id", Uuid()),
    _required("word_no", Integer()),
    _required("source", Text()),
    _required("rail", Text()),
    _required("outcome", Text()),
    _optional("amount_minor", BigInteger()),
    _optional("currency", Text()),
    _optional("failure_code", Text()),
    _optional("provider_reference", Text()),
    _required("at", _TIME),
)

events = Table(
    "events",
    metadata,
    _required("id", Uuid()),
    _required("shop_id", Uuid()),
    _optional("payout_id", Uuid()),
    _required("sequence", Integer()),
    _required("type", Text()),
    _required("body", LargeBinary()),
    _required("created_at", _TIME),
    _optional("payin_id", Uuid()),
    _required("txid", _TransactionId()),
)

callbacks = Table(
    "callbacks",
    metadata,
    _required("event_id", Uuid()),
    _required("shop_id", Uuid()),
    _optional("payout_id", Uuid()),
    _required("url", Text()),
    _required("state", Text()),
    _required("created_at", _TIME),
    _optional("finished_at", _TIME),
    _optional("payin_id", Uuid()),
    _required("attempts_made", Integer()),
    _optional("traceparent", Text()),
)

callback_due = Table(
    "callback_due",
    metadata,
    _required("event_id", Uuid()),
    _required("shop_id", Uuid()),
    _required("due_at", _TIME),
    _required("step", Integer()),
    _required("attempts_made", Integer()),
    _optional("lease_token", Uuid()),
    _required("lane_id", Uuid()),
    _required("in_lane", Boolean()),
    _required("lost_leases", Integer()),
    _optional("resume_at", _TIME),
    _required("attempts_before", Integer()),
)

callback_shares = Table(
    "callback_shares",
    metadata,
    _required("merchant_id", Uuid()),
    _required("created_at", _TIME),
)

callback_lanes = Table(
    "callback_lanes",
    metadata,
    _required("id", Uuid()),
    _required("shop_id", Uuid()),
    _required("merchant_id", Uuid()),
    _required("origin", Text()),
    _required("cap", Integer()),
    _required("in_flight", Integer()),
    _required("streak", Integer()),
    _required("trouble", Double()),
    _optional("latency_ms", Integer()),
    _required("opened", Integer()),
    _required("blocked_until", _TIME),
    _optional("failing_since", _TIME),
    _optional("held_at", _TIME),
    _optional("held_reason", Text()),
    _required("ready_at", _TIME),
    _required("taken_at", _TIME),
    _required("created_at", _TIME),
)

callback_replays = Table(
    "callback_replays",
    metadata,
    _required("id", Uuid()),
    _required("filter", JSONB()),
    _required("per_second", Integer()),
    _optional("behind", Uuid()),
    _required("sent", BigInteger()),
    _required("passed_over", BigInteger()),
    _required("actor", Text()),
    _required("reason", Text()),
    _required("created_at", _TIME),
    _optional("finished_at", _TIME),
)

recoveries = Table(
    "recoveries",
    metadata,
    _required("id", BigInteger()),
    _required("restored", Text()),
    _required("audit_id", BigInteger()),
    _required("began_at", _TIME),
    _required("behind", Uuid()),
    _required("payouts", BigInteger()),
    _required("payins_behind", Uuid()),
    _required("payins", BigInteger()),
    _optional("finished_at", _TIME),
)

checks = Table(
    "checks",
    metadata,
    _required("walk", Text()),
    _optional("behind", ARRAY(Text())),
    _required("began_at", _TIME),
    _required("rows_seen", BigInteger()),
    _required("found", JSONB()),
    _required("found_before", JSONB()),
    _optional("finished_at", _TIME),
    _required("due_at", _TIME),
)

callback_attempts = Table(
    "callback_attempts",
    metadata,
    _required("event_id", Uuid()),
    _required("shop_id", Uuid()),
    _required("attempt_no", Integer()),
    _required("started_at", _TIME),
    _required("duration_ms", Integer()),
    _optional("http_status", Integer()),
    _optional("error", Text()),
    _optional("response_excerpt", LargeBinary()),
    _optional("address", INET()),
    _required("late", Boolean()),
    _optional("dns_ms", Integer()),
    _optional("connect_ms", Integer()),
    _optional("first_byte_ms", Integer()),
    _required("reused", Boolean()),
    _optional("retry_after_seconds", Integer()),
)

sandbox_payments = Table(
    "payments",
    metadata,
    _required("reference", Text()),
    _required("amount_minor", BigInteger()),
    _required("currency", Text()),
    _required("state", Text()),
    _optional("failure_code", Text()),
    _required("authoritative", Boolean()),
    _required("submits", Integer()),
    _optional("settles_at", _TIME),
    _required("created_at", _TIME),
    schema="sandbox",
)
