"""Reinforcement learning (GRPO) with TRL, in this process. `tinker_grpo.py` is the same, on a Tinsmith server.

pip install trl peft datasets
python examples/migration/trl_grpo.py --model "$(tinsmith models path tiny)"
"""

import argparse
import tempfile

from datasets import Dataset
from facts import SUMS, reward_of
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class PrintReward(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" in logs:
            print(f"step {state.global_step:3d}  reward {float(logs['reward']):.4f}")


def rewards_of(completions, answer, **kwargs):
    return [reward_of(text, right) for text, right in zip(completions, answer, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="a folder or a hub name")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--questions", type=int, default=8, help="in a batch")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    arguments = parser.parse_args()

    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.questions * arguments.group_size,
        num_generations=arguments.group_size,
        max_completion_length=16,
        temperature=1.0,
        beta=0.0,
        scale_rewards="group",
        loss_type="dapo",
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        logging_steps=1,
        bf16=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=arguments.model,
        args=config,
        reward_funcs=rewards_of,
        train_dataset=Dataset.from_list(SUMS),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[PrintReward()],
    )
    trainer.train()


if __name__ == "__main__":
    main()
