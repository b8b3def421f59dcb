"""A rail that does not answer is left in peace for a while; nothing is decided by it."""

from worker.rails.breaker import Breaker


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_it_opens_after_failures_in_a_row_and_lets_one_call_try_after_a_rest() -> None:
    clock = Clock()
    heard: list[bool] = []
    breaker = Breaker(failures_max=3, rest_seconds=10, changed=heard.append, clock=clock)
    for _ in range(2):
        breaker.unanswered()
    assert (breaker.calls_max, heard) == (None, [])
    breaker.unanswered()
    assert (breaker.calls_max, heard) == (0, [True])
    clock.now += 9.9
    assert breaker.calls_max == 0
    clock.now += 0.1
    assert breaker.calls_max == 1


def test_an_answer_closes_it_and_another_silence_opens_it_again_at_once() -> None:
    clock = Clock()
    heard: list[bool] = []
    breaker = Breaker(failures_max=2, rest_seconds=10, changed=heard.append, clock=clock)
    for _ in range(2):
        breaker.unanswered()
    clock.now += 10
    breaker.unanswered()
    assert (breaker.calls_max, heard) == (0, [True])
    clock.now += 10
    breaker.answered()
    assert (breaker.calls_max, heard) == (None, [True, False])


def test_an_answer_in_between_counts_from_the_beginning() -> None:
    breaker = Breaker(failures_max=2, rest_seconds=10)
    for _ in range(5):
        breaker.unanswered()
        breaker.answered()
    assert breaker.calls_max is None
