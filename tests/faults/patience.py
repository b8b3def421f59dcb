"""How long processes are patient in the fault tests: as short as may be, or longer than any test."""

from typing import Final

# As short as the settings allow: a lease must outlast its call by 5 s.
SHORT: Final = {
    "PAYOUTS_RAIL_TIMEOUT_SECONDS": "0.5",
    "PAYOUTS_SETTLE_LEASE_SECONDS": "5.5",
    "PAYOUTS_CALLBACK_TIMEOUT_SECONDS": "0.5",
    "PAYOUTS_CALLBACK_LEASE_SECONDS": "5.5",
}
# So long that nothing but the test ends a wait.
LONG: Final = {
    "PAYOUTS_RAIL_TIMEOUT_SECONDS": "40",
    "PAYOUTS_SETTLE_LEASE_SECONDS": "50",
    "PAYOUTS_CALLBACK_TIMEOUT_SECONDS": "40",
    "PAYOUTS_CALLBACK_LEASE_SECONDS": "50",
    "PAYOUTS_DATABASE_CONNECT_TIMEOUT_SECONDS": "40",
    "PAYOUTS_DATABASE_LOCK_TIMEOUT_SECONDS": "40",
    "PAYOUTS_DATABASE_STATEMENT_TIMEOUT_SECONDS": "40",
    "PAYOUTS_DRAIN_SECONDS": "20",
}
# For tests' own sessions, which wait for rows for as long as a process that holds them may stand still.
UNHURRIED_LOCKS: Final = {
    "PAYOUTS_DATABASE_LOCK_TIMEOUT_SECONDS": "60",
    "PAYOUTS_DATABASE_STATEMENT_TIMEOUT_SECONDS": "60",
}
# A statement whose answer is held back is waited for, whatever is done meanwhile.
UNHURRIED_STATEMENTS: Final = {"PAYOUTS_DATABASE_STATEMENT_TIMEOUT_SECONDS": "40"}
# Gateways wait for a lock for longer than a test holds it, or waits for anything.
UNHURRIED_SECONDS: Final = 60.0
UNHURRIED: Final = {
    "PAYOUTS_DATABASE_LOCK_TIMEOUT_SECONDS": "60",
    "PAYOUTS_ACCEPT_WAIT_SECONDS_MAX": "60",
    "PAYOUTS_REQUEST_SECONDS_MAX": "90",
}
