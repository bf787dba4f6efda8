"""retrieve_future: holds the request until its job has ended, then gives the result in the form its kind has."""

import logging
import time

from starlette.responses import Response

from tinsmith.api.bodies import compute
from tinsmith.api.calls import Call, answer
from tinsmith.api.observation import answer_for
from tinsmith.api.turns import key_sent
from tinsmith.api.waiting import wait_for_ring
from tinsmith.errors import GoneError, NotFoundError
from tinsmith.observe import REQUESTS, note
from tinsmith.store import backlog, queue
from tinsmith.store.backlog import Waiting
from tinsmith.wire.codec import encode_train_output
from tinsmith.wire.jobs import Future
from tinsmith.wire.packing import SampleOutput, TrainOutput
from tinsmith.wire.sample_codec import encode_sample_output
from tinsmith.wire.service_types import RequestFailed, RetrieveFutureRequest, TryAgain

PROTOBUF = "application/x-protobuf"


async def retrieve_future(call: Call) -> Response:
    """POST /retrieve_future. After `poll_seconds` without a result: 408, which clients answer by asking again."""
    body = await call.json(RetrieveFutureRequest)
    future = await ended(call, body.request_id)
    if future is None and call.services.waiters.is_leaving:
        return answer(TryAgain(body.request_id, "paused_capacity", "the server is stopping"), 408)
    if future is None:
        return await _try_again(call, body.request_id)
    answer_for(call.request, future.trace)
    note(REQUESTS, logging.INFO, "answered", trace=future.trace, request=future.request_id, state=future.state)
    return await compute(len(future.body or b""), _result, future)


async def ended(call: Call, request_id: str) -> Future | None:
    """The job once it has ended; None if that takes longer than a request is held, or the process ends before.

    Raises NotFoundError.
    """
    services = call.services
    deadline = time.monotonic() + services.settings.poll_seconds
    with services.waiters.watch(request_id) as rung:
        while True:
            rung.clear()  # before the look: what rings during it is not lost
            future = await services.database.read_async(queue.find, request_id)
            if future is None or future.owner != call.owner:
                raise NotFoundError(f"there is no request {request_id!r}")
            if future.state in queue.TERMINAL:
                return future
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return None
            await wait_for_ring(rung, remaining)
            if services.waiters.is_leaving:  # without a turn, or another look: there may be thousands, and no time
                return None
            await services.turns.take(key_sent(call.request.scope), request_id.partition(":")[0])


def _result(future: Future) -> Response:
    if future.state == "expired":
        raise GoneError(f"the result of {future.request_id!r} has expired, or its client gave it up")
    if future.state == "failed":
        return answer(RequestFailed(future.error or "failed", future.category or "unknown"))
    body = future.body or b""
    if future.kind in ("forward", "forward_backward"):
        return Response(encode_train_output(TrainOutput.from_bytes(body)), media_type=PROTOBUF)
    if future.kind == "sample":
        return Response(encode_sample_output(SampleOutput.from_bytes(body)), media_type=PROTOBUF)
    return Response(body, media_type="application/json")


async def _try_again(call: Call, request_id: str) -> Response:
    subject, _, seq = request_id.rpartition(":")
    base = await call.services.base_of(subject, call.owner)
    engine, progress = call.services.catalog.state_of(base)
    if engine != "ready":
        return answer(TryAgain(request_id, "paused_capacity", f"the engine is {engine}: {progress}"), 408)
    waiting = await call.services.database.read_async(backlog.waiting, subject, int(seq))
    if waiting is not None and waiting.kind == "sample" and waiting.is_queued:
        reason = f"the sampler is full; {waiting.others + waiting.own} requests are before this one"
        return answer(TryAgain(request_id, "paused_capacity", reason), 408)
    if seconds := call.services.pacing.debt(call.owner, call.caller.tokens_per_second):
        rate = f"this key's {call.caller.tokens_per_second:g} tokens per second are used up for {seconds:.0f} s"
        return answer(TryAgain(request_id, "paused_rate_limit", f"{rate}; {_progress(waiting)}"), 408)
    return answer(TryAgain(request_id, "active", _progress(waiting)), 408)


def _progress(waiting: Waiting | None) -> str:
    """Why a request has not ended while the engine works."""
    if waiting is None:
        return "the request has just ended"
    if waiting.missing:
        return "an earlier request of this model has not arrived, and this one waits for it"
    if waiting.own or waiting.others:
        return f"before it came, and have not ended, {waiting.own} requests of its own and {waiting.others} of others"
    return "it is being worked on"
