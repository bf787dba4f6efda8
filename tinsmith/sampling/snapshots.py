"""The published weights that a sampler samples from, by name; immutable, bounded by what they weigh.

Knows weights and their files; no requests.
"""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

from tinsmith.errors import NotFoundError, UserError
from tinsmith.models.loading import BaseModel
from tinsmith.models.weights import FullWeights, LoraWeights, load_weights, save_weights
from tinsmith.protocols import BASE_SNAPSHOT, Weights
from tinsmith.sampling.requests import Snapshot


class Snapshots:
    """The base model is one from the beginning, and remains."""

    def __init__(self, model: BaseModel, limit_bytes: int | None) -> None:
        """They should take at most so many bytes (None: any number)."""
        self._model = model
        self._limit = limit_bytes
        self._versions = count()
        self._by_id = {BASE_SNAPSHOT: Snapshot(BASE_SNAPSHOT, next(self._versions))}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_id)

    @property
    def taken_bytes(self) -> int:
        snapshots = list(self._by_id.values())  # a copy: others may ask while one is published
        return sum(snapshot.weights.nbytes for snapshot in snapshots if snapshot.weights is not None)

    @property
    def excess_bytes(self) -> int:
        return 0 if self._limit is None else max(0, self.taken_bytes - self._limit)

    def publish(self, snapshot_id: str, weights: Weights | Path) -> None:
        """Raises UserError for the base model's name, and for files that don't fit the base model."""
        if snapshot_id == BASE_SNAPSHOT:
            raise UserError(f"{BASE_SNAPSHOT!r} always names the base model; publish under another id.")
        loaded = load_weights(self._model, weights) if isinstance(weights, Path) else weights
        adapter = loaded.adapter if isinstance(loaded, LoraWeights) else None
        module = loaded.module if isinstance(loaded, FullWeights) else None
        if adapter is None and module is None:
            raise TypeError(f"{type(loaded).__name__} is neither LoraWeights nor FullWeights")
        self._by_id[snapshot_id] = Snapshot(snapshot_id, next(self._versions), loaded, adapter, module)

    def retract(self, snapshot_id: str) -> None:
        """Unknown ids are ignored."""
        if snapshot_id != BASE_SNAPSHOT:
            self._by_id.pop(snapshot_id, None)

    def save(self, snapshot_id: str, folder: Path) -> None:
        weights = self.require(snapshot_id).weights
        if not isinstance(weights, (LoraWeights, FullWeights)):
            raise UserError(f"{snapshot_id!r} is the base model; it has no weights of its own to save.")
        save_weights(weights, folder)

    def require(self, snapshot_id: str) -> Snapshot:
        """Raises NotFoundError."""
        try:
            return self._by_id[snapshot_id]
        except KeyError:
            raise NotFoundError(f"There is no snapshot {snapshot_id!r} to sample from; it may be retracted.") from None
