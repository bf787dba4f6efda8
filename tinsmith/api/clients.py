"""Clients that share a sampler: a number for each of them, and news of the ends of all its samples at once."""

import time

from starlette.responses import Response

from tinsmith.api.calls import Call, answer
from tinsmith.api.turns import key_sent
from tinsmith.api.waiting import wait_for_ring
from tinsmith.store import clients, completions, records
from tinsmith.wire import accounts

_LOOK_SECONDS = 4.0  # the doorbell wakes us; looks at the database in between make good for a lost ring
_SECOND = 1_000_000  # cursors are microseconds since the epoch


async def join_sampling_session(call: Call) -> Response:
    """POST /join_sampling_session: a number for a client that did not make the sampler; its samples begin with it."""
    body = await call.json(accounts.JoinSamplingSessionRequest)
    database = call.services.database
    sampler = await database.read_async(records.require_sampler, body.sampling_session_id, call.owner)
    number = await database.write_async(clients.join, sampler.id)
    return answer(accounts.JoinSamplingSessionResponse(number))


async def retrieve_futures(call: Call) -> Response:
    """POST /retrieve_futures: which of a client's samples have ended since its last question, waiting for the first.

    Results stay where they are, for `retrieve_future`, also those that the client says it has got.
    """
    body = await call.json(accounts.RetrieveFuturesRequest)
    services, target = call.services, body.target
    sampler = await services.database.read_async(records.require_sampler, target.sampling_session_id, call.owner)
    longest = services.settings.poll_seconds
    deadline = time.monotonic() + (longest if body.timeout is None else min(body.timeout, longest))
    with services.waiters.watch(sampler.id) as rung:
        while True:
            rung.clear()
            ends = await services.database.read_async(
                completions.ended_since, sampler.id, target.cloned_sampler_id, body.prev_cursor / _SECOND
            )
            remaining = deadline - time.monotonic()
            if ends or remaining <= 0 or services.waiters.is_leaving:
                return answer(_told(ends, body.prev_cursor))
            await wait_for_ring(rung, min(_LOOK_SECONDS, remaining))
            # All clients of the sampler have woken.
            await services.turns.take(key_sent(call.request.scope), sampler.session_id)


def _told(ends: list[completions.End], cursor: int) -> accounts.RetrieveFuturesResponse:
    told = [
        accounts.Completion(end.request_id, "finished" if end.state == "done" else "failed", end.size) for end in ends
    ]
    if ends:
        cursor = max(cursor, int(ends[-1].finished_at * _SECOND) + 1)
    return accounts.RetrieveFuturesResponse(told, cursor)
