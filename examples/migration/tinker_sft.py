"""Supervised fine-tuning on a Tinsmith server: what `trl_sft.py` does, step by step.

export TINKER_BASE_URL=http://127.0.0.1:8000 TINKER_API_KEY=tml-local
python examples/migration/tinker_sft.py --model tiny
"""

import argparse

import tinker
from facts import FACTS


def make_batch(tokenizer) -> list[tinker.Datum]:
    """Only completions count, each token as much as every other one of the batch: TRL's mean, as a weighted sum."""
    rows = []
    for fact in FACTS:
        prompt = tokenizer.encode(fact["prompt"], add_special_tokens=False)
        rows.append((prompt, [*tokenizer.encode(fact["completion"], add_special_tokens=False), tokenizer.eos_token_id]))
    counted = sum(len(completion) for _, completion in rows)
    return [
        tinker.Datum(
            model_input=tinker.ModelInput.from_ints((prompt + completion)[:-1]),
            loss_fn_inputs={
                "target_tokens": (prompt + completion)[1:],
                "weights": [0.0] * (len(prompt) - 1) + [1.0 / counted] * len(completion),
            },
        )
        for prompt, completion in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="what the server calls it")
    parser.add_argument("--rank", type=int, default=16, help="0: all parameters")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    arguments = parser.parse_args()

    service = tinker.ServiceClient()
    client = service.create_lora_training_client(  # PEFT's "all-linear" leaves the unembedding alone
        base_model=arguments.model, rank=arguments.rank, train_unembed=arguments.rank == 0
    ).result()
    batch = make_batch(client.get_tokenizer())
    for step in range(arguments.steps):
        learning_rate = arguments.learning_rate * (1 - step / arguments.steps)  # lr_scheduler_type="linear"
        adam = tinker.AdamParams(learning_rate=learning_rate, beta1=0.9, beta2=0.999, eps=1e-8, grad_clip_norm=1.0)
        forward_backward = client.forward_backward(batch, "cross_entropy")
        optim_step = client.optim_step(adam)
        print(f"step {step + 1:3d}  loss {forward_backward.result().metrics['loss:sum']:.4f}")
        optim_step.result()
    print(client.save_weights_for_sampler("facts").result().path)


if __name__ == "__main__":
    main()
