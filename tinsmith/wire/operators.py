"""The closed list of what a custom loss may do: torch's functions and tensor methods, by name.

A name here is allowed; nothing else is, however it is spelt. `training/custom_loss.py` finds the functions themselves
and bounds their memory. Left out on purpose: whatever draws random numbers, works in place, depends on a tensor's
values for the shape of its result, leaves torch, or takes text.
"""


def _names(*lines: str) -> frozenset[str]:
    return frozenset(name for line in lines for name in line.split())


_BOTH = _names(
    "abs neg exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal sigmoid tanh sin cos sinh cosh atan asin",
    "acos erf erfc sign floor ceil trunc frac isfinite isnan isinf logical_not logit nan_to_num add sub mul div",
    "true_divide floor_divide remainder fmod pow maximum minimum atan2 hypot logaddexp logaddexp2 xlogy copysign lerp",
    "eq ne lt le gt ge logical_and logical_or logical_xor where clamp clip clamp_min clamp_max masked_fill addcmul",
    "addcdiv relu sum mean prod var std amax amin max min logsumexp all any argmax argmin median nansum count_nonzero",
    "norm cumsum cumprod logcumsumexp cummax cummin diff softmax log_softmax sort argsort topk reshape flatten squeeze",
    "unsqueeze transpose permute movedim broadcast_to flip roll narrow select chunk split unbind t tril triu gather",
    "index_select take_along_dim dot mv mm matmul outer clone detach numel",
)

FUNCTIONS = _BOTH | _names("zeros ones full zeros_like ones_like full_like arange stack cat concat")
"""`torch.x`, for each of these."""

FUNCTIONAL = _names(
    "softplus logsigmoid relu leaky_relu elu gelu silu hardtanh softmax log_softmax sigmoid tanh huber_loss",
    "smooth_l1_loss mse_loss l1_loss",
)
"""`torch.nn.functional.x`."""

METHODS = _BOTH | _names(
    "view view_as expand expand_as size dim ndimension float double half bfloat16 long int bool to type_as contiguous",
    "new_zeros new_ones new_full",
)
"""`tensor.x(…)`."""

PYTHON = _names("add sub mul truediv floordiv mod pow neg pos abs lt le eq ne gt ge and_ or_ xor invert getitem matmul")
"""`operator.x`."""

ATTRIBUTES = _names("shape ndim dtype device T mT values indices")
"""`tensor.x`, and the parts of what `max`, `sort` and their like return."""

KEYWORDS = _names(
    "dim dims keepdim dtype min max alpha other input value exponent start end step length descending correction",
    "unbiased index shape size sizes k largest sorted fill_value condition self mask weight p ord dim0 dim1 source",
    "destination shifts n diagonal nan posinf neginf tensor1 tensor2 tensors beta threshold negative_slope eps tensor",
    "vec2 mat2 base axis split_size_or_sections chunks delta reduction rounding_mode approximate",
)
"""What arguments may be called. `out` is none of them: it would write into other tensors."""

WORDS = _names("none mean sum floor trunc tanh")
"""The only texts that arguments may be (reduction, rounding_mode, approximate)."""

DTYPES = _names("float32 float64 float16 bfloat16 int64 int32 bool")

_MODULES = {
    "torch": ("torch", FUNCTIONS),
    "torch.functional": ("torch", FUNCTIONS),
    "torch.nn.functional": ("functional", FUNCTIONAL),
    "torch._C._nn": ("functional", FUNCTIONAL),
    "operator": ("operator", PYTHON),
}


def known_function(target: str) -> tuple[str, str] | None:
    """Where a function is (torch, functional, operator) and its name; None if torch.fx's name is not allowed."""
    module, _, name = target.rpartition(".")
    name = "logsigmoid" if name == "log_sigmoid" else name
    where, names = _MODULES.get(module, ("", frozenset()))
    return (where, name) if name in names else None
