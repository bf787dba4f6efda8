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
        length, text = 0, self.text or ""
        for token in self.tokens if self.text is not None else ():
            shown = words.token_bytes(token).decode(errors="replace")
            if not words.is_special(token) or text.startswith(shown):
                return length + (shown.startswith(" ") and not text.startswith(" "))
            length += len(shown)
        return length

    def before(self, sample: Progress, output: SampleOutput) -> Progress:
        """The sample with the prompt in front of it, and what `output` says of the prompt: NaN for the first token.

        Whoever finds a token in the list of the likeliest finds it with the number that the token itself has: clients
        compare them, and the engine's two ways to compute it may differ in their last bits.
        """
        extras = output.extras
        logprobs_P = extras.get("prompt_logprobs")
        if logprobs_P is None:
            return replace(sample, tokens=self.tokens + sample.tokens)
        top_ids, top_logprobs = sample.top_ids, sample.top_logprobs
        if "topk_prompt_ids" in extras:
            ids_Pk, values_Pk = extras["topk_prompt_ids"], extras["topk_prompt_logprobs"]
            agreed_Pk = np.where(ids_Pk == np.array(self.tokens)[:, None], logprobs_P[:, None], values_Pk)
            top_ids, top_logprobs = [[], *ids_Pk[1:].tolist(), *top_ids], [[], *agreed_Pk[1:].tolist(), *top_logprobs]
        return replace(
            sample,
            tokens=self.tokens + sample.tokens,
            logprobs=logprobs_P.tolist() + sample.logprobs,
            top_ids=top_ids,
            top_logprobs=top_logprobs,
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
