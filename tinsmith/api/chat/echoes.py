"""A prompt as a part of its completion, with the log-probability of each of its tokens: how evaluations score texts."""

from dataclasses import dataclass, replace

import numpy as np

from tinsmith.api.chat.vocabulary import Vocabulary
from tinsmith.wire.packing import SampleOutput
from tinsmith.wire.progress import Progress


@dataclass(frozen=True, slots=True)
class Echo:
    """What an answer repeats of its request: a prompt that was given as a text, or (`text` None) as tokens."""

    text: str | None
    tokens: list[int]

    def read(self, words: Vocabulary) -> str:
        return words.decode(self.tokens, specials=True) if self.text is None else self.text

    def before(self, sample: Progress, output: SampleOutput) -> Progress:
        """The sample with the prompt in front of it, and what `output` says of the prompt: NaN for the first token."""
        extras = output.extras
        logprobs = extras["prompt_logprobs"].tolist() if "prompt_logprobs" in extras else []
        top_ids, top_logprobs = (
            [[], *extras[name][1:].tolist()] if name in extras else []
            for name in ("topk_prompt_ids", "topk_prompt_logprobs")
        )
        return replace(
            sample,
            tokens=self.tokens + sample.tokens,
            logprobs=logprobs + sample.logprobs,
            top_ids=top_ids + sample.top_ids,
            top_logprobs=top_logprobs + sample.top_logprobs,
        )


def without_samples(output: SampleOutput) -> SampleOutput:
    """What is said of the prompt only, as if nothing had been sampled."""
    extras = {name: array for name, array in output.extras.items() if not name.startswith("topk_sample")}
    return replace(
        output,
        tokens_S=output.tokens_S[:0],
        logprobs_S=output.logprobs_S[:0],
        offsets=np.zeros_like(output.offsets),
        stopped=np.zeros_like(output.stopped),
        extras=extras,
    )
