"""Collecting: asks rails whether pending payins were paid, in case nobody tells, and whether they were not when their time is
over. The question moves nothing at the rail, so it needs no attempt row: a worker that dies leaves its lease to run out.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic
from typing import Final
from uuid import UUID, uuid4

from common.db.callbacks import Event
from common.db.engine import Engine, in_transaction
from common.db.payins import Question, claim_questions
from common.deadlines import TimeLimit
from common.errors import PayoutsError
from common.log import LogEvent, get_logger, since_ms
from common.process import end_tasks
from common.settings import Settings
from worker.conclusions import storable
from worker.crediting import record_answer
from worker.hearing import note_discrepancies
from worker.rails import Answer, Outcome, PayinTerms, Rail, Rails

# Between two looks when nothing was due: nobody waits for a question by the second.
INTERVAL_SECONDS: Final = 0.5
_RECORD_ATTEMPTS_MAX: Final = 5

Tell = Callable[[Sequence[Event]], None]


class Collector:
    """Asks the rails that are switched on about payins that are due. `tell` hears of events whose callbacks can leave now."""

    def __init__(self, engine: Engine, rails: Rails, settings: Settings, *, tell: Tell = lambda _: None) -> None:
        self._engine = engine
        self._rails = rails
        self._settings = settings
        self._limit = TimeLimit(settings.rail_timeout_seconds)
        self._tell = tell
        self._leaving = False
        self._calls: set[asyncio.Task[None]] = set()
        self._calls_by_rail: Counter[str] = Counter()

    async def run_round(self) -> bool:
        """Claim what is due and start its questions. Returns whether there was anything."""
        claimed = [await self._claim(name, rail) for name, rail in list(self._rails.items())]
        return any(claimed)

    def leave(self) -> None:
        """Ask nothing more from now on."""
        self._leaving = True

    async def drain(self, deadline_seconds: float) -> None:
        """Let questions that are under way be answered and recorded, for at most that long."""
        await end_tasks(self._calls, deadline_seconds)

    async def _claim(self, name: str, rail: Rail) -> bool:
        settings = self._settings
        most = settings.payin_concurrency if rail.calls_max is None else min(settings.payin_concurrency, rail.calls_max)
        room, token = most - self._calls_by_rail[name], uuid4()
        if room <= 0 or self._leaving:
            return False
        questions = await in_transaction(
            self._engine,
            partial(
                claim_questions,
                rail=name,
                token=token,
                lease_seconds=settings.settle_lease_seconds,
                claim_max=room,
                lag_seconds=rail.lag_seconds,
            ),
        )
        for question in questions:
            self._calls_by_rail[name] += 1
            task = asyncio.create_task(self._ask_and_record(name, rail, question, token))
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)
        return bool(questions)

    async def _ask_and_record(self, name: str, rail: Rail, question: Question, token: UUID) -> None:
        """Ask and record; the question leaves one line in the log, whatever happens."""
        started, rail_ms = monotonic(), None
        answer, failure = Answer(Outcome.UNKNOWN), "canceled"
        try:
            answer = await self._ask(rail, question)
            rail_ms = since_ms(started)
            await self._record(question, answer, token, rail.lag_seconds)
            failure = ""
        except Exception as error:
            # Not recorded: the lease runs out, and the rail is asked again.
            failure = error.reason if isinstance(error, PayoutsError) else type(error).__name__
        finally:
            get_logger().log(
                logging.ERROR if failure else logging.INFO,
                LogEvent.PAYIN_ASKED,
                payin_id=question.reference,
                shop_id=str(question.shop_id),
                rail=name,
                look_up=question.look_ups,
                outcome=answer.outcome,
                failure=answer.failure_code,
                error=failure or None,
                rail_ms=rail_ms,
                duration_ms=since_ms(started),
            )
            self._calls_by_rail[name] -= 1

    async def _ask(self, rail: Rail, question: Question) -> Answer:
        """Ask the rail within its deadline; whatever goes wrong is `UNKNOWN`."""
        terms = PayinTerms(question.reference, question.amount_minor, question.currency)
        try:
            answer = await self._limit.keep(rail.look_up_payin(terms))
        except TimeoutError:
            return Answer(Outcome.UNKNOWN, detail="time-out")
        except Exception as error:
            get_logger().error(LogEvent.RAIL_CRASHED, payin_id=question.reference, error=type(error).__name__)
            return Answer(Outcome.UNKNOWN, detail=type(error).__name__)
        return storable(answer)

    async def _record(self, question: Question, answer: Answer, token: UUID, lag_seconds: float) -> None:
        delays = self._settings.payin_look_up_delays_seconds
        work = partial(
            record_answer,
            question=question,
            answer=answer,
            token=token,
            again_in_seconds=delays[min(question.look_ups, len(delays) - 1)],
            lag_seconds=lag_seconds,
        )
        credited = await in_transaction(self._engine, work, attempts_max=_RECORD_ATTEMPTS_MAX)
        note_discrepancies(credited.discrepancies)
        self._tell(credited.events)
