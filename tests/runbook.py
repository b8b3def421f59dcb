"""The runbook's drills: every alarm is provoked, looked at and mended by the commands of its page, and a Prometheus sees it.

`make alarms` runs it on a stack of its own and says what happens; ARGS="RailSilent LanesHeld" drills some. The exit code is 1
when an alarm does not fire, or does not end, and 2 when there is none of that name.
"""

import asyncio
import os
import re
import shutil
import signal
import sys
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile, mkdtemp
from time import monotonic
from typing import IO, Any, Final

import yaml

from ops.local import reset_folder
from ops.ports import choose_port
from ops.postgres import find_programs
from ops.servers import ServerFailed
from ops.state import LOCAL_DEFAULTS, find_or_make_keys
from tests.local_stack import Terminal
from tests.prometheus import Prometheus, find_or_fetch

ROOT: Final = Path(__file__).parents[1]
RUNBOOK: Final = ROOT / "deploy" / "runbook"
RULES: Final = ROOT / "deploy" / "prometheus" / "alerts.yaml"

# In a drill a minute takes a second, and nothing longer than ten: in `for`, and in the windows of rates. Nothing else of a rule
# is changed.
HASTE: Final = 60
HASTY_SECONDS_MAX: Final = 10
SCRAPE_SECONDS: Final = 0.5

# Until an alarm fires, or is over, and until a command is done.
PATIENCE_SECONDS: Final = 180.0
# A scrape that comes late can end an alarm for a moment. Then it waits again, for its `for` and the window of its rates.
LAPSE_SECONDS: Final = 3.0 * HASTY_SECONDS_MAX
COMMAND_SECONDS: Final = 90.0
# Commands at the same time: each is a Python that starts.
COMMANDS_MAX: Final = 3
_POLL_SECONDS: Final = 0.2
# Payouts that go on all the time, as in a real system: to the sandbox and to the bank.
_TRAFFIC: Final = "exec python -m ops.send --count 1000000 --per-second 5 --shop demo-shop --shop bank-shop"
# Rails answer soon or not at all, and what the sandbox has to say later, it says soon.
_STACK_SETTINGS: Final = {"PAYOUTS_RAIL_TIMEOUT_SECONDS": "5", "PAYOUTS_SANDBOX_SETTLE_SECONDS": "1"}
_GONE_THE_WHOLE_WAY: Final = """
until psql -qAt "$DATABASE_URL" -c "SELECT 'done' FROM callbacks WHERE state = 'delivered' LIMIT 1" | grep -q done
do sleep 0.2; done
"""

# What cannot be provoked while another is: whom it comes after. All others begin when somebody looks again.
_LOOKS: Final = ("NobodyLooks",)
AFTER: Final[Mapping[str, Sequence[str]]] = {
    # Without the role sweep most alarms are blind, so it goes first, beside those that are not.
    "NobodyLooks": (),
    "RailSilent": (),
    "RequestsFail": (),
    "ProcessDown": _LOOKS,
    "CallbacksNotTaken": ("ProcessDown",),
    "PayoutsNotTaken": ("RailSilent", *_LOOKS),
    "BrokerAway": _LOOKS,
    "MessagesUnconfirmed": ("BrokerAway",),
    "MessagesParked": ("MessagesUnconfirmed",),
    "LedgerNotChecked": ("LedgerRuleBroken",),
    "ResolutionsUnconfirmed": ("PayoutsInDoubt",),
    "TransactionOld": ("RequestsFail", *_LOOKS),
}
# Without a gateway no payout comes, so all others begin after this one.
FIRST: Final = "NobodyAccepts"
# On a machine that is busy with drills requests are slow by themselves, so this one has it for itself.
LAST: Final = "RequestsSlow"

_BLOCK: Final = re.compile(r"^```sh (look|mend|provoke)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_WINDOW: Final = re.compile(r"\[([0-9]+)([smhd])\]")
_DURATION: Final = re.compile(r"([0-9]+)([smhd])")
_UNIT_SECONDS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


class DrillFailed(AssertionError):
    """An alarm did not do what its page says."""


@dataclass(frozen=True, slots=True)
class Page:
    """The commands of an alarm's page: to look, to mend, to provoke."""

    look: str
    mend: str
    provoke: str


def read_page(alarm: str) -> Page:
    """The page of an alarm; each command stands in it once. Raises: `FileNotFoundError`."""
    blocks = _BLOCK.findall((RUNBOOK / f"{alarm}.md").read_text())
    if sorted(kind for kind, _ in blocks) != ["look", "mend", "provoke"]:
        raise DrillFailed(f"the page of {alarm} must have one block each of `sh look`, `sh mend` and `sh provoke`")
    return Page(**dict(blocks))


def read_rules() -> dict[str, Any]:
    """The rules as they are deployed."""
    rules: dict[str, Any] = yaml.safe_load(RULES.read_text())
    return rules


def list_alarms(rules: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rules, whatever their group."""
    return [rule for group in rules["groups"] for rule in group["rules"]]


def hasten(rules: Mapping[str, Any]) -> dict[str, Any]:
    """The same rules with all waiting shortened: see `HASTE`."""
    return {
        "groups": [
            {
                **group,
                "rules": [
                    {
                        **rule,
                        "for": _hasten(_DURATION.fullmatch(rule.get("for", "0s"))),
                        "expr": _WINDOW.sub(lambda window: f"[{_hasten(window)}]", rule["expr"]),
                    }
                    for rule in group["rules"]
                ],
            }
            for group in rules["groups"]
        ]
    }


def _hasten(found: re.Match[str] | None) -> str:
    if found is None:
        raise ValueError("a duration must be one number with one of the units s, m, h, d")
    seconds = int(found[1]) * _UNIT_SECONDS[found[2]] / HASTE
    return f"{min(HASTY_SECONDS_MAX, seconds) * 1000:.0f}ms"


@dataclass(slots=True)
class Drilled:
    """How a drill went: what the alarm was, seconds from its commands to the alarm, and from the mending to its end."""

    states: list[str] = field(default_factory=list)
    fired_seconds: float = 0.0
    ended_seconds: float = 0.0


@dataclass(slots=True)
class Range:
    """A stack with traffic, and a Prometheus that looks at it."""

    prometheus: Prometheus
    environment: Mapping[str, str]
    say: Callable[[str, str], None]
    _shells: list[asyncio.subprocess.Process] = field(default_factory=list)
    _running: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(COMMANDS_MAX))

    async def drill(self, alarm: str) -> Drilled:
        """Provoke an alarm, wait until it fires, look, mend, wait until it is over. Raises: `DrillFailed`."""
        page, drilled = read_page(alarm), Drilled()
        drilled.states.append(await self._wait(alarm, "inactive"))
        await self.run(f"{alarm}, provoke", page.provoke)
        self.say(alarm, "is provoked")
        began = monotonic()
        drilled.states.append(await self._wait(alarm, "firing"))
        drilled.fired_seconds = monotonic() - began
        self.say(alarm, f"fires after {drilled.fired_seconds:.1f} s")
        await self.run(f"{alarm}, look", page.look)
        try:
            await self._wait(alarm, "firing", LAPSE_SECONDS)
        except DrillFailed as failure:
            raise DrillFailed(f"before anybody has mended anything, {failure}") from None
        await self.run(f"{alarm}, mend", page.mend)
        began = monotonic()
        drilled.states.append(await self._wait(alarm, "inactive"))
        drilled.ended_seconds = monotonic() - began
        self.say(alarm, f"is over {drilled.ended_seconds:.1f} s after it was mended")
        return drilled

    async def run(self, what: str, command: str) -> None:
        """Run a command of a page to its end; what it leaves running ends with us. Raises: `DrillFailed`."""
        # No pipe: what the command leaves running would keep it open.
        with TemporaryFile() as output:
            async with self._running:
                shell = await self.start(command, output)
                try:
                    await asyncio.wait_for(shell.wait(), COMMAND_SECONDS)
                except TimeoutError:
                    raise DrillFailed(f"{what}: not done after {COMMAND_SECONDS:g} s") from None
            if shell.returncode:
                output.seek(0)
                raise DrillFailed(f"{what}: exit code {shell.returncode}:\n{output.read().decode(errors='replace')}")

    async def start(self, command: str, output: IO[bytes] | int = DEVNULL) -> asyncio.subprocess.Process:
        """Start a command, in a session of its own."""
        shell = await asyncio.create_subprocess_exec(
            "/bin/sh",
            "-euc",
            command,
            cwd=ROOT,
            env=self.environment,
            stdin=DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        self._shells.append(shell)
        return shell

    async def close(self) -> None:
        """End whatever a command has left running."""
        for shell in self._shells:
            with suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
            await shell.wait()

    async def _wait(self, alarm: str, wanted: str, seconds: float = PATIENCE_SECONDS) -> str:
        ends_at = monotonic() + seconds
        while (state := await asyncio.to_thread(self.prometheus.state, alarm)) != wanted:
            if monotonic() > ends_at:
                raise DrillFailed(f"{alarm} is not {wanted} after {seconds:g} s, but {state}")
            await asyncio.sleep(_POLL_SECONDS)
        return state


def drill_all(on: Range, alarms: Sequence[str]) -> dict[str, "asyncio.Task[Drilled]"]:
    """Begin all drills, those that can be at the same time; each of the tasks ends with how it went."""
    tasks: dict[str, asyncio.Task[Drilled]] = {}

    async def drill(alarm: str) -> Drilled:
        others = tasks.keys() if alarm == LAST else (FIRST, *AFTER.get(alarm, _LOOKS))
        before = [tasks[other] for other in others if other in tasks and other != alarm and alarm != FIRST]
        if before:
            await asyncio.wait(before)
        return await on.drill(alarm)

    for alarm in alarms:
        tasks[alarm] = asyncio.create_task(drill(alarm))
    return tasks


@asynccontextmanager
async def practice_range(say: Callable[[str, str], None]) -> AsyncIterator[Range]:
    """A stack of its own in a folder that goes with it. Raises: `ServerFailed` where there is no Prometheus; `DrillFailed`."""
    program = await asyncio.to_thread(find_or_fetch, os.environ, say)
    async with AsyncExitStack() as ending:
        folder = _make_folder()
        ending.push_async_callback(asyncio.to_thread, _remove, folder)
        stack = Terminal(folder, choose_port())
        ending.push_async_callback(stack.end, signal.SIGKILL)
        stack.environment |= _STACK_SETTINGS
        say("stack", f"is brought up in {folder}")
        await stack.bring_up()
        await stack.read_until("ready")
        if not stack.demo.amqp_url:
            raise DrillFailed(next(line for line in stack.lines if line.startswith("RabbitMQ")))
        prometheus = Prometheus(
            program,
            folder,
            rules=hasten(read_rules()),
            targets=_admin_ports(stack.lines),
            interval_seconds=SCRAPE_SECONDS,
        )
        await asyncio.to_thread(prometheus.start)
        ending.push_async_callback(asyncio.to_thread, prometheus.stop)
        on = Range(prometheus, _environment(stack), say)
        ending.push_async_callback(on.close)
        await on.start(_TRAFFIC)
        await on.run("the first payouts", _GONE_THE_WHOLE_WAY)
        yield on


def _admin_ports(lines: Sequence[str]) -> dict[str, list[str]]:
    """Where the processes of each role tell, as the stack has said."""
    ready = re.compile(r"(gateway|settle|callbacks|sweep)(?:-\d)? +ready, http://(\S+)")
    ports: dict[str, list[str]] = {}
    for found in filter(None, map(ready.fullmatch, lines)):
        ports.setdefault(found[1], []).append(found[2])
    return ports


def _environment(stack: Terminal) -> dict[str, str]:
    """What a person has at their terminal: `payouts`, `psql`, `rabbitmqctl`, and where everything is."""
    programs = stack.folder / "programs"
    programs.mkdir()
    control = programs / "rabbitmqctl"
    control.write_text(
        f"#!{sys.executable}\nimport sys, pathlib\nfrom ops.broker import find_own\n"
        f"node = find_own(pathlib.Path({str(stack.folder)!r}))\nprint(node.ctl(*sys.argv[1:]))\n"
    )
    control.chmod(0o755)
    path = [str(programs), str(Path(sys.executable).parent), os.environ["PATH"], str(find_programs())]
    return {
        **LOCAL_DEFAULTS,
        **find_or_make_keys(stack.folder),
        "PATH": os.pathsep.join(path),
        "PYTHONPATH": str(ROOT),
        "HOME": str(stack.folder),
        "DATABASE_URL": stack.demo.database_url,
        "AMQP_URL": stack.demo.amqp_url or "",
        "STACK": str(stack.folder),
    }


def _make_folder() -> Path:
    """A folder that any account may pass through: servers have accounts of their own."""
    folder = Path(mkdtemp(prefix="payouts-alarms-"))
    folder.chmod(0o755)
    return folder


def _remove(folder: Path) -> None:
    reset_folder(folder)
    shutil.rmtree(folder, ignore_errors=True)


async def main(wanted: Sequence[str]) -> int:
    """Drill these alarms, or all. Returns: the exit code."""
    began = monotonic()

    def say(subject: str, text: str) -> None:
        print(f"{monotonic() - began:6.1f} s  {subject:<24}{text}", flush=True)

    known = [rule["alert"] for rule in list_alarms(read_rules())]
    if unknown := sorted(set(wanted) - set(known)):
        print(f"error: there is no alarm {', '.join(unknown)}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    alarms = [alarm for alarm in known if alarm in wanted or not wanted]
    failed: list[str] = []
    try:
        async with practice_range(say) as on:
            tasks = drill_all(on, alarms)
            await asyncio.wait(tasks.values())
            for alarm, task in tasks.items():
                if (error := task.exception()) is not None:
                    failed.append(alarm)
                    say(alarm, f"FAILED: {error}")
    except (ServerFailed, DrillFailed) as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    say("result", f"{len(alarms) - len(failed)} of {len(alarms)} alarms fire and end as their pages say")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:])))
