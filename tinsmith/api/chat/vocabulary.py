"""A base model's tokenizer and chat template as files say them, without torch: texts to tokens, and back.

Knows nothing of requests. Reads `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json` and
`chat_template.jinja` of the model's folder.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tinsmith.api.chat.templates import ChatTemplate
from tinsmith.errors import UnavailableError, UserError

_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Vocabulary:
    """One tokenizer. Thread-safe; `encode` and `decode` let other threads run."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError for a model without the files that this takes."""
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise UserError(
                "this model has no tokenizer.json, so texts cannot be read here; use the Tinker API with token ids"
            )
        self._tokenizer = Tokenizer.from_file(str(file))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._config = _read(folder / "tokenizer_config.json") | _read(folder / "special_tokens_map.json")
        self._source = _template_source(folder, self._config)

    @cached_property
    def template(self) -> ChatTemplate:
        """Raises UserError if the model has none."""
        if self._source is None:
            raise UserError("this model has no chat template; use completions with a prompt of your own")
        return ChatTemplate(self._source, self._special_texts())

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """The text's tokens; with `specials` also those that the tokenizer puts around a text (a beginning, say)."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=specials).ids
        return ids

    def decode(self, tokens: Sequence[int], *, specials: bool = False) -> str:
        """The tokens' text, special ones left out unless `specials`. Incomplete characters read as U+FFFD."""
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=not specials)
        return text

    def is_special(self, token: int) -> bool:
        return token in self._special_ids

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for, also if it is a part of a character only."""
        piece: str | None = self._tokenizer.id_to_token(token)
        if piece is None or token in self._added:
            return (piece or "").encode()
        if self._is_byte_level:
            return bytes(_BYTES[character] for character in piece)
        if len(piece) == 6 and piece.startswith("<0x"):
            return bytes.fromhex(piece[3:5])
        alone = self.decode([token], specials=True)
        # Some decoders leave out the space with which a text begins: the token has it where it is the second one.
        return self.decode([token, token], specials=True)[len(alone) :].encode()

    @cached_property
    def longest_token(self) -> int:
        """Bytes of the longest token: so many times a context's length is the longest text that can fit."""
        return max(len(piece.encode()) for piece in self._tokenizer.get_vocab())

    @cached_property
    def _added(self) -> dict[int, Any]:
        return dict(self._tokenizer.get_added_tokens_decoder())

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(token for token, added in self._added.items() if added.special)

    @cached_property
    def _is_byte_level(self) -> bool:
        decoder = json.loads(self._tokenizer.to_str())["decoder"] or {}
        return "ByteLevel" in (decoder.get("type"), *(part["type"] for part in decoder.get("decoders", ())))

    def _special_texts(self) -> dict[str, str]:
        found = {name: self._config.get(name) for name in _NAMES}
        texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
        return {name: text for name, text in texts.items() if isinstance(text, str)}


def vocabulary_folder(place: str) -> Path:
    """The folder of a model's tokenizer: `place` itself, or where a hub model was fetched to.

    Raises UnavailableError while the engine has not fetched it.
    """
    if Path(place).is_dir():
        return Path(place)
    # Only here: it takes as much memory as everything else in this module.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(place, local_files_only=True, allow_patterns=["tokenizer*"]))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise UnavailableError(f"the files of {place} are not on this machine (yet); try again soon") from error


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def _template_source(folder: Path, config: dict[str, Any]) -> str | None:
    """The template in a file of its own, or in the tokenizer's configuration; of several, the default one."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text()
    source = config.get("chat_template")
    if isinstance(source, list):
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    return source


def _byte_characters() -> dict[str, int]:
    """The characters by which byte-level vocabularies spell bytes: printable ones themselves, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    spelt = {chr(byte): byte for byte in printable}
    return spelt | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_characters()
