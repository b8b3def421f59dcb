"""`payouts balance`: what a shop has, and putting more there."""

import click

from common.db.engine import Engine, Tx, in_transaction
from common.db.ledger import find_balance
from common.db.merchants import find_shop_by_codes
from common.domain.money import render_amount
from ops.cli.connect import run_changing, run_connected
from ops.cli.errors import Refused
from ops.cli.options import actor_option, json_option, reason_option
from ops.cli.output import Record, show_record
from ops.onboarding import top_up


@click.group("balance")
def balance_group() -> None:
    """Money of shops."""


@balance_group.command("topup")
@click.argument("merchant")
@click.argument("shop")
@click.argument("amount")
@reason_option
@actor_option
@json_option
def top_up_command(merchant: str, shop: str, amount: str, reason: str, actor: str, as_json: bool) -> None:
    """Credit AMOUNT, such as 1000.00, to the account of MERCHANT's SHOP: a ledger entry for ever."""
    run_changing(lambda engine: top_up(engine, merchant=merchant, shop=shop, amount=amount, reason=reason, actor=actor))
    # Nothing is read after the commit: a failure there would look as if no money had moved.
    show_record({"merchant": merchant, "shop": shop, "credited": amount, "reason": reason}, as_json=as_json)


@balance_group.command("show")
@click.argument("merchant")
@click.argument("shop")
@json_option
def show_balance_command(merchant: str, shop: str, as_json: bool) -> None:
    """What MERCHANT's SHOP may spend, and what its unfinished payouts hold."""
    show_record(run_connected(lambda engine: read_balance(engine, merchant, shop)), as_json=as_json)


async def read_balance(engine: Engine, merchant: str, shop: str) -> Record:
    """A shop's balance at its currency's scale. Raises: `Refused` when there is no such shop."""

    async def work(tx: Tx) -> Record:
        found = await find_shop_by_codes(tx, merchant, shop)
        balance = None if found is None else await find_balance(tx, found.account_id)
        if found is None or balance is None:
            raise Refused(f"the merchant {merchant} has no shop {shop}")
        amounts = {
            "available": balance.available_minor,
            "pending": balance.pending_minor,
            "credit": balance.credit_minor,
            "total": balance.total_minor,
        }
        return {
            "merchant": merchant,
            "shop": shop,
            "currency": found.currency,
            **{name: render_amount(amount_minor, found.currency_exponent) for name, amount_minor in amounts.items()},
            "as_of": balance.as_of,
        }

    return await in_transaction(engine, work)
