"""Supervised fine-tuning with TRL, in this process. `tinker_sft.py` is the same, on a Tinsmith server.

pip install trl peft datasets
python examples/migration/trl_sft.py --model "$(tinsmith models path tiny)"
"""

import argparse
import tempfile

from datasets import Dataset
from facts import FACTS
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer


class PrintLoss(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            print(f"step {state.global_step:3d}  loss {float(logs['loss']):.4f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="a folder or a hub name")
    parser.add_argument("--rank", type=int, default=16, help="0: all parameters")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    arguments = parser.parse_args()

    config = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=arguments.steps,
        per_device_train_batch_size=len(FACTS),
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        completion_only_loss=True,
        logging_steps=1,
        bf16=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    lora = LoraConfig(r=arguments.rank, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=arguments.model,
        args=config,
        train_dataset=Dataset.from_list(FACTS),
        peft_config=lora if arguments.rank else None,
        callbacks=[PrintLoss()],
    )
    trainer.train()


if __name__ == "__main__":
    main()
