"""How the scan for due work behaves while messages arrive: it only looks for what they did not bring."""

from typing import Final

# How long past due a row must be, and how long the scan rests between two looks.
OVERDUE_SECONDS: Final = 1.0
REST_SECONDS: Final = 0.25
