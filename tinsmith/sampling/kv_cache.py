"""The paged KV cache: who owns which block, which blocks share a prefix, and the tensors behind them.

`BlockPool` is bookkeeping alone (no tensors): reference counts, reuse by content in least-recently-used order.
`KVCache` holds the keys and values. Neither knows requests or the model. Legend: L layers, B blocks, S tokens in a
block, G key/value heads, d key dimension, e value dimension.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from tinsmith.models.attention import CacheShape


def chain_digests(parent: bytes, tokens: Sequence[int], block_size: int) -> list[bytes]:
    """One digest per full block of `tokens`; each names the block's tokens and all tokens (and the root) before it."""
    data = np.asarray(tokens, dtype=np.int32)
    digests = []
    for start in range(0, len(data) - block_size + 1, block_size):
        parent = blake2b(parent + data[start : start + block_size].tobytes(), digest_size=16).digest()
        digests.append(parent)
    return digests


class BlockPool:
    """Which of `num_blocks` blocks are free, held (and how often), or kept for reuse because of their content.

    Ask, then do: `can_allocate`, then `allocate`.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._free = deque(range(num_blocks))
        self._reusable: OrderedDict[int, None] = OrderedDict()  # unreferenced but of known content; oldest first
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Blocks that can be allocated: free ones, and those kept only in the hope of reuse."""
        return len(self._free) + len(self._reusable)

    @property
    def reusable(self) -> int:
        """Those of the available blocks that are kept in the hope of reuse."""
        return len(self._reusable)

    def references(self, block: int) -> int:
        return self._references[block]

    def match(self, digests: Iterable[bytes]) -> list[int]:
        """The blocks that hold the longest known prefix of the chain `digests`."""
        found = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def cost(self, count: int, shared: Sequence[int]) -> int:
        """What `allocate(count, shared)` takes out of `available`."""
        return count + sum(1 for block in shared if self._references[block] == 0)

    def can_allocate(self, count: int, shared: Sequence[int] = ()) -> bool:
        return self.cost(count, shared) <= self.available

    def allocate(self, count: int, shared: Sequence[int] = ()) -> list[int]:
        """A block table: a further reference to each of `shared`, then `count` new blocks of unknown content."""
        if not self.can_allocate(count, shared):
            raise ValueError(f"{self.cost(count, shared)} blocks wanted, {self.available} available")
        for block in shared:
            self._references[block] += 1
            self._reusable.pop(block, None)
        return [*shared, *(self._take() for _ in range(count))]

    def release(self, blocks: Sequence[int], *, forget: bool = False) -> None:
        """Gives one reference to each block back; `forget` also gives up content that nobody else holds.

        The end of a sequence is given up before its beginning, which more requests have in common.
        """
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] > 0:
                continue
            if forget:
                self._forget(block)
            if block in self._digest_of:
                self._reusable[block] = None
            else:
                self._free.append(block)

    def register(self, block: int, digest: bytes) -> None:
        """Records the content of a full block; a second block of the same content stays unknown."""
        if digest not in self._block_of and block not in self._digest_of:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def _take(self) -> int:
        if self._free:
            block = self._free.popleft()
        else:
            block, _ = self._reusable.popitem(last=False)
            self._forget(block)
        self._references[block] = 1
        return block

    def _forget(self, block: int) -> None:
        digest = self._digest_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Raises AssertionError unless the books agree with each other and with the block `tables` of all holders."""
        held = Counter(block for table in tables for block in table)
        counted = {block: count for block, count in enumerate(self._references) if count}
        assert counted == dict(held), f"reference counts {counted} differ from the block tables' {dict(held)}"
        parts = [*counted, *self._free, *self._reusable]
        assert sorted(parts) == list(range(self.num_blocks)), "a block is lost, or free and held at once"
        assert {block: digest for digest, block in self._block_of.items()} == self._digest_of
        assert all(block in self._digest_of for block in self._reusable)
        assert not any(block in self._digest_of for block in self._free)


class KVCache:
    """Keys and values of all layers, in blocks of `block_size` tokens; one block more than asked for is scratch.

    Rows that only pad a batch write to the scratch block; nothing reads it. `places` numbers the model's layers that
    have keys and values: where each lies in dimension L.
    """

    def __init__(
        self, shape: CacheShape, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.block_size = block_size
        self.scratch_slot = num_blocks * block_size
        self.places = {layer: place for place, layer in enumerate(shape.layers)}
        sizes = (len(shape.layers), num_blocks + 1, block_size, shape.heads)
        self.keys_LBSGd = torch.zeros(*sizes, shape.key_dim, dtype=dtype, device=device)
        self.values_LBSGe = torch.zeros(*sizes, shape.value_dim, dtype=dtype, device=device)
        both = (self.keys_LBSGd, self.values_LBSGe)
        self._slots = [(keys.flatten(0, 1), values.flatten(0, 1)) for keys, values in zip(*both, strict=True)]

    def slots(self, place: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer as [(B + 1)·S, G, d or e]: token t of block b is row b·S + t."""
        return self._slots[place]

    def blocks(self, place: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer as [B + 1, S, G, d or e]."""
        return self.keys_LBSGd[place], self.values_LBSGe[place]

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies whole blocks, in every layer."""
        for data in (self.keys_LBSGd, self.values_LBSGe):
            data[:, targets] = data[:, sources]

    def clear_blocks(self, blocks: Sequence[int]) -> None:
        """Zeroes blocks that may hold NaN: what is masked must be finite, for its weight of 0 to make it vanish."""
        for data in (self.keys_LBSGd, self.values_LBSGe):
            data[:, blocks] = 0
