"""JSON bodies about sampling: sessions of samplers, prompts, and what is asked of a sample."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from tinsmith.wire.types import MAX_INT64, MAX_SEQ, Count, Id, NotNegative, Request, Response, Seed


class CreateSamplingSessionRequest(Request):
    session_id: Id
    sampling_session_seq_id: Count
    base_model: Id | None = None
    model_path: Id | None = None
    type: Literal["create_sampling_session"] = "create_sampling_session"


class CreateSamplingSessionResponse(Response):
    sampling_session_id: str
    type: Literal["create_sampling_session"] = "create_sampling_session"


class EncodedText(Request, tag="encoded_text"):
    tokens: list[int]


class Image(Struct, tag="image"):
    """Known, so that it can be refused by name."""


class ImageAssetPointer(Struct, tag="image_asset_pointer"):
    """Known, so that it can be refused by name."""


class Dmel(Struct, tag="dmel"):
    """Known, so that it can be refused by name."""


class ModelInput(Request):
    chunks: list[EncodedText | Image | ImageAssetPointer | Dmel]


class TensorData(Request):
    """A dense tensor, row-major, or a sparse one in CSR form."""

    data: list[int | float]
    dtype: Literal["float32", "int64"]
    shape: list[Count] | None = None
    sparse_crow_indices: list[Annotated[int, Meta(ge=0, le=MAX_INT64)]] | None = None
    sparse_col_indices: list[Annotated[int, Meta(ge=0, le=MAX_INT64)]] | None = None


class SamplingParams(Request):
    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    seed: Seed | None = None
    stop: str | list[str | int] | None = None
    temperature: NotNegative = 1.0
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] = -1
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0


MAX_SAMPLES = 4096
MAX_TOPK = 1024


class SampleRequest(Request, kw_only=True):
    prompt: ModelInput
    sampling_params: SamplingParams
    sampling_session_id: Id
    seq_id: Annotated[int, Meta(ge=0, le=MAX_SEQ)]
    num_samples: Annotated[int, Meta(ge=1, le=MAX_SAMPLES)] = 1
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOPK)] = 0
    topk_sample_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOPK)] = 0
    target_prompt_logprobs: TensorData | None = None
    prompt_alt_tokens_k: Annotated[int, Meta(ge=0, le=MAX_TOPK)] = 0
    prompt_logprobs_last_n: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    record_stability_info: bool | None = None
    type: Literal["sample"] = "sample"


class SamplerInfo(Response):
    sampler_id: str
    base_model: str
    model_path: str | None
