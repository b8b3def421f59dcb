"""One tree of errors: drawn as it is, with a row of the HTTP table and a reason of its own for every leaf."""

import re
from collections.abc import Iterator
from http import HTTPStatus

import pytest

import common.errors
from common.errors import (
    ExternalIdReused,
    FieldError,
    InsufficientBalance,
    InvalidRequest,
    InvariantViolated,
    PayoutsError,
    Poison,
    Rejected,
    ShopCurrencyMismatch,
    ShopNotFound,
    Transient,
    Unauthenticated,
)
from gateway.errors import HTTP_ERRORS, HttpError, http_error

ARGUMENTS: dict[type[PayoutsError], tuple[object, ...]] = {
    InvalidRequest: (FieldError("amount", "amount must be a positive decimal string"),),
    ShopNotFound: ("X",),
    ShopCurrencyMismatch: ("BDT",),
    ExternalIdReused: (["amount"],),
    InsufficientBalance: ("2.00", "1.00"),
}

# The contract's error table: HTTP status and coarse code by reason.
CONTRACT = {
    "request_unreadable": (400, "bad_request", "Request is not valid HTTP"),
    "api_key_required": (401, "unauthorized", "API key required"),
    "timestamp_required": (401, "unauthorized", "Timestamp required"),
    "signature_required": (401, "unauthorized", "Signature required"),
    "timestamp_format_invalid": (401, "unauthorized", "Invalid timestamp format"),
    "timestamp_window_exceeded": (401, "unauthorized", "Timestamp window exceeded"),
    "api_key_invalid": (401, "unauthorized", "Invalid API key"),
    "signature_invalid": (401, "unauthorized", "Invalid signature"),
    "access_denied": (403, "forbidden", "Access denied"),
    "payout_not_found": (404, "not_found", "Payout not found"),
    "payin_not_found": (404, "not_found", "PayIn not found"),
    "event_not_found": (404, "not_found", "Not found"),
    "route_not_found": (404, "not_found", "Not found"),
    "method_not_allowed": (405, "method_not_allowed", "Method not allowed"),
    "body_too_large": (413, "payload_too_large", "Request body is larger than 64 KiB"),
    "content_type_unsupported": (415, "unsupported_media_type", "Content-Type must be application/json"),
    "field_invalid": (422, "validation_error", "amount must be a positive decimal string"),
    "shop_not_found": (422, "shop_not_found", "Shop with code 'X' not found or inactive for this merchant"),
    "shop_currency_mismatch": (422, "shop_currency_mismatch", "Shop currency mismatch. Expected BDT."),
    "insufficient_balance": (422, "insufficient_balance", "Insufficient balance. Required 2.00, available 1.00."),
    "external_id_reused": (422, "external_id_reused", "external_id was already used with different content: amount"),
    "not_cancelable": (422, "not_cancelable", "Payout can no longer be canceled"),
    "event_id_reused": (422, "event_id_reused", "An event of this id said something else"),
    "callback_missing": (422, "callback_missing", "There is no callback to send again"),
    "callback_in_progress": (
        422,
        "callback_in_progress",
        "The callback is being sent right now. Try again later.",
    ),
    "rate_limited": (429, "rate_limited", "Too many requests"),
    "server_error": (500, "server_error", "Server error"),
    "overloaded": (503, "unavailable", "Service unavailable. Repeat the same request."),
    "account_busy": (503, "unavailable", "Service unavailable. Repeat the same request."),
    "database_unavailable": (503, "unavailable", "Service unavailable. Repeat the same request."),
    "broker_unavailable": (503, "unavailable", "Service unavailable. Repeat the same request."),
    "secret_unreadable": (503, "unavailable", "Service unavailable. Repeat the same request."),
    "database_slow": (503, "unavailable", "Service unavailable. Repeat the same request."),
}


def below(family: type[PayoutsError]) -> Iterator[type[PayoutsError]]:
    """Every class under a family."""
    for child in family.__subclasses__():
        yield child
        yield from below(child)


ALL = sorted(set(below(PayoutsError)), key=lambda error: error.__name__)
LEAVES = [error for error in ALL if not error.__subclasses__()]
# What a caller may hear of: messages come from the broker, and nobody waits for an answer.
ANSWERED = [error for error in LEAVES if not issubclass(error, Poison)]


def made(error: type[PayoutsError]) -> PayoutsError:
    """An error of that class, as it is raised."""
    return error(*ARGUMENTS.get(error, ()))  # type: ignore[arg-type]


def drawn_tree() -> dict[str, str]:
    """The docstring's drawing: every name with the name it hangs under."""
    names = {error.__name__ for error in ALL}
    parents: dict[str, str] = {}
    branch: dict[int, str] = {}
    assert common.errors.__doc__ is not None
    for line in common.errors.__doc__.splitlines():
        found = [(match.start(), match[0]) for match in re.finditer(r"[A-Z]\w+", line) if match[0] in names]
        is_branch = "── " in line
        for column, name in found:
            if is_branch and column == found[0][0]:
                branch[column] = name
                above = [branch[edge] for edge in sorted(branch) if edge < column]
                parents[name] = above[-1] if above else "PayoutsError"
                branch = {edge: owner for edge, owner in branch.items() if edge <= column}
            else:
                owner = branch[max(branch)]
                siblings = is_branch and not made_family(found[0][1])
                parents[name] = parents[owner] if siblings else owner
    return parents


def made_family(name: str) -> bool:
    """Whether the class of that name has classes under it."""
    return bool(getattr(common.errors, name).__subclasses__())


def test_the_drawing_of_the_tree_is_the_tree() -> None:
    assert drawn_tree() == {error.__name__: error.__mro__[1].__name__ for error in ALL}


def test_the_families_are_four_and_every_error_belongs_to_one() -> None:
    assert {error for error in ALL if error.__mro__[1] is PayoutsError} == {
        Rejected,
        Transient,
        Poison,
        InvariantViolated,
    }
    assert issubclass(Unauthenticated, Rejected)


@pytest.mark.parametrize("error", ANSWERED)
def test_every_leaf_has_a_row_of_the_http_table(error: type[PayoutsError]) -> None:
    row = http_error(made(error))
    assert isinstance(row, HttpError)
    assert 400 <= HTTPStatus(row.status) < 600
    assert (row.retry_after_seconds > 0) == (row.status in {429, 503})


@pytest.mark.parametrize("family", list(HTTP_ERRORS))
def test_every_row_of_the_http_table_is_reached_by_an_error(family: type[PayoutsError]) -> None:
    assert any(http_error(made(error)) is HTTP_ERRORS[family] for error in ANSWERED)


def test_every_leaf_has_a_reason_of_its_own() -> None:
    reasons = [error.reason for error in LEAVES]
    assert len(set(reasons)) == len(reasons)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", reason) for reason in reasons)


@pytest.mark.parametrize("reason", CONTRACT)
def test_status_code_and_text_of_every_error_are_those_of_the_contract(reason: str) -> None:
    error = made(next(leaf for leaf in ANSWERED if leaf.reason == reason))
    row = http_error(error)
    assert (row.status, row.code, str(error)) == CONTRACT[reason]


def test_every_reason_is_in_the_contract_of_this_test() -> None:
    assert {leaf.reason for leaf in ANSWERED} == CONTRACT.keys() | {"default_shop_missing"}


def test_an_unknown_or_missing_shop_has_one_coarse_code() -> None:
    codes = {
        http_error(made(leaf)).code for leaf in ANSWERED if "shop" in leaf.reason and leaf is not ShopCurrencyMismatch
    }
    assert codes == {"shop_not_found"}


@pytest.mark.parametrize("error", ANSWERED)
def test_every_leaf_has_words_for_the_caller(error: type[PayoutsError]) -> None:
    assert str(made(error))
