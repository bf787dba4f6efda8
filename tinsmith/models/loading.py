"""Loads a Hugging Face causal language model and makes it multi-adapter; one forward pass for everyone.

Knows modules, adapters and attention; neither requests nor losses nor sampling.

Shapes: `T` rows of a packed batch, `D` hidden size.
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from tinsmith.errors import ConfigError
from tinsmith.models.attention import (
    ATTENTION_KEYWORD,
    IMPLEMENTATION,
    Attention,
    CacheShape,
    PackedAttention,
    ShapeRecorder,
)
from tinsmith.models.delta_nets import activation_bytes, is_delta_net, run_by_sequence
from tinsmith.models.experts import MultiAdapterExperts
from tinsmith.models.families import SAME_INPUT, Target, find_targets
from tinsmith.models.grouped import GroupedAdapters, can_group
from tinsmith.models.head import SpareColumns
from tinsmith.models.identity import fingerprint_of
from tinsmith.models.invariant import RowInvariance
from tinsmith.models.lora import (
    Adapter,
    AdapterLayout,
    CurrentPass,
    LinearGroup,
    MultiAdapterLinear,
    Segment,
    initial_weights,
)
from tinsmith.models.norms import FrozenRMSNorm, freeze_norm
from tinsmith.models.probes import packed_logprobs, plain_logprobs, probe_prompts
from tinsmith.models.quick import quick_layers
from tinsmith.models.stacks import AdapterStacks
from tinsmith.protocols import ModelSpec

if TYPE_CHECKING:
    from tinsmith.models.exact import ExactLayers
    from tinsmith.models.fused import FusedLayers

_PROBE_TOLERANCE = 2e-3  # of every logprob, in fp32
_PROBE_TOLERANCE_LOW_PRECISION = 0.15  # on average: a router's choice between equals turns on the last bit


class BaseModel:
    """One base model on one device: its frozen module, and how to run it with adapters."""

    def __init__(
        self, folder: str, module: Any, targets: Sequence[Target], device: torch.device, *, quick: bool = True
    ) -> None:
        """As `load_base`, of a module whose linear layers are `targets`."""
        config = module.config.get_text_config()
        self.folder = folder
        self.config = config
        self.module = module
        self.targets = tuple(targets)
        self.fingerprint = fingerprint_of(module, targets)
        """Of the weights: `identity`."""
        self.device = device
        self.dtype: torch.dtype = module.dtype
        self.vocab_size: int = config.vocab_size
        self.max_context: int = config.max_position_embeddings
        self.num_layers: int = config.num_hidden_layers
        self.parameters = sum(parameter.numel() for parameter in module.parameters())
        self.architecture: str = type(module).__name__
        self.head_linear = len(targets) - 1
        fast = device.type == "cuda" and self.dtype != torch.float32
        self.spare_columns = SpareColumns(module.get_output_embeddings().weight) if fast else None
        self._current = CurrentPass()
        self._layouts: dict[tuple[int, bool, bool, bool], AdapterLayout] = {}
        delta_nets = [child for child in module.modules() if is_delta_net(child)]
        self.state_bytes = sum(run_by_sequence(layer, self._current) for layer in delta_nets)
        """Of one sequence that is being sampled, beside its keys and values."""
        self.is_recurrent = bool(delta_nets)
        self._groups = input_groups(module, targets)
        for path, indices in _expert_layers(targets).items():
            experts = MultiAdapterExperts(module.get_submodule(path), indices, self._current)
            module.set_submodule(path, experts)
        self.groups_adapters = device.type == "cuda"
        self._linear_groups = [self._adapt(indices) for indices in self._groups if not targets[indices[0]].experts]
        for path, child in list(module.named_modules()):
            if frozen := freeze_norm(child):
                module.set_submodule(path, frozen)
        self.fused: FusedLayers | None = None
        """What packed sequences run through instead of the module's layers; set once these have proved right."""
        self.exact: ExactLayers | None = None
        """Goes before both where all passes with the shared weights must have one arithmetic: `exact.make_exact`."""
        self.cache_shape = _observe_cache_shape(self)
        self.quick = quick_layers(self, self._current) if quick else None
        self.stacks = AdapterStacks()
        self.activation_bytes: int = 2 * _numbers_per_token(config, targets[:-1]) * self.dtype.itemsize
        self.activation_bytes += sum(activation_bytes(layer) for layer in delta_nets)
        """Of one token: a generous estimate of what backward keeps, the inputs of every matrix product twice."""
        self._module_bytes = self.activation_bytes

    def fuse(self, layers: "FusedLayers") -> None:
        """From now on adapters are trained through these layers, which keep less for backward."""
        self.fused = layers
        self.activation_bytes = min(self.activation_bytes, layers.activation_bytes)

    def rows_share(self, adapters: Sequence[Adapter | None]) -> float:
        """Of the rows that `activation_bytes` allows, the part that a pass with these adapters may have.

        None stands for a full-parameter model, which keeps the head's logits too. Less still where fused layers cannot
        be used.
        """
        if self.fused is None:
            return 1.0
        logits_bytes = self.vocab_size * self.dtype.itemsize if None in adapters else 0
        kept_bytes = self.activation_bytes + logits_bytes if self.fused.fits(adapters) else self._module_bytes
        return self.activation_bytes / kept_bytes

    def _adapt(self, indices: tuple[int, ...]) -> LinearGroup:
        """Replaces the linear layers with these indices, which read the same input."""
        paths = [self.targets[index].path for index in indices]
        group = LinearGroup([self.module.get_submodule(path) for path in paths], indices, self._current)
        for part, path in enumerate(paths):
            layer = MultiAdapterLinear(self.module.get_submodule(path), group, part)
            self.module.set_submodule(path, layer)
        return group

    def hidden(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        segments: Sequence[Segment],
        attention: Attention,
        module: nn.Module | None = None,
    ) -> Tensor:
        """[T, D] after the final norm, of packed sequences; with gradients if autograd is on.

        `module` is a full-parameter model's own, to be run instead of the shared base.
        """
        owner: Any = self.module if module is None else module
        self._current.segments = segments
        if self.exact is not None and module is None and type(attention) is PackedAttention:
            return self.exact.hidden(tokens_T, positions_T, segments, attention)
        fused = self.fused if module is None else None
        if fused and type(attention) is PackedAttention and fused.fits(segment.adapter for segment in segments):
            return fused.hidden(tokens_T, positions_T, segments, attention)
        embedded = owner.get_input_embeddings()(tokens_T[None])
        if torch.is_grad_enabled() and not embedded.requires_grad:
            embedded.requires_grad_(True)
            self._group_adapters(segments, embedded)
        output = owner.model(
            inputs_embeds=embedded, position_ids=positions_T[None], use_cache=False, **{ATTENTION_KEYWORD: attention}
        )
        return output.last_hidden_state.squeeze(0)

    def _group_adapters(self, segments: Sequence[Segment], embedded: Tensor) -> None:
        """Has the pass that begins with `embedded` apply its adapters together, if they can be."""
        if self.groups_adapters and can_group(segments, self._linear_groups, self.dtype.itemsize):
            adapters = GroupedAdapters(segments)
            self._current.grouped = (segments, adapters)
            embedded.register_hook(lambda _: adapters.add_gradients())  # the last gradient of a backward pass

    def layout(self, spec: ModelSpec) -> AdapterLayout:
        """The flat layout of an adapter with this rank and these targets."""
        key = (spec.rank, spec.train_attn, spec.train_mlp, spec.train_unembed)
        if key not in self._layouts:
            self._layouts[key] = adapter_layout(self.targets, self._groups, spec, self.fingerprint)
        return self._layouts[key]

    def new_adapter(self, spec: ModelSpec) -> Adapter:
        """A fresh adapter: A drawn from `spec.seed`, B zero."""
        layout = self.layout(spec)
        return Adapter(spec, layout, initial_weights(layout, spec.seed, self.device), self.dtype)

    def full_copy(self, *, trainable: bool) -> nn.Module:
        """A plain Hugging Face module with its own copy of every weight."""
        module: nn.Module = copy.deepcopy(self.module)
        for path, child in list(module.named_modules()):
            if isinstance(child, MultiAdapterLinear):
                module.set_submodule(path, child.to_linear())
            elif isinstance(child, FrozenRMSNorm | MultiAdapterExperts):
                module.set_submodule(path, child.original)
        return module.requires_grad_(trainable)

    def checkpoint_gradients(self, enabled: bool, module: nn.Module | None = None) -> None:
        """Whether backward recomputes the inside of each decoder layer, in passes that begin from now on.

        `module` is a full-parameter model's own.
        """
        if self.fused is not None and module is None:
            self.fused.recomputes = enabled
        if self.exact is not None and module is None:
            self.exact.recomputes = enabled
        owner: Any = self.module if module is None else module
        recompute: Any = _checkpointing(self._current)
        for layer in owner.model.layers:
            if layer.training == enabled:
                return
            if not isinstance(layer, GradientCheckpointingLayer):
                raise ConfigError(f"{type(layer).__name__} does not support gradient checkpointing")
            layer.gradient_checkpointing = enabled
            # transformers checkpoints only layers in training mode; their submodules stay in evaluation mode
            layer.training = enabled
            layer._gradient_checkpointing_func = recompute


@torch.no_grad()
def _observe_cache_shape(model: BaseModel) -> CacheShape:
    recorder = ShapeRecorder(1)
    zero_T = torch.zeros(1, dtype=torch.int64, device=model.device)
    model.hidden(zero_T, zero_T, [Segment(None, 0, 1)], recorder)
    return recorder.cache_shape()


def _checkpointing(current: CurrentPass) -> Callable[..., Any]:
    def run(layer: Callable[..., Any], *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return layer(*args)
        segments, arithmetic = current.segments, RowInvariance.same()

        def run_in_same_pass(*args: Any) -> Any:
            current.segments = segments
            with arithmetic:
                return layer(*args)

        return checkpoint(run_in_same_pass, *args, use_reentrant=False, preserve_rng_state=False)

    return run


def input_groups(module: Any, targets: Sequence[Target]) -> list[tuple[int, ...]]:
    """Indices of the targets but for the last, the head: those together that read the same input."""
    groups: list[list[int]] = []
    kinds: list[tuple[object, ...]] = []
    for index, target in enumerate(targets[:-1]):
        if target.experts:
            groups.append([index])
            kinds.append((target.path,))
            continue
        parent, _, name = target.path.rpartition(".")
        siblings = next((names for names in SAME_INPUT if name in names), (name,))
        kind = (parent, siblings, module.get_submodule(target.path).bias is None)
        if kinds and kinds[-1] == kind:
            groups[-1].append(index)
        else:
            groups.append([index])
            kinds.append(kind)
    return [tuple(group) for group in groups]


def adapter_layout(
    targets: Sequence[Target], groups: Sequence[tuple[int, ...]], spec: ModelSpec, fingerprint: str = ""
) -> AdapterLayout:
    """The flat layout of an adapter of this rank, for these targets and their `input_groups`."""
    trained = {"attn": spec.train_attn, "mlp": spec.train_mlp, "unembed": spec.train_unembed}
    names: list[str] = []
    shapes: list[tuple[int, ...]] = []
    linears: list[int] = []
    transposed: list[int] = []
    for group in [*groups, (len(targets) - 1,)]:
        if not trained[targets[group[0]].group]:
            continue
        for part in "AB":
            names += [f"base_model.model.{targets[index].name}.lora_{part}.weight" for index in group]
            linears += group
        shapes_a, shapes_b = zip(*(targets[index].shapes(spec.rank) for index in group), strict=True)
        if targets[group[0]].experts:
            transposed.append(len(shapes) + 1)
        shapes += [*shapes_a, *shapes_b]
    return AdapterLayout(names, shapes, linears, transposed, fingerprint)


def _numbers_per_token(config: Any, targets: Sequence[Target]) -> int:
    """What goes in and comes out of all linear layers; a token passes through few of the experts."""
    plain = sum(target.inputs + target.outputs for target in targets if not target.experts)
    fused = sum(target.inputs + target.outputs for target in targets if target.experts)
    return plain + fused * (config.num_experts_per_tok if fused else 0)


def _expert_layers(targets: Sequence[Target]) -> dict[str, tuple[int, ...]]:
    """The indices of the fused layers that belong to each module of experts, by its path."""
    layers: dict[str, tuple[int, ...]] = {}
    for index, target in enumerate(targets):
        if target.experts:
            path = target.path.rpartition(".")[0]
            layers[path] = (*layers.get(path, ()), index)
    return layers


def load_base(
    folder: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    on_progress: Callable[[str], None],
    trust_remote_code: bool = False,
    quick: bool = True,
) -> BaseModel:
    """Loads a local folder or a hub name. Raises ConfigError, with the reason, for a model that cannot be served.

    Code that comes with the model runs only if `trust_remote_code` is true. Where nobody will sample, or only with the
    arithmetic of training, `quick` layers and their second copy of the weights would go unused: then it is false.
    """
    on_progress(f"loading {folder}")
    try:
        module: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="eager",
            local_files_only=Path(folder).is_dir(),
            use_safetensors=True,  # other formats can run code
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load a causal language model from {str(folder)!r}: {error}") from error
    module = text_part(module).to(device).eval().requires_grad_(False)
    targets = find_targets(module)
    on_progress("comparing with the original computation")
    prompts = probe_prompts(module.config.get_text_config().vocab_size, device)
    expected_M = plain_logprobs(module, prompts)
    module.set_attn_implementation(IMPLEMENTATION)
    model = BaseModel(str(folder), module, targets, device, quick=quick)
    _check_same_results(model, prompts, expected_M)
    if device.type == "cuda":
        from tinsmith.models.fused import fused_layers  # what it is written in comes with torch for CUDA only

        fused = fused_layers(model, on_progress)
        if fused is not None:
            model.fuse(fused)
    on_progress(f"loaded {model.architecture}, {model.parameters / 1e6:,.1f} M parameters")
    return model


def text_part(module: Any) -> Any:
    """The causal language model inside one that also sees pictures; any other module as it is."""
    inner = getattr(getattr(module, "model", None), "language_model", None)
    if inner is None:
        return module
    with torch.device("meta"):
        text: Any = AutoModelForCausalLM.from_config(module.config.get_text_config())
    text.model, text.generation_config = inner, module.generation_config
    text.set_output_embeddings(module.get_output_embeddings())
    return text


def _check_same_results(model: BaseModel, prompts: Sequence[Tensor], expected_M: Tensor) -> None:
    """Our packed computation against the module's own, run before it was changed."""
    differences_M = (packed_logprobs(model, prompts) - expected_M).abs()
    exact = model.dtype == torch.float32
    difference = (differences_M.max() if exact else differences_M.mean()).item()
    allowed = _PROBE_TOLERANCE if exact else _PROBE_TOLERANCE_LOW_PRECISION
    if not difference <= allowed:
        raise ConfigError(
            f"{model.architecture} computes something that Tinsmith does not know of: logprobs differ by "
            f"{difference:.3g} from the original module's, {allowed:.3g} is allowed"
        )
