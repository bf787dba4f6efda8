"""What each loss takes: its inputs, its configuration keys, their defaults and bounds.

The API validates against this table; `training/losses.py` computes the formulas and reads the defaults from here.
"""

from dataclasses import dataclass, field
from types import MappingProxyType

_CLIPS = ("clip_low_threshold", "clip_high_threshold")


@dataclass(frozen=True, slots=True)
class LossSignature:
    """`inputs` are required beside target_tokens, `optional` may be given; all share the shape of target_tokens.

    `config` maps each key to its default. `matrix` says whether targets of shape (N, K) are taken. A clip threshold
    may also be given per token, as an input of the same name.
    """

    inputs: tuple[str, ...]
    optional: tuple[str, ...] = ()
    config: MappingProxyType[str, float] = field(default_factory=lambda: MappingProxyType({}))
    matrix: bool = False


def _policy(optional: tuple[str, ...] = (), extra: tuple[str, ...] = (), **config: float) -> LossSignature:
    return LossSignature(("logprobs", "advantages", *extra), optional, MappingProxyType(config))


LOSSES: MappingProxyType[str, LossSignature] = MappingProxyType(
    {
        "cross_entropy": LossSignature(("weights",), matrix=True),
        "importance_sampling": _policy(),
        "ppo": _policy(_CLIPS, clip_low_threshold=0.8, clip_high_threshold=1.2),
        "cispo": _policy(_CLIPS, clip_low_threshold=0.0, clip_high_threshold=4.0),
        "dro": _policy(beta=0.05),
        "gspo": _policy(_CLIPS, ("sequence_ratio_mask",), clip_low_threshold=0.8, clip_high_threshold=1.2),
        "stable_reinforce": _policy(clip_high_threshold=2.0, kl_coeff=0.0),
    }
)
