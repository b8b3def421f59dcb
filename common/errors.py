"""Every error of ours, in one tree. Families decide what happens, leaves say what happened.

    PayoutsError
    ├── Rejected                      the caller is wrong
    │   ├── Unauthenticated           ApiKeyRequired · TimestampRequired · SignatureRequired · InvalidTimestampFormat ·
    │   │                             TimestampWindowExceeded · InvalidApiKey · InvalidSignature
    │   ├── AccessDenied
    │   ├── NotFound                  PayoutNotFound · PayinNotFound · EventNotFound · RouteNotFound
    │   ├── InvalidRequest
    │   ├── RuleBroken                ShopNotFound · DefaultShopMissing · ShopCurrencyMismatch · ExternalIdReused ·
    │   │                             InsufficientBalance · NotCancelable · EventIdReused ·
    │   │                             CallbackMissing · CallbackInProgress
    │   └── MethodNotAllowed · BodyTooLarge · UnsupportedMediaType · UnreadableRequest · RateLimited
    ├── Transient                     the world is wrong for now: repeating is safe and may help
    │   └── Overloaded · AccountBusy · DatabaseUnavailable · DatabaseSlow · BrokerUnavailable · SecretUnreadable
    ├── Poison                        the message is unreadable: it is parked, its neighbours go on
    │   └── UnreadableMessage
    └── InvariantViolated             we are wrong

`reason` is stable and fine: merchants may build on it. HTTP statuses live in `gateway.errors` alone.
"""

from dataclasses import dataclass
from typing import ClassVar


class PayoutsError(Exception):
    """The root. The text of an error is meant for the caller and never carries secrets or recipients."""

    reason: ClassVar[str]
    message: ClassVar[str] = ""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or self.message)


class Rejected(PayoutsError):
    """The caller is wrong; the same request will be refused again."""


class Unauthenticated(Rejected):
    """We do not know who is asking."""


class ApiKeyRequired(Unauthenticated):
    reason, message = "api_key_required", "API key required"


class TimestampRequired(Unauthenticated):
    reason, message = "timestamp_required", "Timestamp required"


class SignatureRequired(Unauthenticated):
    reason, message = "signature_required", "Signature required"


class InvalidTimestampFormat(Unauthenticated):
    reason, message = "timestamp_format_invalid", "Invalid timestamp format"


class TimestampWindowExceeded(Unauthenticated):
    reason, message = "timestamp_window_exceeded", "Timestamp window exceeded"


class InvalidApiKey(Unauthenticated):
    reason, message = "api_key_invalid", "Invalid API key"


class InvalidSignature(Unauthenticated):
    reason, message = "signature_invalid", "Invalid signature"


class AccessDenied(Rejected):
    """We know who is asking, and this is not for them."""

    reason, message = "access_denied", "Access denied"


class NotFound(Rejected):
    """There is no such thing in the caller's scope."""


class PayoutNotFound(NotFound):
    reason, message = "payout_not_found", "Payout not found"


class PayinNotFound(NotFound):
    reason, message = "payin_not_found", "PayIn not found"


class EventNotFound(NotFound):
    reason, message = "event_not_found", "Not found"


class RouteNotFound(NotFound):
    reason, message = "route_not_found", "Not found"


@dataclass(frozen=True, slots=True)
class FieldError:
    """What is wrong with one field of a request; never its value."""

    field: str
    message: str


class InvalidRequest(Rejected):
    """Fields that break the contract, all of them, in the order of the fields."""

    reason = "field_invalid"

    def __init__(self, *fields: FieldError) -> None:
        super().__init__(fields[0].message)
        self.fields = fields


class RuleBroken(Rejected):
    """The request is well formed and a rule of the business forbids it. Nothing was stored."""


class ShopNotFound(RuleBroken):
    reason = "shop_not_found"

    def __init__(self, shop_code: str) -> None:
        super().__init__(f"Shop with code '{shop_code}' not found or inactive for this merchant")


class DefaultShopMissing(RuleBroken):
    reason, message = "default_shop_missing", "Default shop is not configured for this merchant. Send shop_code."


class ShopCurrencyMismatch(RuleBroken):
    reason = "shop_currency_mismatch"

    def __init__(self, currency: str) -> None:
        super().__init__(f"Shop currency mismatch. Expected {currency}.")


class ExternalIdReused(RuleBroken):
    """The id was used for other content. Names the differing fields, never their values."""

    reason = "external_id_reused"

    def __init__(self, fields: list[str]) -> None:
        super().__init__(f"external_id was already used with different content: {', '.join(fields)}")
        self.fields = fields


class InsufficientBalance(RuleBroken):
    """Amounts are decimal strings at the currency's scale."""

    reason = "insufficient_balance"

    def __init__(self, required: str, available: str) -> None:
        super().__init__(f"Insufficient balance. Required {required}, available {available}.")


class EventIdReused(RuleBroken):
    """A rail has sent another event under this id before."""

    reason, message = "event_id_reused", "An event of this id said something else"


class NotCancelable(RuleBroken):
    """The payout is, or may be, at its rail already, or it has ended otherwise."""

    reason, message = "not_cancelable", "Payout can no longer be canceled"


class CallbackMissing(RuleBroken):
    """Nothing has happened yet that is told, or there was no URL to call."""

    reason, message = "callback_missing", "There is no callback to send again"


class CallbackInProgress(RuleBroken):
    """Its receiver is being called at this moment, or was within the last second."""

    reason, message = "callback_in_progress", "The callback is being sent right now. Try again later."


class MethodNotAllowed(Rejected):
    reason, message = "method_not_allowed", "Method not allowed"


class BodyTooLarge(Rejected):
    reason, message = "body_too_large", "Request body is larger than 64 KiB"


class UnsupportedMediaType(Rejected):
    reason, message = "content_type_unsupported", "Content-Type must be application/json"


class UnreadableRequest(Rejected):
    """What arrived is not HTTP as we speak it."""

    reason, message = "request_unreadable", "Request is not valid HTTP"


class RateLimited(Rejected):
    """The key asks more often than it may; later the same request is welcome."""

    reason, message = "rate_limited", "Too many requests"


class Transient(PayoutsError):
    """The world is wrong for now. What was asked is undecided or did not happen; repeating it is safe."""

    message = "Service unavailable. Repeat the same request."


class Overloaded(Transient):
    """More requests wait than may wait."""

    reason = "overloaded"


class AccountBusy(Transient):
    """Somebody else holds the shop's account for longer than we wait."""

    reason = "account_busy"


class DatabaseUnavailable(Transient):
    """PostgreSQL cannot be reached, or did not tell how a transaction ended."""

    reason = "database_unavailable"


class DatabaseSlow(Transient):
    """PostgreSQL did not finish in time; how a transaction ended may be unknown."""

    reason = "database_slow"


class BrokerUnavailable(Transient):
    """RabbitMQ cannot be reached, or did not confirm."""

    reason = "broker_unavailable"


class SecretUnreadable(Transient):
    """The keys of this process do not open a secret; those of another may."""

    reason = "secret_unreadable"


class Poison(PayoutsError):
    """A message that will never be understood, however often it comes."""


class UnreadableMessage(Poison):
    reason, message = "message_unreadable", "unreadable"


class InvariantViolated(PayoutsError):
    """We are wrong: something that our own rules exclude has happened."""

    reason, message = "server_error", "Server error"
