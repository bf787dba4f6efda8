"""What a sampler uses on a GPU: fused layers for any pass, and captured graphs for plain decoding.

Decides which of a step's works are decoded by graphs. What needs Triton is imported only where there is a GPU.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from tinsmith.lost_device import raise_if_lost
from tinsmith.models.loading import BaseModel
from tinsmith.sampling.batch import NextTokens, Work, next_tokens
from tinsmith.sampling.kv_cache import KVCache

if TYPE_CHECKING:
    from tinsmith.models.exact import ExactLayers
    from tinsmith.sampling.cuda_layers import CudaLayers
    from tinsmith.sampling.exact_decoding import ExactSampling
    from tinsmith.sampling.graphs import DecodeGraphs

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CudaDecoding:
    """For the base model and its adapters; full-parameter models run as everywhere else."""

    layers: "CudaLayers | ExactSampling"
    graphs: "DecodeGraphs"
    next_tokens: NextTokens = next_tokens

    def warm_up(self, on_progress: Callable[[str], None]) -> None:
        """Compiles what is to be compiled and captures what is to be captured; no request does it later."""
        on_progress("compiling kernels")
        with torch.inference_mode():
            for rank in self.graphs.ranks:
                self.layers.warm_up(rank)
        self.graphs.warm_up(on_progress)

    def burst(self, works: Sequence[Work]) -> list[Work]:
        """Those works that the graphs can decode together: single rows of samples that have their prompt behind them.

        What the first sample of a request runs last of its prompt is not decoding yet: the others follow from it.
        """
        fitting = [
            work
            for work in works
            if work.rows == 1 and work.sample.pending == 1 and work.sample.tokens and self.graphs.fits(work.sample)
        ]
        return fitting if self.graphs.fit_together([work.sample for work in fitting]) else []


def cuda_decoding(
    model: BaseModel, cache: KVCache, *, max_rows: int, max_context: int, max_rank: int
) -> CudaDecoding | None:
    """None without a GPU or Triton, where its kernels do not work, and for a model whose layers are not so simple.

    A model with exact layers is sampled through these, or not at all.
    """
    if model.exact is not None:
        return _exact(model, model.exact, cache, max_rows=max_rows, max_context=max_context, max_rank=max_rank)
    if model.device.type != "cuda" or find_spec("triton") is None:
        return None
    try:
        return _prepared(model, cache, max_rows=max_rows, max_context=max_context, max_rank=max_rank)
    except Exception as error:  # an older device may refuse a kernel, or have no room for what is prepared
        raise_if_lost(error)
        log.warning("fused kernels do not work here: %s: %s", type(error).__name__, error, exc_info=True)
        return None


def _prepared(
    model: BaseModel, cache: KVCache, *, max_rows: int, max_context: int, max_rank: int
) -> CudaDecoding | None:
    from tinsmith.sampling.cuda_layers import cuda_layers
    from tinsmith.sampling.graphs import DecodeGraphs

    layers = cuda_layers(model, cache, max_context)
    if layers is None:
        log.warning("%s in %s is sampled without fused kernels, more slowly", model.architecture, model.dtype)
        return None
    graphs = DecodeGraphs(model, layers, cache, max_rows=max_rows, max_context=max_context, max_rank=max_rank)
    return CudaDecoding(layers, graphs)


def _exact(model: BaseModel, layers: "ExactLayers", cache: KVCache, **limits: int) -> CudaDecoding:
    """Of a model with exact layers; not a GPU is only ever Triton's interpreter, which captures nothing."""
    from tinsmith.sampling.exact_decoding import ExactGraphs, ExactSampling, exact_next_tokens

    sampling = ExactSampling(model, layers, cache)
    graphs = ExactGraphs(model, sampling, cache, **limits, capture=model.device.type == "cuda")
    return CudaDecoding(sampling, graphs, exact_next_tokens)
