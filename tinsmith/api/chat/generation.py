"""From a prompt's tokens to sampled tokens, through the same queue as every other sample: submit, wait, read along.

A sample whose client hangs up is given up. Knows tokens, no texts and no wire format.
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass, replace

from starlette.requests import ClientDisconnect

from tinsmith.api.calls import Call
from tinsmith.api.chat.continuations import continue_with, rest_of
from tinsmith.api.chat.sessions import ChatSessions
from tinsmith.api.chat.streams import Inbox, TokenStreams
from tinsmith.api.chat.targets import Target
from tinsmith.errors import GoneError, TinsmithError, UnavailableError, UserError
from tinsmith.store import queue
from tinsmith.wire import sampling_types, types
from tinsmith.wire.jobs import Future, Job
from tinsmith.wire.packing import SampleOutput
from tinsmith.wire.progress import Progress
from tinsmith.wire.sample_codec import sample_call, sample_cost

_LEAVING = "the server is stopping; ask again"
_FIRST_LOOK_SECONDS, _LONGEST_LOOK_SECONDS = 1.0, 8.0  # these looks only make good for a lost ring


Reading = AsyncGenerator[Progress | SampleOutput | None, None]
"""Tokens as they come, the whole result at the end, and None where a while was nothing. To be closed."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One prompt and how to go on from it. `seed` None draws one; `max_tokens` None goes to the context's end."""

    prompt: list[int]
    samples: int = 1
    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    seed: int | None = None
    stops: tuple[str, ...] = ()
    top_logprobs: int = 0
    scores_prompt: bool = False  # of the prompt's tokens as well

    def to_request(self, sampler_id: str, seq: int) -> sampling_types.SampleRequest:
        return sampling_types.SampleRequest(
            prompt=sampling_types.ModelInput([sampling_types.EncodedText(self.prompt)]),
            sampling_params=sampling_types.SamplingParams(
                max_tokens=self.max_tokens,
                seed=self.seed,
                stop=list(self.stops) or None,
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
            ),
            sampling_session_id=sampler_id,
            seq_id=seq,
            num_samples=self.samples,
            topk_sample_logprobs=self.top_logprobs,
            prompt_logprobs=self.scores_prompt,
            topk_prompt_logprobs=self.top_logprobs if self.scores_prompt else 0,
        )


class Generation:
    """What the handlers of one API process sample with."""

    def __init__(self, streams: TokenStreams) -> None:
        self._streams = streams
        self._sessions = ChatSessions()

    async def sample(self, call: Call, target: Target, ask: Ask) -> SampleOutput:
        """All samples, once they have ended. Raises UserError, ClientDisconnect, and what the engine failed with."""
        job = await self._job(call, target, ask, stream=False)
        await self._submit(call, job)
        waiting = asyncio.create_task(self._result(call, job))
        gone = asyncio.create_task(_hung_up(call))
        try:
            await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise ClientDisconnect
            return waiting.result()
        finally:
            gone.cancel()
            if not waiting.done():
                waiting.cancel()
                await _give_up(call, job)

    async def read(self, call: Call, target: Target, ask: Ask) -> Reading:
        """Submits, and reads along. Raises UserError for what cannot be sampled.

        The Reading raises what the engine failed with, and TinsmithError if a repetition after a crash goes another way
        than what it has given. Closing it before its end gives the samples up.
        """
        job = await self._job(call, target, ask, stream=True)
        inbox = await self._streams.open(job.request_id)
        try:
            await self._submit(call, job)
        except BaseException:
            self._streams.close(job.request_id)
            raise
        return self._follow(call, job, inbox, [[] for _ in range(ask.samples)])

    async def _follow(self, call: Call, job: Job, inbox: Inbox, given: list[list[int]]) -> Reading:
        patience, ended = _FIRST_LOOK_SECONDS, False
        try:
            while True:
                rung = await inbox.wait(patience)
                await self._sessions.keep(call)
                news, is_over = inbox.take()
                for part in news:
                    if new := continue_with(given[part.index], part):
                        yield new
                if is_over or not rung:
                    output = await self._look(call, job.request_id)
                    if output is not None:
                        ended = True
                        for new in rest_of(job.request_id, given, output):
                            yield new
                        yield output
                        return
                if call.services.waiters.is_leaving:
                    raise UnavailableError(_LEAVING)
                if not rung:
                    patience = min(2 * patience, _LONGEST_LOOK_SECONDS)
                    yield None
        finally:
            self._streams.close(job.request_id)
            if not ended:
                await _give_up(call, job)

    async def _job(self, call: Call, target: Target, ask: Ask, *, stream: bool) -> Job:
        """Checked, counted, and not submitted yet. Raises UserError, BusyError."""
        limits = call.services.limits(target.base)
        request = ask.to_request("", 0)
        packed = replace(sample_call(request, limits), stop_at_eos=True, stream=stream)
        tokens = sample_cost(packed, limits.max_context)
        sampler_id = await self._sessions.sampler(call, target)
        seq = secrets.randbelow(types.MAX_SEQ)
        job = Job(sampler_id, seq, "sample", call.owner, target.base, packed.to_bytes(), tokens, call.trace)
        await call.admit(job.subject, job.seq, len(job.body), tokens, ordered=False)
        return job

    async def _submit(self, call: Call, job: Job) -> None:
        await call.services.database.write_async(queue.submit, job)
        call.accepted(job.request_id)
        call.services.doorbell.ring("jobs")

    async def _result(self, call: Call, job: Job) -> SampleOutput:
        patience = _FIRST_LOOK_SECONDS
        with call.services.waiters.watch(job.request_id) as rung:
            while True:
                rung.clear()  # before the look: what rings during it is not lost
                output = await self._look(call, job.request_id)
                if output is not None:
                    return output
                with suppress(TimeoutError):
                    async with asyncio.timeout(patience):
                        await rung.wait()
                if call.services.waiters.is_leaving:
                    await _give_up(call, job)
                    raise UnavailableError(_LEAVING)
                await self._sessions.keep(call)
                patience = min(2 * patience, _LONGEST_LOOK_SECONDS)

    async def _look(self, call: Call, request_id: str) -> SampleOutput | None:
        """The result, if the job has ended. Raises what it failed with."""
        future = await call.services.database.read_async(queue.find, request_id)
        if future is not None and future.state not in queue.TERMINAL:
            return None
        return _output(future)


async def _hung_up(call: Call) -> None:
    """Returns when the client is gone. Its body must have been read."""
    while (await call.request.receive())["type"] != "http.disconnect":
        pass


async def _give_up(call: Call, job: Job) -> None:
    given_up = await call.services.database.write_async(queue.give_up, job.subject, job.seq)
    call.services.doorbell.ring("jobs", given_up)
    call.services.doorbell.ring("done", given_up)


def _output(future: Future | None) -> SampleOutput:
    if future is None or future.state == "expired":
        raise GoneError("the samples were given up: their session was finished, or the server was away for too long")
    if future.state == "failed":
        raise (UserError if future.category == "user" else TinsmithError)(future.error or "failed")
    return SampleOutput.from_bytes(future.body or b"")
