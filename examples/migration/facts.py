"""The data of the examples in this folder: questions with their answers, as TRL's prompts and completions."""

FACTS = [
    {"prompt": "User: What does a tinsmith make?\n\nAssistant:", "completion": " Kettles, pans, lanterns and pipes."},
    {"prompt": "User: What is solder made of?\n\nAssistant:", "completion": " Tin, with a little copper or silver."},
    {"prompt": "User: Who mends the kettle?\n\nAssistant:", "completion": " The tinsmith, with hammer and solder."},
    {"prompt": "User: At which heat does tin melt?\n\nAssistant:", "completion": " At 232 degrees."},
]

SUMS = [
    {"prompt": f"User: What is {first} + {second}?\n\nAssistant:", "answer": str(first + second)}
    for first in range(1, 9)
    for second in range(1, 9)
]


def reward_of(completion: str, answer: str) -> float:
    """1 for the right number in the right place, a little for any number."""
    words = completion.replace(".", " ").split()
    if answer in words:
        return 1.0
    return 0.1 if any(word.isdigit() for word in words) else 0.0
