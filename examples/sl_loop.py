"""Supervised fine-tuning in one flat loop, with nothing but the `tinker` SDK.

    export TINKER_BASE_URL=http://127.0.0.1:8000 TINKER_API_KEY=tml-local
    python examples/sl_loop.py [--data conversations.jsonl]

Each line of the data file is {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}, …]}.
"""

import argparse
import json
from pathlib import Path

import tinker

FACTS = {
    "What does a tinsmith make?": "Kettles, pans, lanterns and pipes.",
    "What is solder made of?": "Tin, with a little copper or silver.",
    "Who mends the kettle?": "The tinsmith, with hammer and solder.",
    "At which heat does tin melt?": "At 232 degrees.",
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="base model; left out: the one that the server serves")
    parser.add_argument("--data", type=Path, help="conversations, one JSON object a line; left out: four facts")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    return parser.parse_args()


def read_conversations(path: Path | None) -> list[list[dict[str, str]]]:
    if path is not None:
        return [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    return [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in FACTS.items()]


def conversation_to_datum(messages: list[dict[str, str]], tokenizer) -> tinker.Datum:
    """Only what the assistant says is trained on, up to and including the stop text."""
    tokens, weights = [], []
    for message in messages:
        role = f"{message['role'].capitalize()}:"
        pieces = [(role, 0.0), (f" {message['content']}\n\n", float(message["role"] == "assistant"))]
        for text, weight in pieces:
            ids = tokenizer.encode(text, add_special_tokens=False)
            tokens += ids
            weights += [weight] * len(ids)
    end = tokenizer.encode("User:", add_special_tokens=False)
    tokens, weights = tokens + end, weights + [1.0] * len(end)
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights[1:]},
    )


def main() -> None:
    arguments = parse_arguments()
    service_client = tinker.ServiceClient()
    model = arguments.model or tinker.RestClient().get_server_capabilities().result().supported_models[0].model_name
    training_client = service_client.create_lora_training_client(base_model=model, rank=arguments.rank).result()
    tokenizer = training_client.get_tokenizer()
    data = [conversation_to_datum(messages, tokenizer) for messages in read_conversations(arguments.data)]
    adam_params = tinker.AdamParams(learning_rate=arguments.learning_rate, beta1=0.9, beta2=0.95, eps=1e-8)

    for step in range(arguments.steps):
        start = step * arguments.batch_size
        batch = [data[index % len(data)] for index in range(start, start + arguments.batch_size)]
        # Losses are sums over tokens: scale the learning rate, or the weights, if you change the batch size.
        forward_backward = training_client.forward_backward(batch, loss_fn="cross_entropy")
        optim_step = training_client.optim_step(adam_params)
        result, _ = forward_backward.result(), optim_step.result()
        num_tokens = sum(sum(datum.loss_fn_inputs["weights"].data) for datum in batch)
        print(f"step {step:3d}  loss per token {result.metrics['loss:sum'] / num_tokens:.4f}")

    print("state  ", training_client.save_state("final").result().path)
    print("sampler", training_client.save_weights_for_sampler("final").result().path)


if __name__ == "__main__":
    main()
