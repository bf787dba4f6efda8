"""When a sampled sequence ends: stop tokens, and stop strings in the text of its tokens.

Knows a tokenizer's `decode` and nothing of models. A sequence is checked after every token; the token that completes
a stop string stays whole.
"""

from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "\ufffd"  # what decoding shows for an incomplete character
_MARGIN = 4  # further tokens decoded before a possible match, where a decoder may treat the beginning specially


class StopStrings:
    """Finds stop strings that end with the newest token, across token and character boundaries."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def found(self, strings: Sequence[str], tokens: Sequence[int]) -> bool:
        """Whether the last of `tokens` (the sampled ones alone) completed one of `strings`.

        Most tokens are settled by their own text: they lack every string's last character.
        """
        if not self._may_complete(strings, tokens[-1]):
            return False
        longest = max(len(string.encode()) for string in strings)  # a token holds a byte at least
        text = self._decode(tokens[-longest - _MARGIN :])
        return any(string in text for string in strings)

    def _may_complete(self, strings: Sequence[str], token: int) -> bool:
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = self._decode([token])
        if _REPLACEMENT in text:
            return True
        # Some decoders drop the white space of a token that stands alone.
        return any(string[-1] in text or string[-1].isspace() for string in strings)

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


def end_of_sequence_tokens(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """The ids that end a sequence by default: the model's generation configuration's, and the tokenizer's."""
    configured = generation_config.eos_token_id if generation_config is not None else None
    ids = configured if isinstance(configured, (list, tuple)) else [configured]
    return frozenset(token for token in (*ids, tokenizer.eos_token_id) if token is not None)
