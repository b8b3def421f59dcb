"""`payouts sign`: a request as a merchant would sign it, to look at or to paste."""

import os
import re
import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import click

from common.domain.signing import sign_v1
from ops.cli.errors import Refused
from ops.cli.options import json_option
from ops.cli.output import print_json
from ops.state import FOLDER, find_demo

SECRET_VARIABLE: Final = "API_SECRET"  # noqa: S105 the name of a variable
_BASE_URL: Final = "http://127.0.0.1:8080"

# RFC 3986, 3.3 and 3.4: what may stand in a path and a query. What is signed must be what is sent, to the letter.
_TARGET: Final = re.compile(r"/[A-Za-z0-9._~!$&'()*+,;=:@%/-]*(\?[A-Za-z0-9._~!$&'()*+,;=:@%/?-]*)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Credentials:
    """A key with its secret, and where it is good."""

    public_id: str
    secret: str = field(repr=False)
    base_url: str


def parse_target(text: str) -> str:
    """A path with or without a query, as it goes over the wire."""
    if not _TARGET.fullmatch(text):
        raise click.BadParameter("must begin with / and hold only what a path and a query may, percent-encoded")
    return text


@click.command("sign")
@click.argument("method", type=click.Choice(["GET", "POST"], case_sensitive=False))
@click.argument("path", type=parse_target)
@click.option("--body", help="The body, as text.")
@click.option("--body-file", type=click.Path(exists=True, dir_okay=False, readable=True), help="The body, from a file.")
@click.option(
    "--key", metavar="PUBLIC_ID", help=f"Whose signature; the secret is read from {SECRET_VARIABLE}, else asked."
)
@click.option("--base-url", metavar="URL", help=f"Where it will be sent; {_BASE_URL} without a stack here.")
@json_option
def sign_command(
    method: str,
    path: str,
    body: str | None,
    body_file: str | None,
    key: str | None,
    base_url: str | None,
    as_json: bool,
) -> None:
    """Sign METHOD PATH by the v1 formula; print the headers and a curl. Good for about a minute.

    Without --key it is the demo merchant of the stack on this machine.
    """
    credentials = _find_credentials(key, base_url)
    raw = _read_body(body, body_file)
    headers = sign_request(credentials, method, path, raw, now=time.time())
    url = credentials.base_url + path
    curl = render_curl(method, url, headers, body, body_file)
    if as_json:
        print_json({"method": method, "url": url, "headers": headers, "curl": curl})
        return
    for name, value in headers.items():
        click.echo(f"{name}: {value}")
    click.echo()
    click.echo(curl)


def sign_request(credentials: Credentials, method: str, target: str, body: bytes, *, now: float) -> dict[str, str]:
    """The headers of a signed request. `now` is Unix seconds."""
    path, _, query = target.partition("?")
    timestamp = str(int(now))
    return {
        "X-API-Key": credentials.public_id,
        "X-Timestamp": timestamp,
        "X-Signature": sign_v1(credentials.secret, timestamp, method, path, query, body),
        **({"Content-Type": "application/json"} if body else {}),
    }


def render_curl(method: str, url: str, headers: dict[str, str], body: str | None, body_file: str | None) -> str:
    """A command that sends exactly what was signed: curl must neither read nor mend any of it."""
    words = ["curl", "-sS", "-i", "--path-as-is", "-X", method, url]
    words += [word for name, value in headers.items() for word in ("-H", f"{name}: {value}")]
    if body:
        words += ["--data-raw", body]
    elif body_file is not None:
        words += ["--data-binary", f"@{body_file}"]
    return shlex.join(words)


def _find_credentials(key: str | None, base_url: str | None) -> Credentials:
    demo = find_demo(FOLDER)
    base_url = (base_url or (demo.base_url if demo else _BASE_URL)).rstrip("/")
    if key is not None:
        return Credentials(key, _ask_secret(), base_url)
    if demo is None:
        raise Refused("no stack has run on this machine, so whose signature? Name a key with --key")
    return Credentials(demo.api_key, demo.api_secret, base_url)


def _ask_secret() -> str:
    """From the environment, or from the person: a command line is seen by everybody on the machine."""
    secret: str = os.environ.get(SECRET_VARIABLE) or click.prompt("secret of the key", hide_input=True, err=True)
    return secret


def _read_body(body: str | None, body_file: str | None) -> bytes:
    if body is not None and body_file is not None:
        raise click.UsageError("--body or --body-file, not both")
    return (body or "").encode() if body_file is None else Path(body_file).read_bytes()
