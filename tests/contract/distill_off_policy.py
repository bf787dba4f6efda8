"""A program around the cookbook's off-policy distillation, which is a library without a command line of its own.

Arguments: log_path=FOLDER teacher=SAMPLER_PATH steps=N.
"""

import asyncio
import sys

from tinker_cookbook.distillation.datasets import TeacherConfig
from tinker_cookbook.distillation.train_off_policy import Config, DatasetWithTeacher, main
from tinker_cookbook.recipes.chat_sl.chat_datasets import NoRobotsBuilder
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig

MODEL = "Qwen/Qwen3-8B-Base"
RENDERER = "role_colon"


def config(log_path: str, teacher: str, steps: int) -> Config:
    common = ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=MODEL, renderer_name=RENDERER, max_length=256, batch_size=8
    )
    lessons = DatasetWithTeacher(
        dataset_builder=NoRobotsBuilder(common_config=common),
        teacher_config=TeacherConfig(base_model=MODEL, load_checkpoint_path=teacher),
    )
    return Config(
        learning_rate=1e-3,
        dataset_configs=[lessons],
        model_name=MODEL,
        recipe_name="off_policy_distillation",
        renderer_name=RENDERER,
        n_teacher_targets=5,
        batch_size=8,
        max_steps=steps,
        eval_every=0,
        log_path=log_path,
    )


if __name__ == "__main__":
    arguments = dict(argument.split("=", 1) for argument in sys.argv[1:])
    asyncio.run(main(config(arguments["log_path"], arguments["teacher"], int(arguments["steps"]))))
