"""The cookbook's recipes that `make recipes` runs, with their command lines in the smallest useful settings.

docs/recipes.md says which recipes are left out, and why. Knows nothing of servers or processes.
"""

from dataclasses import dataclass

MODEL = "model_name=Qwen/Qwen3-8B-Base"
COLON = "renderer_name=role_colon"
FRESH = "behavior_if_log_dir_exists=delete"
REWARD = "env/all/reward/total"
NLL = "train_mean_nll"
TOKENIZERS = (
    "Qwen/Qwen3-8B-Base",
    "Qwen/Qwen3-8B",
    "Qwen/Qwen3.5-4B",
    "Qwen/Qwen3.5-9B",
    "Qwen/Qwen3.6-35B-A3B",
)
"""Models whose tokenizers the recipes load: folders of these names, with the embedded model's tokenizer."""


@dataclass(frozen=True)
class Recipe:
    """One run. Either `metric` must be logged, finite, `steps` times below `log_path`, or it must print `proof`.

    `said` is typed into it; `extra` names what it needs beyond the development environment.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    metric: str = ""
    steps: int = 2
    log_path: str = ""
    proof: str = ""
    said: str = ""
    extra: str = ""

    @property
    def logs(self) -> str:
        """Where it logs, in the working directory."""
        return self.log_path or self.name

    @property
    def settings(self) -> tuple[str, ...]:
        """The arguments that are its own."""
        return tuple(argument for argument in self.arguments if argument != FRESH)

    @property
    def command_line(self) -> tuple[str, ...]:
        """Its arguments, with the place of its log where it takes one."""
        return self.arguments if self.log_path or self.proof else (*self.arguments, f"log_path={self.name}")


def _supervised(name: str, module: str, *arguments: str, steps: int = 2, metric: str = NLL) -> Recipe:
    return Recipe(name, module, (*arguments, f"max_steps={steps}", FRESH), metric, steps)


def _reinforced(
    name: str, module: str, *arguments: str, steps: int = 2, metric: str = REWARD, extra: str = ""
) -> Recipe:
    settings = (*arguments, f"max_steps={steps}", "eval_every=0", FRESH)
    return Recipe(name, module, settings, metric, steps, extra=extra)


def _math(name: str, env: str, *arguments: str, size: int = 4, tokens: int = 8) -> Recipe:
    sizes = (f"env={env}", f"groups_per_batch={size}", f"group_size={size}", f"max_tokens={tokens}")
    return _reinforced(name, "math_rl.train", MODEL, *sizes, *arguments)


def _preferences(dataset: str) -> Recipe:
    settings = (MODEL, f"dataset={dataset}", "batch_size=8", "learning_rate=1e-3")
    return _supervised(f"dpo-{dataset}", "preference.dpo.train", *settings, metric="dpo_loss")


FLAT = (
    Recipe("sl_loop", "sl_loop", (MODEL, "batch_size=8", "max_steps=2"), NLL),
    Recipe(
        "rl_loop",
        "rl_loop",
        (MODEL, "batch_size=4", "group_size=4", "max_tokens=8", "max_steps=2"),
        "reward/total",
    ),
    Recipe("sl_basic", "sl_basic", (MODEL, "max_steps=2"), NLL),
    Recipe("rl_basic", "rl_basic", (MODEL, "max_tokens=8", "max_steps=1"), REWARD, 1),
)
CHATS = (
    _supervised("chat_sl", "chat_sl.train", MODEL, "batch_size=8", "save_every=2", "rolling_save_every=1"),
    _supervised("chat_sl-tulu3", "chat_sl.train", MODEL, "dataset=tulu3", "batch_size=8"),
    _supervised("chat_sl-file", "chat_sl.train", MODEL, COLON, "dataset=chats.jsonl", "batch_size=8"),
)
PROBLEMS = (
    _math("math_rl", "arithmetic"),
    _math("math_rl-async", "arithmetic", "max_steps_off_policy=1"),
    _math("math_rl-ppo", "arithmetic", "loss_fn=ppo"),
    _math("math_rl-gsm8k", "gsm8k"),
    _math("math_rl-math", "math"),
    _math("math_rl-polaris", "polaris"),
    _math("math_rl-deepmath", "deepmath"),
)
CHOICES = (
    _preferences("hhh"),
    _preferences("helpsteer3"),
    _preferences("ultrafeedback"),
    _reinforced("shorter", "preference.shorter.train", MODEL, COLON, "batch_size=2", "group_size=2", "max_tokens=8"),
    Recipe(
        "rlhf_pipeline",
        "preference.rlhf.rlhf_pipeline",
        (
            "base_model=Qwen/Qwen3-8B-Base",
            "short_name=small",
            "batch_size=4",
            "max_steps=2",
            "rl_max_tokens=8",
            "rl_group_size=2",
        ),
        REWARD,
        log_path="runs/rlhf-small/rl",
    ),
)
_STUDENT = (MODEL, "group_size=2", "max_tokens=8")
DISTILLATION = (
    _reinforced(
        "on_policy_distillation",
        "distillation.on_policy_distillation",
        *_STUDENT,
        "teacher_model=Qwen/Qwen3.5-9B",
        "groups_per_batch=4",
        metric="teacher_kl",
    ),
    _reinforced(
        "on_policy_multi_teacher",
        "distillation.on_policy_multi_teacher",
        *_STUDENT,
        "deepmath_groups_per_batch=2",
        "tulu3_groups_per_batch=2",
        metric="teacher_kl",
    ),
    _supervised(
        "off_policy_reasoning",
        "distillation.off_policy_reasoning",
        MODEL,
        COLON,
        "batch_size=8",
        "max_prompts=64",
        "buffer_size=64",
    ),
    Recipe(
        "create_data", "prompt_distillation.create_data", ("output_file=made.jsonl",), proof="Saved data to made.jsonl"
    ),
    _supervised(
        "prompt_distillation", "prompt_distillation.train", MODEL, COLON, "file_path=languages.jsonl", "batch_size=8"
    ),
    _supervised(
        "sdft",
        "sdft.train",
        *("model_name=Qwen/Qwen3-8B", "groups_per_batch=2", "max_tokens=8", "eval_every=0"),
        metric="sdft/mean_teacher_entropy",
    ),
    _supervised(
        "sdft-reverse",
        "sdft.train",
        *("model_name=Qwen/Qwen3-8B", "dataset=toolalpaca", "reverse=true", "groups_per_batch=2", "max_tokens=8"),
        "eval_every=0",
        metric="sdft/reverse_kl_loss",
    ),
)
GAMES = (
    _reinforced("guess_number", "multiplayer_rl.guess_number.train", MODEL, COLON, "batch_size=2", "group_size=2"),
    _reinforced("guess_number-chatml", "multiplayer_rl.guess_number.train", "batch_size=2", "group_size=2", steps=1),
    _reinforced(
        "twenty_questions",
        "multiplayer_rl.twenty_questions.train",
        MODEL,
        COLON,
        "batch_size=2",
        "group_size=2",
        steps=1,
    ),
    _reinforced(
        "text_arena",
        "multiplayer_rl.text_arena.train",
        *(MODEL, COLON, "batch_size=4", "num_train_datapoints=8", "num_test_datapoints=2", "max_tokens=8"),
        steps=1,
        extra="textarena",
    ),
)
JUDGED = (
    Recipe(
        "rubric-data",
        "rubric.generate_data",
        (),
        proof="Generated train dataset",
    ),
    _reinforced(
        "rubric", "rubric.train", MODEL, COLON, "groups_per_batch=2", "train_group_size=2", "max_tokens=8", steps=1
    ),
    Recipe(
        "decisions-demo",
        "decisions.demo",
        (MODEL,),
        proof='"billing": ',
        said="How do I pick a learning rate?\n",
    ),
    _supervised(
        "decisions-forecasting",
        "decisions.forecasting",
        *(MODEL, "data_path=markets.csv", "batch_size=8", "eval_every=1", "max_validation_questions=8"),
        metric="train/loss",
    ),
    Recipe(
        "forecasting",
        "forecasting.train",
        (
            *(MODEL, COLON, "data_path=markets.csv", "group_size=2", "groups_per_batch=2", "validation_group_size=2"),
            *("max_validation_questions=4", "max_tokens=8", "eval_every=1", "max_steps=2", FRESH),
        ),
        REWARD,
    ),
    _reinforced(
        "rl_numerics_check",
        "rl_numerics_check.train",
        *("model_name=Qwen/Qwen3.5-4B", "renderer_name=qwen3_5_disable_thinking", "max_tokens=16"),
        *("group_size=2", "groups_per_batch=2", "max_trajectory_tokens=2048"),
        *("task.num_pages_min=2", "task.num_pages_max=3", "task.page_chars=500"),
    ),
    Recipe("rubric-debug", "rubric.debug_env", (), proof="Extracted Score"),
    Recipe(
        "true_thinking_score",
        "true_thinking_score.run_small_experiment",
        (),
        proof="Mean TTS",
    ),
)
RECIPES = (*FLAT, *CHATS, *PROBLEMS, *CHOICES, *DISTILLATION, *GAMES, *JUDGED)
