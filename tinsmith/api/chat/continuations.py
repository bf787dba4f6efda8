"""What news and results add to the tokens that a reader has got already, and whether they agree with them."""

from dataclasses import replace
from itertools import pairwise

from tinsmith.errors import TinsmithError
from tinsmith.wire.packing import SampleOutput
from tinsmith.wire.progress import Progress


def continue_with(given: list[int], part: Progress) -> Progress | None:
    """What `part` adds to the tokens given so far; nothing if some before it got lost (the result has them all).

    Raises TinsmithError if it contradicts them.
    """
    known = given[part.start :]
    if part.start > len(given) or len(part.tokens) <= len(known):
        _check_same(known[: len(part.tokens)], part.tokens)
        return None
    _check_same(known, part.tokens[: len(known)])
    given += part.tokens[len(known) :]
    new = slice(len(known), None)
    return replace(
        part,
        start=part.start + len(known),
        tokens=part.tokens[new],
        logprobs=part.logprobs[new],
        top_ids=part.top_ids[new],
        top_logprobs=part.top_logprobs[new],
    )


def rest_of(request_id: str, given: list[list[int]], output: SampleOutput) -> list[Progress]:
    """What the result adds to the tokens given so far, of every sample."""
    parts = (continue_with(given[index], part) for index, part in enumerate(samples_of(request_id, output)))
    return [part for part in parts if part is not None]


def samples_of(request_id: str, output: SampleOutput) -> list[Progress]:
    """All tokens of each sample."""
    ids, logprobs = output.extras.get("topk_sample_ids"), output.extras.get("topk_sample_logprobs")
    bounds = output.offsets.tolist()
    return [
        Progress(
            request_id,
            index,
            0,
            output.tokens_S[begin:end].tolist(),
            output.logprobs_S[begin:end].tolist(),
            [] if ids is None else ids[begin:end].tolist(),
            [] if logprobs is None else logprobs[begin:end].tolist(),
        )
        for index, (begin, end) in enumerate(pairwise(bounds))
    ]


def _check_same(given: list[int], again: list[int]) -> None:
    if given != again[: len(given)]:
        raise TinsmithError(
            "the engine was restarted, and what it sampled then differs from what was sent before (rounding may do "
            "that without --deterministic): this stream ends here; ask again"
        )
