"""vLLM with the loads of `sampling_gpu`: prints a RESULT line for each, which `--rival` of our benchmarks reads.

    python -m benchmarks.rival_vllm {0.6b,4b} {lora,base} [--cases sampling,batch1,ragged,groups,rollouts]

Runs where vLLM is installed, and needs nothing of Tinsmith. Random weights of the shape; adapters of rank 32 on all
linear layers but the head, all of the same weights, which changes no time. The logprob of every sampled token is asked
for, and prefixes are cached.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.workloads import ADAPTERS, LONGEST, RANK, SHAPES, Asked, Load, Sizes, made, sampled_tokens, warm_up

CAPTURED = [1, 2, 4, 8, 16, 32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024]
"""Sizes of batches for which it captures graphs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=list(SHAPES))
    parser.add_argument("mode", choices=["lora", "base"])
    parser.add_argument("--cases", default="sampling,batch1,ragged,groups")
    parser.add_argument("--running", type=int, default=1024)
    parser.add_argument("--memory", type=float, default=0.85)
    arguments = parser.parse_args()
    sizes, with_adapters = SHAPES[arguments.size], arguments.mode == "lora"
    with tempfile.TemporaryDirectory() as name:
        began = time.perf_counter()
        rival = Rival(Path(name), sizes, with_adapters, arguments.running, arguments.memory)
        _say(arguments.size, arguments.mode, "start", time.perf_counter() - began, 0)
        adapters = ADAPTERS if with_adapters else 0
        rival.answer(warm_up(Load(sizes.vocabulary, adapters, 0)))
        for case in arguments.cases.split(","):
            for requests in made(case, sizes.vocabulary, adapters):
                _say(arguments.size, arguments.mode, case, rival.answer(requests), sampled_tokens(requests))


def _say(size: str, mode: str, case: str, seconds: float, tokens: int) -> None:
    line = {"size": size, "mode": mode, "case": case, "seconds": round(seconds, 3), "tokens": tokens}
    print("RESULT", json.dumps(line), flush=True)


class Rival:
    """One engine of vLLM."""

    def __init__(self, folder: Path, sizes: Sizes, with_adapters: bool, running: int, memory: float) -> None:
        from vllm import LLM

        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text(json.dumps(config_of(sizes)))
        more: dict[str, Any] = {}
        if with_adapters:
            more = {"enable_lora": True, "max_loras": ADAPTERS, "max_cpu_loras": ADAPTERS, "max_lora_rank": RANK}
        self._engine = LLM(
            model=str(folder / "model"),
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=LONGEST,
            max_num_seqs=running,
            gpu_memory_utilization=memory,
            generation_config="vllm",
            enable_prefix_caching=True,
            compilation_config={"cudagraph_capture_sizes": [size for size in CAPTURED if size <= running]},
            **more,
        )
        # Not before: the engine is a fork of this process, and hangs where torch has had threads at work here.
        self._adapter = write_adapter(folder / "adapter", sizes) if with_adapters else None

    def answer(self, requests: Sequence[Asked]) -> float:
        """Seconds from the first submission to the last result."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        prompts = [{"prompt_token_ids": asked.prompt} for asked in requests]
        params = [
            SamplingParams(
                n=asked.samples, max_tokens=asked.output, ignore_eos=True, logprobs=0, detokenize=False, temperature=1.0
            )
            for asked in requests
        ]
        adapters = None
        if self._adapter:
            path = str(self._adapter)
            adapters = [LoRARequest(f"adapter {asked.adapter}", 1 + (asked.adapter or 0), path) for asked in requests]
        began = time.perf_counter()
        answers = self._engine.generate(prompts, params, use_tqdm=False, lora_request=adapters)
        seconds = time.perf_counter() - began
        sampled = sum(len(sample.token_ids) for answer in answers for sample in answer.outputs)
        if sampled != sampled_tokens(list(requests)):
            raise SystemExit(f"{sampled} tokens were sampled, not {sampled_tokens(list(requests))}")
        return seconds


def config_of(sizes: Sizes) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "torch_dtype": "bfloat16",
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "intermediate_size": sizes.intermediate,
        "vocab_size": sizes.vocabulary,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 32_768,
        "attention_bias": False,
        "tie_word_embeddings": True,
    }


def write_adapter(folder: Path, sizes: Sizes) -> Path:
    """In PEFT's form."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    tensors = {}
    for layer in range(sizes.layers):
        for name, (inputs, outputs) in linears(sizes).items():
            stem = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, inputs, dtype=torch.bfloat16) * 0.02
            tensors[f"{stem}.lora_B.weight"] = torch.randn(outputs, RANK, dtype=torch.bfloat16) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = [name.rpartition(".")[2] for name in linears(sizes)]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def linears(sizes: Sizes) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of a layer's linear layers."""
    hidden, inner = sizes.hidden, sizes.intermediate
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    return {
        "self_attn.q_proj": (hidden, queries),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (queries, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }


if __name__ == "__main__":
    main()
