"""What clients of other services may ask for and is not done here: refused by its name, never ignored.

A field that would change the answer is taken only with the values that ask for nothing.
"""

from msgspec import Struct

from tinsmith.errors import UserError

NEUTRAL: dict[str, tuple[object, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "citations": (None, {"enabled": False}),
    "container": (None,),
    "diagnostics": (None,),
    "eager_input_streaming": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None,),
    "functions": (None,),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "output_config": (None, {}),
    "parallel_tool_calls": (None, True),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None,),
    "refusal": (None,),
    "response_format": (None, {"type": "text"}),
    "speed": (None, "standard"),
    "strict": (None, False),
    "suffix": (None, ""),
    "thinking": (None, {"type": "disabled"}),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}
"""Field (of any body of either dialect) → the values that change nothing."""


def refuse_unsupported(body: Struct) -> None:
    """Raises UserError that names a field which asks for something that is not done here."""
    for name in body.__struct_fields__:
        value = getattr(body, name)
        if name in NEUTRAL and not any(value == neutral for neutral in NEUTRAL[name]):
            raise UserError(f"{name} is {str(value)[:100]}, which this server does not do; leave it out")
