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

    def front(self, words: Vocabulary) -> int:
        """How many characters of its tokens' texts come before the text: what a tokenizer puts there by itself."""
        if self.text is None:
            return 0
        length = 0
        for token in self.tokens:
            shown = words.token_bytes(token).decode(errors="replace")
            if not words.is_special(token) or self.text.startswith(shown):
                return length + (shown.startswith(" ") and not self.text.startswith(" "))
            length += len(shown)
        return length

    def scored(self, output: SampleOutput) -> Progress:
        """Its tokens with what `output` says of them, if anything: NaN for the first.

        Whoever finds a token in the list of the likeliest finds it with the number that the token itself has: clients
        compare them, and the engine's two ways to compute it may differ in their last bits.
        """
        prompt = Progress("", 0, 0, self.tokens, [], [], [])
        logprobs_P = output.extras.get("prompt_logprobs")
        if logprobs_P is None:
            return prompt
        prompt = replace(prompt, logprobs=logprobs_P.tolist())
        if "topk_prompt_ids" not in output.extras:
            return prompt
        ids_Pk, values_Pk = output.extras["topk_prompt_ids"], output.extras["topk_prompt_logprobs"]
        agreed_Pk = np.where(ids_Pk == np.array(self.tokens)[:, None], logprobs_P[:, None], values_Pk)
        return replace(prompt, top_ids=[[], *ids_Pk[1:].tolist()], top_logprobs=[[], *agreed_Pk[1:].tolist()])


def joined(prompt: Progress, sample: Progress) -> Progress:
    """A sample with its prompt in front of it."""
    return replace(
        sample,
        tokens=prompt.tokens + sample.tokens,
        logprobs=prompt.logprobs + sample.logprobs,
        top_ids=prompt.top_ids + sample.top_ids,
        top_logprobs=prompt.top_logprobs + sample.top_logprobs,
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
