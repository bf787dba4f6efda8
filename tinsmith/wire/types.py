"""The types of JSON bodies: what a single value may be, and what all requests and responses of the Tinker API share.

Requests refuse fields they do not know; what a single value may be stands in its type. What depends on the served
model or on stored objects is checked elsewhere. The bodies, one definition each: service_types, training_types,
sampling_types, and accounts and custom_loss of Tinsmith's own. forward_backward and results of tensors travel as
protobuf: see codec.
"""

from typing import Annotated, Any

from msgspec import Meta, Struct

MAX_INT64 = 2**63 - 1
MAX_SEQ = 10**18 - 1
TTL_RANGE = (3600, 10 * 365 * 24 * 3600)

# "$" alone would let a last line feed pass.
Id = Annotated[str, Meta(min_length=1, max_length=300, pattern=r"^[^\x00-\x1f\x7f]+$(?!\n)")]
Text = Annotated[str, Meta(max_length=2000, pattern=r"^[^\x00]*$")]
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Seq = Annotated[int, Meta(ge=1, le=MAX_SEQ)]
Seed = Annotated[int, Meta(ge=0, le=MAX_INT64)]
Ttl = Annotated[int, Meta(ge=TTL_RANGE[0], le=TTL_RANGE[1])]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Epsilon = Annotated[float, Meta(ge=1e-37)]  # in fp32 not 0, which would make 0 / 0 of what has had no gradient yet
BelowOne = Annotated[float, Meta(ge=0, lt=1)]
Labels = dict[str, str]


Metadata = dict[str, Any]
MAX_NESTING = 16
"""Of lists and objects in a value of metadata: whoever walks through it later must not run out of stack."""


def check_nesting(metadata: Metadata | None) -> None:
    """Raises ValueError for metadata that is nested deeper than MAX_NESTING."""
    # Not a type of that depth: msgspec would take seconds to prepare it.
    level: list[Any] = list((metadata or {}).values())
    for _ in range(MAX_NESTING + 1):
        inside = [
            value.values() if isinstance(value, dict) else value for value in level if isinstance(value, (dict, list))
        ]
        if not inside:
            return
        level = [value for values in inside for value in values]
    raise ValueError(f"metadata is nested more than {MAX_NESTING} deep")


class Request(Struct, forbid_unknown_fields=True):
    """A body that clients send."""


class Response(Struct, omit_defaults=False):
    """A body that clients receive."""
