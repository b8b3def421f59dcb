"""`python -m worker settle|callbacks|sweep|all`, or `payouts-worker …` where the product is installed: one worker process.

Any number of each may run.
"""

import os
import sys

import uvloop

from common.log import configure_logging
from common.process import collect_seldom, open_many_files
from common.settings import Settings, SettingsInvalid
from common.tracing import traced
from migrations.run import newest_revision
from worker.app import ROLES, run_worker


def main() -> int:
    """Exit code 2: the call or the settings make no sense."""
    arguments = sys.argv[1:]
    choices = {role: (role,) for role in ROLES} | {"all": ROLES}
    if len(arguments) != 1 or arguments[0] not in choices:
        print(f"usage: python -m worker {'|'.join(choices)}", file=sys.stderr)
        return 2
    try:
        settings = Settings.from_environ(os.environ)
    except SettingsInvalid as error:
        print(f"worker: {error}", file=sys.stderr)
        return 2
    configure_logging(settings.log_format, settings.log_level, process=f"worker-{arguments[0]}")
    open_many_files()
    collect_seldom()
    with traced(os.environ, f"worker-{arguments[0]}"):
        uvloop.run(run_worker(settings, choices[arguments[0]], schema_revision=newest_revision()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
