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
