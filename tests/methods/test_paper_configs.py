"""`exp/paper/*` and the recipes against tables transcribed from the papers and their code."""

import copy
import functools

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from rltoken.config import check_keys, register_schemas
from rltoken.supervised import arguments
from rltoken.train import checked

BRPO = {  # arXiv 2505.13438v3 and sail-sg/AnytimeReasoner, the 1.5B run with 8000 tokens
    "model.path": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "model.forced.ellipsis": "...\n\n...\n\n",
    "model.think_end": "</think>",
    "model.forced.header": "\n\n**Final Answer**\n",
    "data.hub": "agentica-org/DeepScaleR-Preview-Dataset",
    "data.template": "{problem} Let's think step by step and output the final answer within \\boxed{}.",
    "data.max_prompt_tokens": 1024,
    "method.rows.brpo.budgets": [2000, 4000, 6000, 8000],
    "method.controls.brpo.budgets": [2000, 4000, 6000, 8000],
    "method.rows.brpo.n_summaries": 4,
    "method.rows.brpo.max_new_tokens": 118,
    "method.rows.brpo.decoupled": True,
    "method.rows.brpo.summary_train_rows": "all",
    "method.rows.brpo.summary_weight": "code",
    "method.credits.brpo.mode": "brpo",
    "method.credits.brpo.decay": 0.5,
    "trainer.num_generations": 8,
    "trainer.num_train_epochs": 1,
    "trainer.learning_rate": 1e-6,
    "trainer.lr_scheduler_type": "constant",
    "trainer.max_grad_norm": 1.0,
    "trainer.epsilon": 0.2,
    "trainer.epsilon_high": None,
    "trainer.beta": 0.0,
    "trainer.entropy_coef": 0.0,
    "trainer.temperature": 1.0,
    "trainer.top_p": 1.0,
    "trainer.loss_type": "dr_grpo",
    "trainer.scale_rewards": "none",
    "trainer.max_completion_length": 8000 + 4 * 4 * 128 + 128,
    "eval.temperature": 0.6,
    "eval.budgets": [2000, 4000, 6000, 8000],
    "eval.samples": 32,
}
KDRL = {  # arXiv 2506.02208, from summaries
    "model.path": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "teacher.kind": "model",
    "teacher.path": "Skywork/Skywork-OR1-Math-7B",
    "method.aux.kdrl.estimator": "k2",
    "method.aux.kdrl.beta": 2e-3,
    "method.aux.kdrl.delta": 0.0,
    "method.aux.kdrl.masking": "none",
    "trainer.loss_type": "dapo",
    "trainer.max_steps": 280,
    "trainer.beta": 0.0,
}
FAST_MATH = {  # arXiv 2507.08267 and analokmaus/kaggle-aimo2-fast-math-r1, for DeepSeek-R1-Distill-Qwen-14B
    "model.path": "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B",
    "sft.trainer.num_train_epochs": 10,
    "sft.trainer.learning_rate": 1e-5,
    "sft.trainer.lr_scheduler_type": "cosine",
    "sft.trainer.optim": "paged_adamw_8bit",
    "sft.trainer.packing": True,
    "sft.trainer.max_length": 24000,
    "data.max_prompt_tokens": 512,
    "method.shapes.fast_math_r1.longest": 10000,
    "method.shapes.fast_math_r1.gated": False,
    "trainer.max_steps": 50,
    "trainer.learning_rate": 4e-6,
    "trainer.lr_scheduler_type": "cosine",
    "trainer.num_generations": 8,
    "trainer.max_completion_length": 16384,
    "trainer.beta": 0.04,
    "trainer.epsilon": 0.2,
    "trainer.temperature": 1.0,
    "trainer.top_p": 0.9,
    "trainer.min_p": 0.05,
    "trainer.loss_type": "bnpo",
    "trainer.scale_rewards": "group",
}
ARM = {  # arXiv 2505.20258 and TEAM-ARM/ARM, the 7B run
    "sft.merge": True,
    "sft.trainer.num_train_epochs": 6,
    "sft.trainer.learning_rate": 2e-4,
    "sft.trainer.lr_scheduler_type": "cosine",
    "sft.trainer.warmup_steps": 0.1,
    "sft.trainer.max_length": 4096,
    "model.lora.target_modules": "all-linear",
    "data.max_prompt_tokens": 2048,
    "method.shapes.ada_grpo.strip": False,
    "method.shapes.ada_grpo.tags": {"direct": "<ANSWER>", "short": "<COT>", "code": "<CODE>", "long": "<LONG_COT>"},
    "trainer.num_train_epochs": 9,
    "trainer.learning_rate": 1e-6,
    "trainer.num_generations": 8,
    "trainer.max_completion_length": 4096,
    "trainer.beta": 0.001,
    "trainer.epsilon": 0.2,
    "trainer.loss_type": "dapo",
    "trainer.scale_rewards": "group",
    "eval.temperature": 0.7,
    "eval.samples": 8,
}
ANNEALING = {"beta": 5e-3, "delta": 5e-5, "beta_min": 1e-3, "estimator": "k2"}
RECIPES = {  # A, decoupled, budgets, prior, baseline
    "grpo": (1, False, 1, "base", "v2only"),
    "grpo_linear": (1, False, 4, "linear", "v2only"),
    "grpo_decouple": (4, True, 4, "base", "v2only"),
    "grpo_vr": (1, False, 4, "base", "brpo"),
    "ar_base": (4, True, 4, "base", "brpo"),
    "ar_linear": (4, True, 4, "linear", "brpo"),
    "ar_uniform": (4, True, 4, "uniform", "brpo"),
}


@functools.cache
def composed(*overrides):
    """The configuration of a command line; not to be changed."""
    register_schemas()
    with initialize_config_module("rltoken.conf", version_base="1.3"):
        return compose("config", overrides=list(overrides))


@pytest.mark.parametrize("key", BRPO)
def test_paper_brpo(key):
    value = OmegaConf.select(composed("+exp=paper/brpo"), key)
    assert (OmegaConf.to_container(value) if OmegaConf.is_config(value) else value) == BRPO[key]


@pytest.mark.parametrize("key", KDRL)
def test_paper_kdrl(key):
    assert OmegaConf.select(composed("+exp=paper/kdrl"), key) == KDRL[key]


@pytest.mark.parametrize("key", ANNEALING)
def test_paper_kdrl_annealing(key):
    assert composed("+exp=kdrl/annealing").method.aux.kdrl[key] == ANNEALING[key]


def test_paper_kdrl_passes_the_checks(tmp_path):
    cfg = copy.deepcopy(composed("+exp=paper/kdrl", "hardware=cpu"))
    check_keys(cfg)
    pipeline, args, _ = checked(cfg, tmp_path)
    assert pipeline.needs("teacher_logps") and args.num_iterations == 1


def test_paper_brpo_samples_64_problems_and_updates_twice(tmp_path):
    cfg = copy.deepcopy(composed("+exp=paper/brpo", "hardware=cpu"))
    check_keys(cfg)
    _, args, _ = checked(cfg, tmp_path)
    assert args.per_device_train_batch_size * args.steps_per_generation == 64 * args.num_generations
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 32 * args.num_generations
    assert args.num_iterations == 1 and args.warmup_steps == 0 and args.max_steps == -1


@pytest.mark.parametrize(
    ("exp", "key", "value"),
    [("fast_math_r1", *item) for item in FAST_MATH.items()] + [("ada_grpo", *item) for item in ARM.items()],
)
def test_papers_of_two_stages(exp, key, value):
    found = OmegaConf.select(composed(f"+exp=paper/{exp}"), key)
    assert (OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found) == value


def test_papers_of_two_stages_pass_the_checks_with_their_batches(tmp_path):
    """128 rollouts an update; 64 traces; and windows of 1024 problems."""
    for exp, rollouts, window, rows in (("fast_math_r1", 128, 128, 64), ("ada_grpo", 1024, 8192, 128)):
        cfg = copy.deepcopy(composed(f"+exp=paper/{exp}", "hardware=cpu", "trainer.optim=adamw_torch"))
        check_keys(cfg)
        _, args, lora = checked(cfg, tmp_path)
        supervised = arguments(cfg, tmp_path)
        assert args.per_device_train_batch_size * args.gradient_accumulation_steps == rollouts
        assert args.per_device_train_batch_size * args.steps_per_generation == window
        assert supervised.per_device_train_batch_size * supervised.gradient_accumulation_steps == rows
        assert (lora is not None) == (exp == "ada_grpo") == cfg.sft.merge


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes(recipe, tmp_path):
    cfg = copy.deepcopy(composed(f"+exp=brpo/{recipe}"))
    rows, credit = cfg.method.rows.brpo, cfg.method.credits.brpo
    assert (rows.n_summaries, rows.decoupled, len(rows.budgets), credit.prior, credit.mode) == RECIPES[recipe]
    check_keys(cfg)
    checked(cfg, tmp_path)
