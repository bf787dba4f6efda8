"""Who has had how much of training: tokens of each owner, over its weight, and of each of its models.

Start-time fair queueing on two levels, which bounds what deficit round robin bounds, and by less: whoever has had least
comes first; who was away is taken to have had as much as the least of those who were served meanwhile, so that absence
earns nothing. Pure bookkeeping: knows no clock, no database, no queue.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tinsmith.wire.jobs import Header

BARRIER_TOKENS = 128
"""What an operation that is no forward or backward pass is taken to cost: a step of an adapter takes about as long."""


def cost(header: Header) -> int:
    """A job's share of a turn, in tokens."""
    return max(header.tokens, BARRIER_TOKENS if header.is_barrier else 1)


@dataclass(slots=True)
class _Account:
    """One owner: what it has had, over its weight; what each of its models has had; the least of those served last."""

    had: float
    least: float = 0.0
    models: dict[str, float] = field(default_factory=dict)


class Shares:
    """The accounts of all owners that have had more than the least of those served last."""

    def __init__(self) -> None:
        self.weights: Mapping[str, float] = {}
        """Owner → how many times the share of an owner that is not named here (weight 1)."""
        self._accounts: dict[str, _Account] = {}
        self._least = 0.0

    def weight(self, owner: str) -> float:
        return self.weights.get(owner, 1.0)

    def of_owner(self, owner: str) -> float:
        """Tokens over weight."""
        account = self._accounts.get(owner)
        return self._least if account is None else max(account.had, self._least)

    def of_model(self, owner: str, model_id: str) -> float:
        """Tokens; comparable among models of one owner only."""
        account = self._accounts.get(owner)
        return 0.0 if account is None else max(account.models.get(model_id, 0.0), account.least)

    def charge(self, batch: Sequence[Header]) -> None:
        """Notes that a batch, or a barrier, has run."""
        if not batch:
            return
        owners = {header.owner: self.of_owner(header.owner) for header in batch}
        models = {header.subject: self.of_model(header.owner, header.subject) for header in batch}
        for owner, had in owners.items():
            self._accounts.setdefault(owner, _Account(had)).had = had
        if not batch[0].is_barrier:  # barriers may run out of turn
            self._least = max(self._least, min(owners.values()))
            for owner in owners:
                account = self._accounts[owner]
                account.least = max(account.least, min(models[job.subject] for job in batch if job.owner == owner))
        for header in batch:
            account = self._accounts[header.owner]
            account.had += cost(header) / self.weight(header.owner)
            models[header.subject] += cost(header)
            account.models[header.subject] = models[header.subject]
        self._drop_settled()

    def _drop_settled(self) -> None:
        """Accounts that say no more than the least do not need to be kept."""
        self._accounts = {owner: account for owner, account in self._accounts.items() if account.had > self._least}
        for account in self._accounts.values():
            account.models = {model: had for model, had in account.models.items() if had > account.least}

    def forget(self, model_id: str) -> None:
        """Drops what is kept of a model that is over."""
        for account in self._accounts.values():
            account.models.pop(model_id, None)
        self._accounts = {owner: account for owner, account in self._accounts.items() if account.models}

    @property
    def kept(self) -> int:
        """How many models and owners are kept."""
        return sum(1 + len(account.models) for account in self._accounts.values())
