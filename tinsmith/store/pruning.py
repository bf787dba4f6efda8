"""Deleting what nobody needs any more: old results, payloads behind recovery points, jobs long over.

In small steps: `find` only reads, and so holds nobody up; `delete` is one transaction of a bounded number of rows and
bytes. Whatever may be deleted once may be deleted for ever, so nothing is lost between the two.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from tinsmith.store.queue import FINISHED, OPEN, for_numbers, listed
from tinsmith.store.tables import jobs, models, payloads, results

ROWS = 500  # of each kind, in one step
LARGEST_BYTES = 16 * 2**20  # of what one step deletes, if it is more than one row
LOOK_ROWS = 500  # payloads, and jobs, that one step looks at
FORGET_SECONDS = 7 * 86400.0

_IS_OVER = models.c.id.is_(None) | models.c.state.in_(["closed", "failed"])  # the subject is no living model
_DELETE_RESULTS = for_numbers(sa.delete(results), results)
_DELETE_PAYLOADS = for_numbers(sa.delete(payloads), payloads)
_DELETE_JOBS = for_numbers(sa.delete(jobs), jobs)
_EXPIRE = for_numbers(sa.update(jobs).values(state="expired"), jobs)


@dataclass(frozen=True, slots=True)
class Place:
    """Behind which numbers the next step looks: at payloads, and at jobs."""

    payloads: int = 0
    jobs: int = 0


@dataclass(frozen=True, slots=True)
class Prunable:
    """Numbers of jobs: whose results are old, whose payloads no recovery needs, which can be forgotten altogether."""

    results: Sequence[int] = ()
    payloads: Sequence[int] = ()
    jobs: Sequence[int] = ()

    def __bool__(self) -> bool:
        return bool(self.results or self.payloads or self.jobs)


def find(conn: sa.Connection, finished_before: float, place: Place) -> tuple[Prunable, Place, bool]:
    """A step's work, where the next one goes on looking, and whether that is worth doing soon.

    Results are old if their jobs ended before that time. A week later the jobs themselves may go, unless they are a
    living model's: its seqs stay consumed. There is no hurry about those: some are looked at with every step.
    """
    old, _, more_old = _first(conn.execute(_old_results(finished_before)), ROWS + 1)
    needless, payloads_behind, more_needless = _first(conn.execute(_payloads_behind(place.payloads)), LOOK_ROWS)
    forgotten, jobs_behind, _ = _first(conn.execute(_jobs_behind(place.jobs, finished_before)), LOOK_ROWS)
    return Prunable(old, needless, forgotten), Place(payloads_behind, jobs_behind), more_old or more_needless


def delete(conn: sa.Connection, found: Prunable) -> None:
    """Carries out a step: the futures of deleted results are `expired`."""
    for statement, numbers in (
        (_DELETE_RESULTS, found.results),
        (_EXPIRE, found.results),
        (_DELETE_PAYLOADS, found.payloads),
        (_DELETE_JOBS, found.jobs),
    ):
        if numbers:
            statement(conn, {"numbers": listed(conn, numbers)})


def _old_results(finished_before: float) -> sa.Select[int, int, bool]:
    return (
        sa.select(jobs.c.number, sa.func.coalesce(sa.func.length(results.c.body), 0), sa.true())
        .outerjoin(results, results.c.number == jobs.c.number)
        .where(FINISHED, jobs.c.finished_at < finished_before)
        .order_by(jobs.c.finished_at)
        .limit(ROWS + 1)
    )


def _payloads_behind(after: int) -> sa.Select[int, int, bool]:
    page = (
        sa.select(payloads.c.number, sa.func.length(payloads.c.body).label("size"))
        .where(payloads.c.number > after)
        .order_by(payloads.c.number)
        .limit(LOOK_ROWS)
        .subquery()
    )
    is_needless = ~OPEN & (_IS_OVER | (jobs.c.seq <= models.c.recovery_seq) | jobs.c.category.is_not(None))
    return (
        sa.select(page.c.number, page.c.size, is_needless)
        .join(jobs, jobs.c.number == page.c.number)
        .outerjoin(models, models.c.id == jobs.c.subject)
        .order_by(page.c.number)
    )


def _jobs_behind(after: int, finished_before: float) -> sa.Select[int, int, bool]:
    page = (
        sa.select(jobs.c.number, jobs.c.subject, jobs.c.state, jobs.c.finished_at)
        .where(jobs.c.number > after)
        .order_by(jobs.c.number)
        .limit(LOOK_ROWS)
        .subquery()
    )
    is_old = (page.c.state == "expired") & (page.c.finished_at < finished_before - FORGET_SECONDS)
    has_payload = sa.exists().where(payloads.c.number == page.c.number)
    return (
        sa.select(page.c.number, sa.literal(0), is_old & _IS_OVER & ~has_payload)
        .select_from(page.outerjoin(models, models.c.id == page.c.subject))
        .order_by(page.c.number)
    )


def _first(rows: Iterable[tuple[int, int, bool]], page: int) -> tuple[list[int], int, bool]:
    """Of (number, bytes, whether it may go) the numbers that one step deletes.

    Also behind which number the next step looks, and whether there may be more; from the beginning if not.
    """
    chosen: list[int] = []
    total = looked_at = last = 0
    for number, size, may_go in rows:
        looked_at += 1
        if may_go:
            total += size
            if len(chosen) == ROWS or (chosen and total > LARGEST_BYTES):
                return chosen, last, True
            chosen.append(number)
        last = number
    is_full = looked_at == page
    return chosen, last if is_full else 0, is_full
