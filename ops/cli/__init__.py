"""`payouts`: the command line of operators.

Each command is one function in the module of its subject. What it prints goes to stdout, what went wrong to stderr in one
line. Exit codes: 0 done · 1 a check failed · 2 refused · 3 the database, the broker or the output cannot be reached · 130
interrupted.
"""

import os
import re
import sys
from collections.abc import Sequence
from typing import Final

import click

from ops.cli.balance import balance_group
from ops.cli.callbacks import callbacks_group
from ops.cli.database import migrate_command, verify_command
from ops.cli.discrepancies import discrepancies_group
from ops.cli.doctor import doctor_command
from ops.cli.errors import LOOK_FIRST, Refused, Unreachable
from ops.cli.export import export_command
from ops.cli.keys import keys_group
from ops.cli.lanes import lane_group
from ops.cli.parked import parked_group
from ops.cli.parties import key_group, merchant_group, shop_group
from ops.cli.payins import payin_group
from ops.cli.payouts import payout_group
from ops.cli.probing import preview_command, test_command
from ops.cli.queues import queues_group
from ops.cli.rails import rail_group
from ops.cli.reconcile import reconcile_command
from ops.cli.recover import recover_command
from ops.cli.replays import replay_command, resume_command
from ops.cli.resolving import list_waiting_command, resolve_command
from ops.cli.sign import sign_command
from ops.cli.simulator import simulator_command
from ops.cli.stuck import stuck_command
from ops.cli.webhook_secrets import secret_group

# As shells say it: 128 and the number of the signal.
_INTERRUPTED: Final = 130
# How Python shows bytes that are not UTF-8 in what comes from the operating system.
_NOT_UTF_8: Final = re.compile("[\ud800-\udfff]")

for _command in (list_waiting_command, resolve_command):
    payout_group.add_command(_command)
for _command in (preview_command, test_command, replay_command, resume_command):
    callbacks_group.add_command(_command)
shop_group.add_command(secret_group)

_COMMANDS: Final = (
    merchant_group,
    shop_group,
    key_group,
    keys_group,
    rail_group,
    balance_group,
    payout_group,
    payin_group,
    callbacks_group,
    lane_group,
    discrepancies_group,
    reconcile_command,
    recover_command,
    export_command,
    parked_group,
    queues_group,
    stuck_command,
    doctor_command,
    verify_command,
    migrate_command,
    sign_command,
    simulator_command,
)


@click.group(commands=_COMMANDS, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
def cli() -> None:
    """Merchants, money, payouts and callbacks, for operators.

    Database and broker are those of DATABASE_URL and AMQP_URL, without the former those of the stack on this machine.
    Every change is written down with its actor. Exit codes: 0 done, 1 a check failed, 2 refused, 3 the database, the
    broker or the output cannot be reached, 130 interrupted.
    """


def main() -> None:
    """The console script."""
    if sys.stdout is None:
        # Before anything is done: nobody could be told.
        _complain("payouts", "the output is closed; nothing was done")
        sys.exit(Refused.exit_code)
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError:
        # Python would try once more at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit code."""
    try:
        if any(map(_NOT_UTF_8.search, arguments)):
            raise Refused("the arguments are not UTF-8")
        cli.main(list(arguments), prog_name="payouts", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "payouts"
        _complain(command, f"{error.format_message()} (see {command} --help)")
        return error.exit_code
    except click.ClickException as error:
        _complain("payouts", error.format_message())
        return error.exit_code
    except click.Abort as abort:
        if not isinstance(abort.__cause__, KeyboardInterrupt):
            # At a question, before anything was done.
            _complain("payouts", "given up")
            return Refused.exit_code
        _complain("payouts", f"interrupted; {LOOK_FIRST}")
        return _INTERRUPTED
    except SystemExit:
        # So click ends where nobody reads any more.
        _complain("payouts", f"nobody read the answer; {LOOK_FIRST}")
        return Unreachable.exit_code
    except OSError as error:
        # What the database and the broker do is explained by then: it was the output, or a file.
        _complain("payouts", f"{error.strerror or type(error).__name__}; {LOOK_FIRST}")
        return Unreachable.exit_code
    return 0


def _complain(command: str, message: str) -> None:
    """One line on stderr, however many the message has."""
    click.echo(f"{command}: {' '.join(message.split())}", err=True)
