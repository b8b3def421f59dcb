"""`payouts verify` and `payouts migrate`: the database as a whole."""

import click

from common.db.invariants import Finding, verify
from migrations.run import upgrade
from ops.cli.connect import READONLY, read_settings, run_connected, run_explained
from ops.cli.errors import CheckFailed
from ops.cli.options import json_option
from ops.cli.output import Record, print_json, print_table, show_record


@click.command("verify")
@json_option
def verify_command(as_json: bool) -> None:
    """Check every rule of the ledger on one snapshot. Exit code 1, and the first offenders, when one is broken."""
    findings = run_connected(verify, role=READONLY)
    broken = [finding for finding in findings if finding.count]
    if as_json:
        print_json({"holds": not broken, "rules": [_describe(finding) for finding in findings]})
    else:
        print_table([_summarize(finding) for finding in findings])
    if broken:
        names = ", ".join(finding.rule.name for finding in broken)
        raise CheckFailed(f"{len(broken)} of {len(findings)} rules broken: {names}")


@click.command("migrate")
@json_option
def migrate_command(as_json: bool) -> None:
    """Bring the database to the newest schema; roles first. A second call changes nothing."""
    revision = run_explained(upgrade(read_settings().database_url))
    show_record({"revision": revision}, as_json=as_json)


def _describe(finding: Finding) -> Record:
    return {
        "name": finding.rule.name,
        "guards": finding.rule.guards,
        "count": finding.count,
        "offenders": finding.offenders,
    }


def _summarize(finding: Finding) -> Record:
    more = finding.count - len(finding.offenders)
    return {
        "rule": finding.rule.guards,
        "verdict": f"broken {finding.count} times" if finding.count else "holds",
        "offenders": ", ".join(finding.offenders) + (f" and {more} more" if more else ""),
    }
