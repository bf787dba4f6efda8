"""How a job ends: with what the backend returned, or with the error that running it raised. Knows no jobs' meaning."""

import logging
from collections.abc import Callable

from tinsmith.engine.trials import Trials
from tinsmith.errors import TinsmithError, UnavailableError
from tinsmith.lost_device import raise_if_lost
from tinsmith.wire.jobs import Header, Outcome, Usage
from tinsmith.wire.packing import SampleOutput, TrainOutput

log = logging.getLogger(__name__)


def attempt(trials: Trials, header: Header, action: Callable[[], None]) -> Exception | None:
    """Runs one job's action; its error is the job's alone, and returned. A job that engines have died of is not run.

    Raises UnavailableError (the store has failed) and DeviceLostError.
    """
    try:
        trials.check(header.number)
        action()
    except UnavailableError:
        raise
    except TinsmithError as error:
        return error
    except Exception as error:
        raise_if_lost(error)
        log.exception("job %s (%s) failed", header.request_id, header.kind)
        return error
    return None


def outcome_of(header: Header, result: TrainOutput | SampleOutput | TinsmithError) -> Outcome:
    """What the ledger is told about a job that trainer or sampler have run."""
    if isinstance(result, TinsmithError):
        return failed(header, result)
    return Outcome(header.number, result.to_bytes(), used=_usage(header, result))


def _usage(header: Header, result: TrainOutput | SampleOutput) -> Usage:
    if isinstance(result, TrainOutput):
        return Usage(header.owner, header.request_id, {"train": header.tokens})
    cached = result.cache_hit_tokens
    tokens = {"prefill": result.prompt_tokens - cached, "cached_prefill": cached, "sample": len(result.tokens_S)}
    return Usage(header.owner, header.request_id, tokens)


def failed(header: Header, error: Exception) -> Outcome:
    """What the ledger is told about a job that ended in an error; one that is not ours is the server's."""
    if isinstance(error, TinsmithError):
        return Outcome(header.number, error=str(error), category=error.category)
    message = f"{header.kind} failed on the server: {type(error).__name__}: {error}"
    return Outcome(header.number, error=message, category="server")


def category_of(error: Exception) -> str:
    """Whose fault it is: `user` or `server`."""
    return error.category if isinstance(error, TinsmithError) else "server"
