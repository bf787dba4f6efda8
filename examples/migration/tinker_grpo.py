"""Reinforcement learning (GRPO) on a Tinsmith server: what `trl_grpo.py` does, step by step.

export TINKER_BASE_URL=http://127.0.0.1:8000 TINKER_API_KEY=tml-local
python examples/migration/tinker_grpo.py --model tiny
"""

import argparse
import random
import statistics

import tinker
from facts import SUMS, reward_of


def advantages_of(rewards: list[float]) -> list[float]:
    """scale_rewards="group": centred within the group, in units of its standard deviation."""
    mean, spread = statistics.mean(rewards), statistics.stdev(rewards)
    return [(reward - mean) / (spread + 1e-4) for reward in rewards]


def make_datum(prompt: list[int], sequence: tinker.SampledSequence, weight: float) -> tinker.Datum:
    """Row i of the inputs belongs to the prediction of token i + 1; the prompt's rows count nothing."""
    given = len(prompt) - 1
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints((prompt + sequence.tokens)[:-1]),
        loss_fn_inputs={
            "target_tokens": [0] * given + sequence.tokens,
            "logprobs": [0.0] * given + sequence.logprobs,
            "advantages": [0.0] * given + [weight] * len(sequence.tokens),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="what the server calls it")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--questions", type=int, default=8, help="in a batch")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    arguments = parser.parse_args()

    service = tinker.ServiceClient()
    client = service.create_lora_training_client(base_model=arguments.model, rank=16).result()
    tokenizer = client.get_tokenizer()
    sampling = tinker.SamplingParams(max_tokens=16, temperature=1.0, stop=[tokenizer.eos_token_id])
    adam = tinker.AdamParams(
        learning_rate=arguments.learning_rate, beta1=0.9, beta2=0.999, eps=1e-8, grad_clip_norm=1.0
    )
    for step in range(arguments.steps):
        questions = random.sample(SUMS, arguments.questions)
        prompts = [tokenizer.encode(question["prompt"], add_special_tokens=False) for question in questions]
        sampler = client.save_weights_and_get_sampling_client().result()
        futures = [
            sampler.sample(tinker.ModelInput.from_ints(prompt), arguments.group_size, sampling) for prompt in prompts
        ]
        groups = [future.result().sequences for future in futures]
        rewards = [
            [reward_of(tokenizer.decode(sequence.tokens), question["answer"]) for sequence in group]
            for question, group in zip(questions, groups, strict=True)
        ]
        counted = sum(len(sequence.tokens) for group in groups for sequence in group)  # loss_type="dapo": of the batch
        datums = [
            make_datum(prompt, sequence, advantage / counted)
            for prompt, group, own in zip(prompts, groups, rewards, strict=True)
            for sequence, advantage in zip(group, advantages_of(own), strict=True)
        ]
        forward_backward, optim_step = client.forward_backward(datums, "ppo"), client.optim_step(adam)
        forward_backward.result(), optim_step.result()
        print(f"step {step + 1:3d}  reward {statistics.mean(reward for own in rewards for reward in own):.4f}")
    print(client.save_weights_for_sampler("sums").result().path)


if __name__ == "__main__":
    main()
