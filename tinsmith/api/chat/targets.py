"""Which weights a request's `model` names: a base model, a checkpoint, or `BASE;CHECKPOINT`. Never anything else.

Also the one list of what may be named.
"""

from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool

from tinsmith.api.calls import Call
from tinsmith.api.chat.vocabulary import Vocabulary, vocabulary_folder
from tinsmith.api.paths import SCHEME, parse_path
from tinsmith.errors import NotFoundError, UserError
from tinsmith.protocols import BASE_SNAPSHOT
from tinsmith.store import records

_LISTED = 100  # of the caller's newest checkpoints


@dataclass(frozen=True, slots=True)
class Target:
    """What is sampled from. `base` is the key of its engine, `base_name` what the client called the base model."""

    base: str
    base_name: str
    snapshot: str
    model_id: str | None


@dataclass(frozen=True, slots=True)
class Named:
    """One entry of the list. `created_at` in seconds since the epoch, `context` in tokens."""

    name: str
    created_at: float
    context: int


class Vocabularies:
    """The tokenizers that have been asked for, each loaded once."""

    def __init__(self) -> None:
        self._loaded: dict[str, Vocabulary] = {}

    async def find(self, call: Call, base: str) -> Vocabulary:
        """A served model's. Raises UserError, UnavailableError."""
        place = call.services.catalog.tokenizer(base)
        if place not in self._loaded:
            self._loaded[place] = await run_in_threadpool(_load, place)
        return self._loaded[place]


def _load(place: str) -> Vocabulary:
    return Vocabulary(vocabulary_folder(place))


async def resolve(call: Call, name: str) -> Target:
    """Raises NotFoundError for a model that is not served, or a checkpoint that is not there (any more); UserError."""
    base_name, separator, path = name.rpartition(";")
    if not separator and not name.startswith(SCHEME):
        return Target(_require_served(call, name), name, BASE_SNAPSHOT, None)
    checkpoint = await _require_checkpoint(call, path)
    if separator and _require_served(call, base_name) != checkpoint.base:
        raise UserError(f"{path} belongs to base model {checkpoint.base_name!r}, not to {base_name!r}")
    return Target(checkpoint.base, base_name or checkpoint.base_name, checkpoint.path, checkpoint.model_id)


def _require_served(call: Call, name: str) -> str:
    try:
        return call.services.catalog.require(name).base
    except UserError as error:
        raise NotFoundError(str(error)) from error  # which is what clients of these dialects expect


async def _require_checkpoint(call: Call, text: str) -> records.Checkpoint:
    path = parse_path(text)
    checkpoint = await call.services.database.read_async(records.require_checkpoint, str(path), call.owner)
    call.services.catalog.require_base(checkpoint.base, str(path))
    return checkpoint


async def list_named(call: Call, began_at: float) -> list[Named]:
    """The served names, then the caller's newest checkpoints for sampling. `began_at` is the server's start.

    Raises UnavailableError while an engine has not said what it takes.
    """
    catalog = call.services.catalog
    contexts = catalog.contexts()
    page, _ = await call.services.database.read_async(records.list_checkpoints, call.owner, _LISTED, 0)
    served = [Named(name, began_at, context) for base, context in contexts.items() for name in catalog.names(base)]
    mine = [one for one in page if one.kind == "sampler" and one.base in contexts]
    return served + [Named(one.path, one.created_at, contexts[one.base]) for one in mine]
