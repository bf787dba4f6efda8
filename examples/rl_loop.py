"""Reinforcement learning in one flat loop, with nothing but the `tinker` SDK.

    export TINKER_BASE_URL=http://127.0.0.1:8000 TINKER_API_KEY=tml-local
    python examples/rl_loop.py

Groups of samples for each question, rewards centred within their group, one policy-gradient step per batch.
Suffixes: _P questions of a batch, _G samples of one question, _D datums.
"""

import argparse
import random
import re

import tinker


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="base model; left out: the one that the server serves")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16, help="questions in a batch")
    parser.add_argument("--group-size", type=int, default=16, help="samples for each question")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--loss", default="importance_sampling", help="or ppo, cispo, dro, stable_reinforce")
    return parser.parse_args()


def make_question(rng: random.Random) -> tuple[str, int]:
    first, second = rng.randint(0, 99), rng.randint(0, 99)
    return f"What is {first} + {second}?", first + second


def get_reward(reply: str, answer: int) -> float:
    numbers = re.findall(r"-?\d+", reply)
    return float(bool(numbers) and int(numbers[-1]) == answer)


def make_datum(prompt: tinker.ModelInput, sequence: tinker.SampledSequence, advantage: float) -> tinker.Datum:
    """Row i of the inputs belongs to the prediction of token i + 1; the prompt's rows count nothing."""
    given = prompt.length - 1
    return tinker.Datum(
        model_input=prompt.append(tinker.EncodedTextChunk(tokens=sequence.tokens[:-1])),
        loss_fn_inputs={
            "target_tokens": [0] * given + sequence.tokens,
            "logprobs": [0.0] * given + sequence.logprobs,
            "advantages": [0.0] * given + [advantage] * len(sequence.tokens),
        },
    )


def main() -> None:
    arguments = parse_arguments()
    service_client = tinker.ServiceClient()
    model = arguments.model or tinker.RestClient().get_server_capabilities().result().supported_models[0].model_name
    training_client = service_client.create_lora_training_client(base_model=model, rank=arguments.rank).result()
    tokenizer = training_client.get_tokenizer()
    sampling_params = tinker.SamplingParams(max_tokens=32, temperature=1.0, stop=["\n\nUser:"])
    adam_params = tinker.AdamParams(learning_rate=arguments.learning_rate, beta1=0.9, beta2=0.95, eps=1e-8)
    rng = random.Random(0)

    for step in range(arguments.steps):
        questions_P = [make_question(rng) for _ in range(arguments.batch_size)]
        prompts_P = [
            tinker.ModelInput.from_ints(tokenizer.encode(f"User: {question}\n\nAssistant:", add_special_tokens=False))
            for question, _ in questions_P
        ]
        sampling_client = training_client.save_weights_and_get_sampling_client().result()
        futures_P = [sampling_client.sample(prompt, arguments.group_size, sampling_params) for prompt in prompts_P]

        datums_D, rewards_P = [], []
        for (_, answer), prompt, future in zip(questions_P, prompts_P, futures_P, strict=True):
            sequences_G = future.result().sequences
            replies_G = [tokenizer.decode(sequence.tokens).partition("\n\nUser:")[0] for sequence in sequences_G]
            rewards_G = [get_reward(reply, answer) for reply in replies_G]
            mean = sum(rewards_G) / len(rewards_G)
            rewards_P.append(mean)
            if 0 < mean < 1:  # otherwise all advantages are zero
                pairs_G = zip(sequences_G, rewards_G, strict=True)
                datums_D += [make_datum(prompt, sequence, reward - mean) for sequence, reward in pairs_G]

        if datums_D:
            forward_backward = training_client.forward_backward(datums_D, loss_fn=arguments.loss)
            optim_step = training_client.optim_step(adam_params)
            forward_backward.result(), optim_step.result()
        print(f"step {step:3d}  reward {sum(rewards_P) / len(rewards_P):.3f}  datums {len(datums_D)}")

    print("state  ", training_client.save_state("final").result().path)
    print("sampler", training_client.save_weights_for_sampler("final").result().path)


if __name__ == "__main__":
    main()
