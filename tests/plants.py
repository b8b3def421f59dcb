"""Faults that would cost money, planted one by one into a copy of the code: each must turn a test red.

`make plants` runs it and prints a table. A plant that nobody notices is a hole in the tests, and the exit code is 1.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
TIMEOUT_SECONDS: Final = 300

_FIRST_RED: Final = re.compile(r"^(?:FAILED|ERROR) \S+?::(\w+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Plant:
    """A fault: in that file, `sound` becomes `broken`, and so does every pair of `also`; some of these tests must fail."""

    name: str
    file: str
    sound: str
    broken: str
    tests: tuple[str, ...]
    also: tuple[tuple[str, str], ...] = ()


_CONCURRENT: Final = "tests/faults/test_concurrent_creates.py"
_SETTLEMENT: Final = "tests/integration/test_settlement.py"
_API: Final = "tests/integration/test_payouts_api.py"
_CREDITING: Final = "tests/integration/test_crediting.py"

PLANTS: Final = (
    Plant(
        '"not found" is believed while a call that was claimed may still begin',
        "worker/settlement.py",
        "denial_seconds=rail.denial_seconds and rail.denial_seconds + begin_seconds,",
        "denial_seconds=rail.denial_seconds,",
        ("tests/integration/test_recovering.py",),
    ),
    Plant(
        "accounts are read without a lock",
        "migrations/versions/0001_main_job.py",
        "WHERE a.id = ANY (account_ids) ORDER BY a.id FOR NO KEY UPDATE) l;",
        "WHERE a.id = ANY (account_ids) ORDER BY a.id) l;",
        (_CONCURRENT,),
    ),
    Plant(
        "accounts are locked in another order by some",
        "migrations/versions/0001_main_job.py",
        "WHERE a.id = ANY (account_ids) ORDER BY a.id FOR NO KEY UPDATE) l;",
        "WHERE a.id = ANY (account_ids) ORDER BY random() FOR NO KEY UPDATE) l;",
        (_CONCURRENT, _SETTLEMENT),
    ),
    Plant(
        "accounts are locked before due rows",
        "worker/recording.py",
        "    tokens = await lock_due(tx, ids)\n",
        "    await lock_accounts(tx, {item.call.payout.account_id for item in ended}, wait_seconds=wait_seconds)\n"
        "    tokens = await lock_due(tx, ids)\n",
        (_SETTLEMENT,),
    ),
    Plant(
        "an external id that exists is not looked for",
        "gateway/deciding.py",
        "payout = existing.get((order.shop_id, order.external_id))",
        "payout = None",
        (_API,),
    ),
    Plant(
        "the content of a reused id is not compared",
        "gateway/deciding.py",
        "return ExternalIdReused(differing) if differing else",
        "return",
        (_API,),
    ),
    Plant(
        "the balance is not looked at",
        "gateway/deciding.py",
        "if order.amount_minor > account.spendable_minor:",
        "if False:",
        (_API,),
    ),
    Plant(
        "a create that comes late is accepted",
        "migrations/versions/0020_accept_at_once.py",
        "AND clock_timestamp() <= until",
        "",
        ("tests/integration/test_accepting.py",),
    ),
    Plant(
        "a time-out releases the money",
        "worker/conclusions.py",
        "    return Conclusion(State.VERIFYING, until_look_up)",
        '    return Conclusion(State.FAILED, None, "other")',
        (_SETTLEMENT,),
    ),
    Plant(
        "a resend has a new reference",
        "worker/claiming.py",
        "reference=_reference_of(payout, history)",
        "reference=render_id(PAYOUT, claim.token)",
        (_SETTLEMENT,),
    ),
    Plant(
        "a forgotten payout gets another reference when it is created again",
        "common/domain/ids.py",
        "    if payout_id.version != _DERIVED_VERSION:",
        "    if True:",
        ("tests/unit/test_ids.py",),
    ),
    Plant(
        "a restored database is worked with as if nothing were forgotten",
        "migrations/versions/0019_recoveries.py",
        "WHEN (current_user <> 'payouts_owner' AND awaits_recovery())",
        "WHEN (false)",
        ("tests/integration/test_recovering.py",),
    ),
    Plant(
        "what a recovery doubts is believed unknown at once",
        "common/db/due.py",
        "action IN ('submit', 'restore')",
        "action = 'submit'",
        ("tests/integration/test_recovering.py",),
    ),
    Plant(
        "the lease is not checked before the call",
        "worker/settlement.py",
        "if monotonic() > call.terms.start_until:",
        "if False:",
        (_SETTLEMENT,),
    ),
    Plant(
        "a lost lease still counts",
        "worker/conclusions.py",
        "    if not held:\n",
        "    if False:\n",
        (_SETTLEMENT,),
    ),
    Plant(
        "a lapsed lease sends again instead of asking",
        "worker/claiming.py",
        "            moves.append(Move(payout, State.VERIFYING))\n",
        "            moves.append(Move(payout, State.QUEUED))\n",
        (_SETTLEMENT,),
    ),
    Plant(
        "what a rail denies that never promised to know is sent again",
        "worker/rails/sandbox.py",
        "Answer(Outcome.NOT_FOUND) if payment.authoritative else",
        "Answer(Outcome.NOT_FOUND) if True else",
        (_SETTLEMENT,),
    ),
    Plant(
        "a word against a final status goes unnoticed",
        "worker/conclusions.py",
        "    if outcome not in _DEFINITE or not state.is_final:\n        return False\n",
        "    return False\n",
        (_SETTLEMENT, "tests/integration/test_hearing.py"),
    ),
    Plant(
        "the credit is taken from the event's amount",
        "worker/crediting.py",
        "    if outcome in (Outcome.PAID, Outcome.RETURNED) and (word.amount_minor, word.currency) != (\n"
        "        payin.amount_minor,\n        payin.currency,\n    ):\n",
        "    if False:\n",
        (_CREDITING,),
        also=(
            (
                "account.append(kind, payin.amount_minor)",
                "account.append(kind, word.amount_minor or payin.amount_minor)",
            ),
        ),
    ),
    Plant(
        "a word about another sum credits what was asked for",
        "worker/crediting.py",
        "(word.amount_minor, word.currency) != (\n        payin.amount_minor,\n        payin.currency,\n    ):\n",
        "False:\n",
        (_CREDITING,),
    ),
    Plant(
        "a payin expires by time alone",
        "worker/crediting.py",
        "if outcome is Outcome.NOT_FOUND and is_over and not payin.has_unheard:",
        "if is_over:",
        (_CREDITING,),
    ),
    Plant(
        "a payin is asked about for the last time before its end",
        "common/db/payins.py",
        "coalesce(p.expires_at + make_interval(secs => CAST(:lag_seconds AS float8)) <= now(), false) AS is_over",
        "p.expires_at IS NOT NULL AS is_over",
        (_CREDITING,),
    ),
    Plant(
        "one operator may resolve alone, says the schema",
        "migrations/versions/0006_resolutions.py",
        "                               AND lower(second.actor) <> lower(first.actor)\n",
        "",
        ("tests/integration/test_schema_refuses.py",),
    ),
    Plant(
        "one operator resolves alone",
        "ops/resolving.py",
        "    if known.actor.casefold() == actor.casefold():\n",
        "    if False:\n",
        ("tests/integration/test_resolving.py",),
    ),
)


def main() -> int:
    """Plant them all, or those whose name contains one of the arguments; 1 when one was not noticed."""
    wanted = sys.argv[1:]
    unnoticed = 0
    for plant in PLANTS:
        if wanted and not any(word in plant.name for word in wanted):
            continue
        noticed_by = plant_and_test(plant)
        unnoticed += noticed_by is None
        print(f"{plant.name:<62}  {noticed_by or 'NOBODY NOTICED'}", flush=True)
    return 1 if unnoticed else 0


def plant_and_test(plant: Plant) -> str | None:
    """The first test that a fault turns red, or None when all of its tests pass."""
    with tempfile.TemporaryDirectory(prefix="payouts-plant-") as folder:
        copy = Path(folder)
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
        for name in listed.stdout.split("\0"):
            if name and (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                (copy / name).write_bytes((ROOT / name).read_bytes())
        file = copy / plant.file
        for sound, broken in ((plant.sound, plant.broken), *plant.also):
            file.write_text(file.read_text().replace(sound, broken))
        return _first_red(copy, plant.tests)


def _first_red(copy: Path, tests: Sequence[str]) -> str | None:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    ran = subprocess.run(
        command,
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy)},
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    red = _FIRST_RED.search(ran.stdout)
    if ran.returncode == 1 and red:
        return red[1]
    if ran.returncode:
        raise RuntimeError(f"the tests did not run: {ran.stdout[-2000:]}{ran.stderr[-2000:]}")
    return None


if __name__ == "__main__":
    sys.exit(main())
