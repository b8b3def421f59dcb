"""Lines for programs: one line each, whatever is in them."""

import json
import subprocess
import sys
from typing import Any

VALUES = [None, 1, 2**80, 1.5, True, "plain", "Ж", "\u2028two\u0085lines\x9b", "\udc80", {"a": [1]}, [b"x"], {1: 2}]

_BEGIN = """
from dataclasses import dataclass, field
from common.log import LogEvent, configure_logging, get_logger

@dataclass(frozen=True)
class Held:
    name: str
    word: str = field(repr=False)

configure_logging("json")
say = get_logger().info
"""


def _lines(*calls: str) -> list[str]:
    """What a process of its own says, whose stdout takes hardly anything but ASCII."""
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([_BEGIN, *calls])],
        env={"PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        check=True,
    )
    return done.stdout.decode("ascii").splitlines()


def test_every_value_makes_one_line_of_ascii() -> None:
    lines = _lines(*(f"say(LogEvent.ROUND_FAILED, found={value!a})" for value in VALUES))
    assert len(lines) == len(VALUES)
    for line, value in zip(lines, VALUES, strict=True):
        told: dict[str, Any] = json.loads(line)
        assert told["event"] == "round.failed"
        if value is None or isinstance(value, int | float | str):
            assert told["found"] == value


def test_a_class_of_ours_is_told_by_its_repr_and_what_must_not_be_told_is_dropped() -> None:
    (line,) = _lines("say(LogEvent.ROUND_FAILED, found=Held('a key', 'hunter2'), card_number='4111', status=200)")
    told = json.loads(line)
    assert told["found"] == "Held(name='a key')"
    assert (told["card_number"], told["status"]) == ("[dropped]", 200)


_COUNTED = """
import asyncio, logging, sys

class Counted:
    def __init__(self):
        self.writes = []
    def write(self, text):
        self.writes.append(text)
    def flush(self):
        pass

stdout = sys.stdout = Counted()
configure_logging("json")
say = get_logger().info
"""


def test_what_is_said_in_one_turn_of_the_loop_is_written_together_in_its_order_and_nothing_waits_longer() -> None:
    (told,) = _lines(
        _COUNTED,
        """
async def main():
    for number in range(3):
        say(LogEvent.ROUND_FAILED, number=number)
    logging.getLogger("library").warning("between")
    say(LogEvent.ROUND_FAILED, number=3)
    await asyncio.sleep(0)
    say(LogEvent.ROUND_FAILED, number=4)
    await asyncio.sleep(0)
    assert len(stdout.writes) == 2, "what was said is written before anything else is done"
say(LogEvent.ROUND_FAILED, number="before")
assert len(stdout.writes) == 1, "without a loop at once"
del stdout.writes[:]
asyncio.run(main())
import json
print(json.dumps(stdout.writes), file=sys.__stdout__)
""",
    )
    writes = json.loads(told)
    numbers = [[json.loads(line).get("number") for line in text.splitlines()] for text in writes]
    assert numbers == [[0, 1, 2, None, 3], [4]]


def test_what_is_said_last_is_written_though_the_loop_ends_with_it() -> None:
    lines = _lines(
        "import asyncio",
        "async def end(): say(LogEvent.PROCESS_STOPPED, number=1); raise SystemExit(0)",
        "async def first(): say(LogEvent.PROCESS_STOPPED, number=0)",
        "asyncio.run(first())",
        "asyncio.run(end())",
    )
    assert [json.loads(line)["number"] for line in lines] == [0, 1]
