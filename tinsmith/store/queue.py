"""The job queue, which is also the command log: every accepted operation, in order, with its result.

Functions take a connection inside a transaction (`Database.write`, `Database.read`), so that callers can do several
things in one. A request id is `"{subject}:{seq}"`; the unique (subject, seq) makes a retry the same job.

A job is `queued`, then `running`, then `done` or `failed`; it is `expired` once its result has been deleted, or nobody
waits for it any more. Only a job that ended in an error has a `category`, also when it has expired. Nothing here knows
what kinds of jobs mean.
"""

import json
import operator
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from tinsmith.store.prepared import Prepared
from tinsmith.store.tables import jobs, results, samplers, sessions
from tinsmith.store.tables import payloads as payloads_table
from tinsmith.wire.jobs import Future, Header, Job, Outcome, Past

TERMINAL = ("done", "failed", "expired")

_CHUNKS = 1000  # more chunks than any single call has

# Conditions are spelt out instead of parameters: only then do the databases use the partial indexes.
_QUEUED = sa.text("jobs.state = 'queued'")
_RUNNING = sa.text("jobs.state = 'running'")
OPEN = jobs.c.state.in_([sa.literal_column("'queued'"), sa.literal_column("'running'")])
FINISHED = sa.text("jobs.state IN ('done', 'failed')")

_HEADER = tuple(jobs.c[name] for name in ("number", "subject", "seq", "kind", "owner", "tokens", "created_at", "trace"))
_SUBJECT = sa.bindparam("of_subject", type_=sa.Text)
_SEQ = sa.bindparam("at_seq", type_=sa.BigInteger)
_NOW = sa.bindparam("now", type_=sa.Float)
_ERROR = sa.bindparam("with_error", type_=sa.Text)


def for_numbers(statement: sa.Select[Any] | sa.Update | sa.Delete, table: sa.Table) -> Prepared:
    """`statement` for the rows of `table` whose numbers are in the parameter `numbers`, made by `listed`."""
    as_json = sa.func.json_each(sa.bindparam("numbers", type_=sa.Text)).table_valued("value")
    as_array = sa.bindparam("numbers", type_=postgresql.ARRAY(sa.BigInteger))
    return Prepared(
        sqlite=statement.where(table.c.number.in_(sa.select(as_json.c.value))),
        postgresql=statement.where(table.c.number == sa.any_(as_array)),
    )


_ROW = (
    *("subject", "seq", "kind", "owner", "base", "tokens", "trace"),
    *("state", "error", "category", "created_at", "finished_at"),
)
_VALUES = {name: sa.bindparam(name, type_=jobs.c[name].type) for name in _ROW}
_PLACE = ["subject", "seq"]
_NEW_JOB = {
    name: dialect.insert(jobs).values(_VALUES).on_conflict_do_nothing(index_elements=_PLACE).returning(jobs.c.number)
    for name, dialect in (("sqlite", sqlite), ("postgresql", postgresql))
}
_ADD_JOB = Prepared(**_NEW_JOB)
_ADD_PAYLOAD = Prepared(any=sa.insert(payloads_table))
_ADDED = _NEW_JOB["postgresql"].cte("added")
_BODY = sa.bindparam("body", type_=sa.LargeBinary)
_ADD_JOB_WITH_PAYLOAD = Prepared(
    postgresql=sa.insert(payloads_table).from_select(["number", "body"], sa.select(_ADDED.c.number, _BODY))
)
_ADD_RESULT = Prepared(any=sa.insert(results))
_PAYLOADS = for_numbers(sa.select(payloads_table.c.number, payloads_table.c.body), payloads_table)


def _claiming(*passed_over: sa.ColumnElement[bool]) -> sa.Update:
    picked = (
        sa.select(jobs.c.number)
        .where(jobs.c.base == sa.bindparam("of_base", type_=sa.Text), _QUEUED, *(~which for which in passed_over))
        .order_by(jobs.c.number)
        .limit(sa.bindparam("at_most", type_=sa.Integer))
        .with_for_update(skip_locked=True)
        .cte("picked")
    )
    return (
        sa.update(jobs)
        .where(jobs.c.number.in_(sa.select(picked.c.number)))
        .values(state="running", engine=sa.bindparam("by_engine", type_=sa.Text))
        .returning(*_HEADER)
    )


_CROWDED_JSON = sa.func.json_each(sa.bindparam("crowded", type_=sa.Text)).table_valued("value")
_CROWDED_ARRAY = sa.bindparam("crowded", type_=postgresql.ARRAY(sa.Text))
_IS_SAMPLE = jobs.c.kind == sa.literal_column("'sample'")
_CLAIM = Prepared(any=_claiming())
_CLAIM_BUT = Prepared(
    sqlite=_claiming(_IS_SAMPLE & jobs.c.owner.in_(sa.select(_CROWDED_JSON.c.value))),
    postgresql=_claiming(_IS_SAMPLE & (jobs.c.owner == sa.any_(_CROWDED_ARRAY))),
)
_FINISH = for_numbers(
    sa.update(jobs)
    .where(OPEN)
    .values(state="done", finished_at=_NOW)
    .returning(jobs.c.number, jobs.c.subject, jobs.c.seq),
    jobs,
)
_FAIL = Prepared(
    any=sa.update(jobs)
    .where(jobs.c.number == sa.bindparam("of_number", type_=sa.BigInteger), OPEN)
    .values(state="failed", finished_at=_NOW, error=_ERROR, category=sa.bindparam("whose_fault", type_=sa.Text))
    .returning(jobs.c.number, jobs.c.subject, jobs.c.seq)
)
_FIND = Prepared(
    any=sa.select(jobs.c.kind, jobs.c.owner, jobs.c.state, results.c.body, jobs.c.error, jobs.c.category, jobs.c.trace)
    .select_from(jobs.outerjoin(results, results.c.number == jobs.c.number))
    .where(jobs.c.subject == _SUBJECT, jobs.c.seq == _SEQ)
)
_PAST = (
    sa.select(*_HEADER, jobs.c.state, jobs.c.category, jobs.c.engine)
    .where(jobs.c.subject == _SUBJECT, jobs.c.seq >= _SEQ)
    .order_by(jobs.c.seq)
)
_ARRIVALS = (
    sa.select(jobs.c.seq, jobs.c.number)
    .where(jobs.c.subject == _SUBJECT, jobs.c.seq.between(sa.bindparam("first"), sa.bindparam("last")))
    .order_by(jobs.c.seq)
)
_ENDED = for_numbers(sa.select(jobs.c.number).where(~OPEN), jobs)
_OVER = "SELECT jobs.subject, jobs.seq FROM {} AND jobs.state NOT IN ('queued', 'running')"
_ARE_OVER = Prepared(
    sqlite=sa.text(
        _OVER.format(
            "json_each(:places) AS place CROSS JOIN jobs "
            "ON jobs.subject = json_extract(place.value, '$[0]') AND jobs.seq = json_extract(place.value, '$[1]')"
        )
    ),
    postgresql=sa.text(
        _OVER.format(
            "unnest(CAST(:subjects AS text[]), CAST(:seqs AS bigint[])) AS place (subject, seq) JOIN jobs "
            "ON jobs.subject = place.subject AND jobs.seq = place.seq"
        )
    ),
)


def submit(conn: sa.Connection, job: Job) -> str:
    """Adds a job; the same (subject, seq) again changes nothing. Returns the request id."""
    row = _row(job, "queued")
    if conn.dialect.name == "postgresql":  # one round trip instead of two
        _ADD_JOB_WITH_PAYLOAD(conn, row | {"body": job.body})
    elif added := _ADD_JOB(conn, row):
        _ADD_PAYLOAD(conn, {"number": added[0][0], "body": job.body})
    return job.request_id


def reject(conn: sa.Connection, job: Job, error: str) -> None:
    """Marks a refused request's seq as consumed, so that the next ones do not wait for it. Keeps no payload."""
    _ADD_JOB(conn, _row(job, "failed") | {"error": _storable(error), "category": "user", "finished_at": time.time()})


def claim(conn: sa.Connection, base: str, engine: str, limit: int, crowded: Sequence[str] = ()) -> list[Header]:
    """Takes up to `limit` queued jobs, oldest first, as running under `engine`.

    Samples of the owners in `crowded` stay queued.
    """
    statement = _CLAIM_BUT if crowded else _CLAIM
    values = {"of_base": base, "by_engine": engine, "at_most": limit}
    rows = statement(conn, values | ({"crowded": listed(conn, crowded)} if crowded else {}))
    return sorted((Header(*row) for row in rows), key=lambda header: header.number)


def release(conn: sa.Connection, base: str, engine: str | None = None) -> int:
    """Makes every running job of `base` queued again: what a starting engine does with a dead one's work.

    Or those of one engine, which goes.
    """
    statement = sa.update(jobs).where(jobs.c.base == base, _RUNNING).values(state="queued", engine=None)
    if engine is not None:
        statement = statement.where(jobs.c.engine == engine)
    return conn.execute(statement).rowcount


def payloads(conn: sa.Connection, numbers: Sequence[int]) -> dict[int, bytes]:
    """The packed requests of these jobs."""
    return dict(_PAYLOADS(conn, {"numbers": listed(conn, numbers)}))


def complete(conn: sa.Connection, outcomes: Sequence[Outcome]) -> list[str]:
    """Ends running (or queued) jobs with their results or errors; leaves jobs alone that have ended already.

    Returns the request ids whose waiters are to be rung.
    """
    now = time.time()
    bodies = {outcome.number: outcome.body for outcome in outcomes if outcome.error is None}
    ended = _FINISH(conn, {"numbers": listed(conn, bodies), "now": now}) if bodies else []
    stored = [{"number": number, "body": body} for number, _, _ in ended if (body := bodies[number]) is not None]
    if stored:
        _ADD_RESULT.many(conn, stored)
    for outcome in outcomes:
        if outcome.error is not None:
            ended += _FAIL(conn, _failure(outcome.number, outcome.error, outcome.category, now))
    return [f"{subject}:{seq}" for _, subject, seq in ended]


def give_up(conn: sa.Connection, subject: str, seq: int) -> list[str]:
    """Ends a queued or running job without a result, as if it had expired.

    For samplers only: a model's seqs belong to its history. Returns the request ids, for whoever runs them.
    """
    return _expire(conn, (jobs.c.subject == subject) & (jobs.c.seq == seq))


def give_up_session(conn: sa.Connection, session_id: str) -> list[str]:
    """`give_up` for the jobs of all samplers of a session."""
    return _expire(conn, jobs.c.subject.in_(sa.select(samplers.c.id).where(samplers.c.session_id == session_id)))


def give_up_silent(conn: sa.Connection, base: str, since: float) -> list[str]:
    """`give_up` for the jobs, older than that time, of all samplers whose clients have been silent since."""
    is_silent = sa.exists().where(
        samplers.c.id == jobs.c.subject, sessions.c.id == samplers.c.session_id, sessions.c.seen_at < since
    )
    return _expire(conn, (jobs.c.base == base) & (jobs.c.created_at < since) & is_silent)


def _expire(conn: sa.Connection, which: sa.ColumnElement[bool]) -> list[str]:
    statement = sa.update(jobs).where(which).values(state="expired", finished_at=time.time())
    returning = statement.returning(jobs.c.subject, jobs.c.seq)
    return [
        f"{subject}:{seq}" for state in (_QUEUED, _RUNNING) for subject, seq in conn.execute(returning.where(state))
    ]


def ended(conn: sa.Connection, numbers: Sequence[int]) -> list[int]:
    """Those of these jobs that are over."""
    return [number for (number,) in _ENDED(conn, {"numbers": listed(conn, numbers)})]


def are_over(conn: sa.Connection, request_ids: Sequence[str]) -> list[str]:
    """Those of these requests that have ended."""
    places = [place for request_id in request_ids if (place := _place_of(request_id)) is not None]
    if conn.dialect.name == "postgresql":
        values: dict[str, Any] = {"subjects": [subject for subject, _ in places], "seqs": [seq for _, seq in places]}
    else:
        values = {"places": json.dumps(places)}
    return [f"{subject}:{seq}" for subject, seq in _ARE_OVER(conn, values)]


def find(conn: sa.Connection, request_id: str) -> Future | None:
    """A job's state and, when done, its result."""
    place = _place_of(request_id)
    if place is None:
        return None
    subject, seq = place
    rows = _FIND(conn, {"of_subject": subject, "at_seq": seq})
    return Future(f"{subject}:{seq}", *rows[0]) if rows else None


def history(conn: sa.Connection, subject: str, after: int) -> list[Past]:
    """The jobs of a model behind seq `after` that have ended, in order, up to the first that has not (or is missing).

    Their payloads exist from the model's recovery point on, if they were done. A result that has expired makes no
    difference here.
    """
    ended: list[tuple[Header, str | None, bool]] = []
    for *header, state, category, engine in conn.execute(_PAST, {"of_subject": subject, "at_seq": after + 1}):
        if state not in TERMINAL or header[2] != after + 1 + len(ended):
            break
        ended.append((Header(*header), category, engine is not None))
    chunked = _chunked(conn, subject, [header.seq for header, _, _ in ended])
    return [Past(header, category, ran, header.seq in chunked) for header, category, ran in ended]


def was_chunked(conn: sa.Connection, subject: str, seq: int) -> bool:
    """Whether a neighbour's arrival shows that this request was one chunk of a larger call."""
    return seq in _chunked(conn, subject, [seq])


def _place_of(request_id: str) -> tuple[str, int] | None:
    """Subject and seq, of what can be a request's id."""
    subject, _, seq = request_id.rpartition(":")
    if not (seq.isascii() and seq.isdigit() and len(seq) < 19 and "\0" not in subject):
        return None
    return subject, int(seq)


def _row(job: Job, state: str) -> dict[str, object]:
    return {
        "subject": job.subject,
        "seq": job.seq,
        "kind": job.kind,
        "owner": job.owner,
        "base": job.base,
        "tokens": job.tokens,
        "trace": job.trace,
        "state": state,
        "error": None,
        "category": None,
        "created_at": time.time(),
        "finished_at": None,
    }


def _chunked(conn: sa.Connection, subject: str, seqs: Sequence[int]) -> set[int]:
    """Those of `seqs` (ascending) that were chunks of larger calls.

    Clients send a call's later chunks before its first one, and everything else in order of seq. So a later chunk has
    a lower seq that arrived after it, and a first chunk has a higher one that arrived before it.
    """
    if not seqs:
        return set()
    span = {"of_subject": subject, "first": seqs[0] - _CHUNKS, "last": seqs[-1] + _CHUNKS}
    arrivals = [(seq, number) for seq, number in conn.execute(_ARRIVALS, span)]
    overtaken = _overtaken(arrivals, operator.gt) | _overtaken(arrivals[::-1], operator.lt)
    return overtaken.intersection(seqs)


def _overtaken(arrivals: list[tuple[int, int]], is_beyond: Callable[[int, int], bool]) -> set[int]:
    """The seqs whose number some earlier entry of `arrivals` lies beyond."""
    found: set[int] = set()
    farthest = arrivals[0][1] if arrivals else 0
    for seq, number in arrivals:
        if is_beyond(farthest, number):
            found.add(seq)
        else:
            farthest = number
    return found


def _failure(number: int, error: str, category: str | None, now: float) -> dict[str, object]:
    return {"of_number": number, "with_error": _storable(error), "whose_fault": category or "server", "now": now}


def _storable(text: str) -> str:
    """`text` as both databases can hold it: an error must never be lost for quoting a strange character."""
    return text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()


def listed(conn: sa.Connection, values: Iterable[int] | Iterable[str]) -> list[int] | list[str] | str:
    """Any number of numbers, or of names, as one parameter."""
    listed: Any = list(values)
    return listed if conn.dialect.name == "postgresql" else json.dumps(listed)
