"""`exp/paper/*` and the recipes against tables transcribed from the papers and their code."""

import copy
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from rltoken.config import check_keys
from rltoken.supervised import arguments
from rltoken.train import checked
from tests.methods.configured import composed

CONF = Path(__file__).resolve().parents[2] / "conf"
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
    "trainer.use_bias_correction_kl": False,
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
    "method.shapes.ada_grpo.structures": None,
    "method.shapes.ada_grpo.diversity": True,
    "method.shapes.ada_grpo.tags": {"direct": "<ANSWER>", "short": "<COT>", "code": "<CODE>", "long": "<LONG_COT>"},
    "trainer.num_train_epochs": 9,
    "trainer.learning_rate": 1e-6,
    "trainer.num_generations": 8,
    "trainer.max_completion_length": 4096,
    "trainer.beta": 0.001,
    "trainer.use_bias_correction_kl": False,
    "trainer.epsilon": 0.2,
    "trainer.loss_type": "dapo",
    "trainer.scale_rewards": "group",
    "eval.temperature": 0.7,
    "eval.samples": 8,
}
CAMPO = {  # arXiv 2507.14683 and MiroMindAsia/MiroMind-M1, the 7B script
    "model.path": "miromind-ai/MiroMind-M1-SFT-7B",
    "data.template": "{problem} Let's think step by step and enclose the reasoning process within <think> and </think> "
    "tags. The final result in the answer MUST BE within \\boxed{}.",
    "method.controls.campo.stages": [[0, 16384], [1200, 32768]],
    "method.controls.campo.clips": [[0.2, 0.28]],
    "method.controls.campo.windows": None,
    "method.shapes.campo.reading": "paper",
    "trainer.max_completion_length": 32768,
    "trainer.num_generations": 16,
    "trainer.temperature": 1.0,
    "trainer.top_p": 1.0,
    "trainer.learning_rate": 1e-6,
    "trainer.lr_scheduler_type": "constant_with_warmup",
    "trainer.warmup_steps": 10,
    "trainer.weight_decay": 0.1,
    "trainer.max_grad_norm": 1.0,
    "trainer.beta": 0.0,
    "trainer.entropy_coef": 0.0,
    "trainer.loss_type": "dapo",
    "trainer.delta": 10,
}
DAPO = {  # arXiv 2503.14476, the lengths recalled
    "trainer.loss_type": "dapo",
    "trainer.epsilon": 0.2,
    "trainer.epsilon_high": 0.28,
    "trainer.max_completion_length": 20480,
    "reward.funcs.overlong.max_completion_len": 20480,
    "reward.funcs.overlong.soft_punish_cache": 4096,
    "method.rows.dynamic_sampling.max_rounds": 3,
}
GSPO = {"trainer.epsilon": 3e-4, "trainer.epsilon_high": 4e-4, "trainer.beta": 0.0, "trainer.num_iterations": 1}
RLVR = {  # allenai/open-instruct, OLMo-2-1B
    "data.hub": "openai/gsm8k",
    "reward.last_number": True,
    "method.shapes.dler.factor": 0.0,
    "trainer.reward_weights": [10.0],
    "trainer.learning_rate": 5e-7,
    "trainer.lr_scheduler_type": "constant",
    "trainer.beta": 0.01,
    "trainer.num_generations": 16,
    "trainer.max_completion_length": 2048,
    "trainer.temperature": 1.0,
}
L1 = {  # arXiv 2503.04697 and cmu-l3/l1
    "method.prompts.l1.least": 100,
    "method.prompts.l1.most": 4000,
    "trainer.num_generations": 16,
    "trainer.temperature": 0.6,
    "trainer.beta": 1e-3,
    "trainer.use_bias_correction_kl": False,
}
L1_EXACT = L1 | {
    "model.path": "agentica-org/DeepScaleR-1.5B-Preview",
    "method.prompts.l1.ask": "exact",
    "method.shapes.l1_exact.alpha": 3e-4,
    "method.shapes.l1_exact.gated": False,
    "trainer.learning_rate": 1e-6,
    "trainer.max_completion_length": 4096,
    "trainer.num_train_epochs": 3,
    "trainer.max_steps": -1,
}
L1_MAX = L1 | {
    "method.prompts.l1.ask": "both",
    "method.shapes.l1_max.alpha": 3e-4,
    "method.shapes.l1_max.delta": 0.5,
    "method.shapes.l1_max.reading": "paper",
    "method.shapes.l1_max.gated": False,
    "trainer.learning_rate": 4e-6,
    "trainer.max_completion_length": 4500,
}
ARORA_ZANETTE = {  # arXiv 2502.04463 and Zanette-Labs/efficient-reasoning
    "method.shapes.arora_zanette.alpha": 0.1,
    "trainer.num_generations": 8,
    "trainer.learning_rate": 5e-6,
    "trainer.beta": 1e-3,
    "trainer.max_completion_length": 32768,
    "trainer.max_steps": 3200 // 32 * 2,
}
LASER_DE = {  # arXiv 2505.15612 and hkust-nlp/Laser
    "method.shapes.laser_de.lowest": 4096,
    "method.shapes.laser_de.highest": 16384,
    "method.shapes.laser_de.interval": 1024,
    "method.shapes.laser_de.every": 20,
    "method.shapes.laser_de.bonus": 0.5,
    "method.shapes.laser_de.wrong": -0.5,
    "method.shapes.laser_de.gated": False,
    "trainer.epsilon": 0.2,
    "trainer.epsilon_high": 0.28,
    "trainer.learning_rate": 1e-6,
    "trainer.num_generations": 8,
    "trainer.temperature": 0.6,
    "trainer.max_completion_length": 16384,
    "trainer.beta": 1e-3,
    "trainer.entropy_coef": 1e-3,
}
SHORTER_BETTER = {  # arXiv 2504.21370
    "method.shapes.shorter_better.alpha": 2.0,
    "method.shapes.shorter_better.beta": 0.001,
    "method.shapes.shorter_better.gated": False,
}
GRPO_LEAD = {  # arXiv 2504.09696 and aeroplanepaper/GRPO-LEAD
    "method.shapes.grpo_lead.alpha": 0.05,
    "method.shapes.grpo_lead.wrong": -1.0,
    "method.shapes.grpo_lead.longer_than": 4000,
    "method.credits.grpo_lead.lowest": 0.4,
    "method.credits.grpo_lead.highest": 1.5,
    "method.credits.grpo_lead.midpoint": 0.75,
    "method.credits.grpo_lead.steepness": 10.0,
}
DLER = {  # arXiv 2510.15110 and NVlabs/DLER
    "method.rows.dynamic_sampling.max_rounds": 3,
    "method.shapes.dler.factor": 0.1,
    "method.credits.dler.boost": 0.1,
    "trainer.max_completion_length": 4000,
    "trainer.loss_type": "dapo",
    "trainer.epsilon": 0.2,
    "trainer.epsilon_high": 0.28,
    "trainer.delta": 10,
    "trainer.beta": 5e-4,
    "trainer.num_generations": 16,
    "trainer.learning_rate": 1e-6,
    "trainer.temperature": 1.0,
}
THINK_PRUNE = {  # arXiv 2504.01296 and UCSB-NLP-Chang/ThinkPrune
    "method.controls.think_prune.stages": [[0, 4000], [180, 3000], [360, 2000]],
    "method.prompts.think_prune.stages": [[0, 4000], [180, 3000], [360, 2000]],
    "trainer.max_completion_length": 4000,
    "trainer.num_generations": 16,
    "trainer.learning_rate": 1e-6,
    "trainer.beta": 1e-3,
}
HBPO = {  # arXiv 2507.15844
    "method.prompts.hbpo.budgets": [512, 1024, 2048, 2560],
    "method.shapes.hbpo.beta": 4.0,
    "method.shapes.hbpo.alpha": None,
    "method.shapes.hbpo.longest": 4096,
    "method.shapes.hbpo.gated": False,
    "trainer.max_completion_length": 4096,
}
MRT = {  # arXiv 2503.07572, tables 3 and 5, at second hand
    "model.path": "agentica-org/DeepScaleR-1.5B-Preview",
    "model.episodes.separator": "\n\n",
    "data.max_prompt_tokens": 4096,
    "method.credits.mrt.baseline": "termination",
    "trainer.num_generations": 4,
    "trainer.temperature": 0.9,
    "trainer.max_completion_length": 24576,
    "trainer.num_train_epochs": 1,
    "trainer.max_steps": -1,
    "trainer.learning_rate": 1e-6,
    "trainer.lr_scheduler_type": "cosine",
    "trainer.warmup_steps": 0.1,
    "trainer.weight_decay": 0.01,
}
THR = {  # arXiv 2510.03669, at second hand
    "model.path": "Qwen/Qwen2.5-Math-1.5B",
    "data.hub": "DigitalLearningGmbH/MATH-lighteval",
    "method.weights.thr.p": 0.1,
    "method.weights.thr.tau_mode": "min",
    "method.weights.thr.length_norm": True,
    "method.rows.dynamic_sampling.max_rounds": 3,
    "trainer.max_steps": 40,
    "trainer.num_generations": 8,
    "trainer.learning_rate": 1e-6,
    "trainer.epsilon": 0.2,
    "trainer.beta": 1e-4,
    "trainer.temperature": 1.0,
    "eval.temperature": 0,
}
NTHR = {  # arXiv 2505.18830, the 1.5B run on DeepScaleR
    "model.path": "Qwen/Qwen2.5-Math-1.5B",
    "data.hub": "agentica-org/DeepScaleR-Preview-Dataset",
    "method.weights.nthr.eta": "2|0.5-q|",
    "method.weights.nthr.beta": 1.0,
    "method.weights.nthr.length_norm": False,
    "trainer.max_steps": 45 * 256 // 64,
    "trainer.max_completion_length": 2500,
    "trainer.learning_rate": 1e-6,
    "trainer.epsilon": 0.2,
    "trainer.beta": 1e-4,
    "eval.temperature": 0,
}
TTRL = {  # arXiv 2504.16084 and PRIME-RL/TTRL, the AIME script
    "data.hub": "HuggingFaceH4/aime_2024",
    "data.split": "train",
    "data.eval_hub": "HuggingFaceH4/aime_2024",
    "data.eval_split": "train",
    "method.rows.extra_votes.votes": 64 - 32,
    "trainer.num_generations": 32,
    "trainer.num_train_epochs": 80,
    "trainer.max_steps": -1,
    "trainer.max_completion_length": 3072,
    "trainer.learning_rate": 5e-7,
    "trainer.lr_scheduler_type": "cosine",
    "trainer.warmup_steps": 0.03,
    "trainer.beta": 1e-3,
    "trainer.temperature": 1.0,
    "eval.temperature": 0.6,
    "eval.top_p": 0.95,
    "eval.samples": 16,
}
SPINE = {  # arXiv 2511.17938 version 1, from a summary
    "model.path": "Qwen/Qwen3-1.7B",
    "method.weights.spine_forks.rho": 0.2,
    "method.aux.entropy_band.low": 0.1,
    "method.aux.entropy_band.high": 0.5,
    "trainer.num_generations": 8,
    "eval.temperature": 0,
    "eval.samples": 1,
}
HAPO = {  # arXiv 2509.16591 and starriver030515/HAPO, recipe/qwen2.5_math_7b.sh
    "model.path": "starriver030515/Qwen2.5-Math-7B-32k",
    "data.max_prompt_tokens": 1024,
    "reward.funcs.overlong.max_completion_len": 10240,
    "reward.funcs.overlong.soft_punish_cache": 4096,
    "method.rows.dynamic_sampling.max_rounds": 16 - 1,
    "method.controls.hapo_entropy.form": "released",
    "method.controls.hapo_entropy.tau": 0.05,
    "method.controls.hapo_entropy.rho": 0.8,
    "method.credits.hapo_entropy.fallback_at": 5,
    "method.bounds.hapo_entropy.low": 0.2,
    "method.bounds.hapo_entropy.high": 0.2,
    "method.bounds.hapo_entropy.alpha": 1.0,
    "method.bounds.hapo_entropy.sign": "released",
    "method.weights.hapo_entropy.beta": 1.0,
    "method.weights.hapo_entropy.sign": "released",
    "trainer.num_train_epochs": 1,
    "trainer.max_steps": -1,
    "trainer.num_generations": 16,
    "trainer.max_completion_length": 10240,
    "trainer.learning_rate": 1e-6,
    "trainer.lr_scheduler_type": "constant_with_warmup",
    "trainer.warmup_steps": 10,
    "trainer.weight_decay": 0.1,
    "trainer.max_grad_norm": 1.0,
    "trainer.loss_type": "dapo",
    "trainer.epsilon": 0.2,
    "trainer.epsilon_high": 0.2,
    "trainer.delta": 10,
    "trainer.beta": 0.0,
    "trainer.entropy_coef": 0.0,
    "trainer.temperature": 1.0,
    "eval.temperature": 0.5,
    "eval.top_p": 0.7,
    "eval.samples": 8,
}
LASER_SELF_REWARD = {  # arXiv 2510.14943 and RUCBM/LaSeR, run_qwen2_5_7b.sh
    "model.path": "Qwen/Qwen2.5-7B",
    "model.appended": "<|vision_start|>",
    "data.hub": "zwhe99/DeepMath-103K",
    "data.max_prompt_tokens": 2048,
    "method.aux.self_reward.alpha": 0.1,
    "method.aux.self_reward.scale": 0.1,
    "method.aux.self_reward.reference": -23.0,
    "method.aux.self_reward.after": 200,
    "method.credits.self_reward.share": 0.1,
    "method.credits.self_reward.least": 0.1,
    "method.credits.self_reward.clamp": False,
    "method.credits.self_reward.scale": 0.1,
    "method.credits.self_reward.reference": -23.0,
    "method.credits.self_reward.after": 200 + 200,
    "trainer.num_train_epochs": 2,
    "trainer.max_steps": -1,
    "trainer.num_generations": 8,
    "trainer.max_completion_length": 8192,
    "trainer.learning_rate": 1e-6,
    "trainer.scale_rewards": "group",
    "trainer.beta": 0.0,
    "trainer.temperature": 1.0,
    "eval.samples": 2,
}
COVARIANCE = {  # arXiv 2505.22617 and recipe/entropy/7b_*_cov.sh of verl
    "model.path": "Qwen/Qwen2.5-7B",
    "data.max_prompt_tokens": 2048,
    "method.rows.dynamic_sampling.max_rounds": 10 - 1,
    "trainer.num_generations": 8,
    "trainer.max_completion_length": 8192,
    "trainer.learning_rate": 1e-6,
    "trainer.lr_scheduler_type": "constant",
    "trainer.weight_decay": 0.0,
    "trainer.loss_type": "dapo",
    "trainer.beta": 0.0,
    "trainer.temperature": 1.0,
    "eval.temperature": 0,
}
CLIP_COV = COVARIANCE | {
    "method.weights.clip_cov.share": 2e-4,
    "method.weights.clip_cov.lower": 1.0,
    "method.weights.clip_cov.upper": 5.0,
    "trainer.epsilon": 1.0,
    "trainer.epsilon_high": None,
}
KL_COV = COVARIANCE | {"method.marks.high_covariance.share": 2e-3, "method.aux.kl_cov.beta": 1.0}
PAPERS = {
    "brpo": BRPO,
    "kdrl": KDRL,
    "campo": CAMPO,
    "dapo": DAPO,
    "gspo": GSPO,
    "rlvr": RLVR,
    "l1_exact": L1_EXACT,
    "l1_max": L1_MAX,
    "arora_zanette": ARORA_ZANETTE,
    "laser_de": LASER_DE,
    "shorter_better": SHORTER_BETTER,
    "grpo_lead": GRPO_LEAD,
    "dler": DLER,
    "think_prune": THINK_PRUNE,
    "hbpo": HBPO,
    "mrt": MRT,
    "thr": THR,
    "nthr": NTHR,
    "ttrl": TTRL,
    "spine": SPINE,
    "hapo_entropy": HAPO,
    "laser_self_reward": LASER_SELF_REWARD,
    "clip_cov": CLIP_COV,
    "kl_cov": KL_COV,
}
BATCHES = {  # problems of a window, of an optimizer step
    "campo": (256, 256),
    "rlvr": (48, 48),
    "l1_exact": (128, 64),
    "l1_max": (128, 64),
    "arora_zanette": (32, 16),
    "laser_de": (128, 64),
    "dler": (256, 64),
    "think_prune": (128, 128),
    "brpo": (64, 32),
    "mrt": (64, 64),
    "thr": (256, 256),
    "nthr": (256, 64),
    "ttrl": (8, 1),
    "hapo_entropy": (512, 32),
    "laser_self_reward": (128, 128),
    "clip_cov": (256, 32),
    "kl_cov": (256, 32),
}
UNKNOWN_PATH = dict.fromkeys(("l1_max", "rlvr"), ("model.path=FOLDER",))
"""What has to be given, since it comes from a run of one's own, or its address is not known to us."""
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


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, table in PAPERS.items() for key in table])
def test_papers(name, key):
    value = OmegaConf.select(composed(f"+exp=paper/{name}", *UNKNOWN_PATH.get(name, ())), key)
    assert (OmegaConf.to_container(value) if OmegaConf.is_config(value) else value) == PAPERS[name][key]


def test_every_paper_has_a_table():
    tables = PAPERS.keys() | {"fast_math_r1", "ada_grpo"}
    assert {path.stem for path in (CONF / "exp/paper").glob("*.yaml")} == tables


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "exp/paper").glob("*.yaml")))
def test_no_papers_kl_term_is_multiplied_by_the_ratio(name):
    trainer = composed(f"+exp=paper/{name}", *UNKNOWN_PATH.get(name, ())).trainer
    assert trainer.beta == 0 or not trainer.use_bias_correction_kl


@pytest.mark.parametrize("name", PAPERS)
def test_papers_pass_the_checks(name, tmp_path):
    cfg = copy.deepcopy(composed(f"+exp=paper/{name}", "hardware=cpu", *UNKNOWN_PATH.get(name, ())))
    check_keys(cfg)
    _, args, _ = checked(cfg, tmp_path)
    if name in BATCHES:
        window, step = BATCHES[name]
        assert args.per_device_train_batch_size * args.steps_per_generation == window * args.num_generations
        assert args.per_device_train_batch_size * args.gradient_accumulation_steps == step * args.num_generations
        assert args.num_iterations == 1


def test_paper_gspo_takes_a_window_in_four_steps(tmp_path):
    _, args, _ = checked(copy.deepcopy(composed("+exp=paper/gspo", "hardware=cpu")), tmp_path)
    assert args.steps_per_generation == 4 * args.gradient_accumulation_steps


@pytest.mark.parametrize("key", ANNEALING)
def test_paper_kdrl_annealing(key):
    assert composed("+exp=kdrl/annealing").method.aux.kdrl[key] == ANNEALING[key]


def test_paper_kdrl_asks_its_teacher_on_policy(tmp_path):
    pipeline, args, _ = checked(copy.deepcopy(composed("+exp=paper/kdrl", "hardware=cpu")), tmp_path)
    assert pipeline.needs("teacher_logps") and args.num_iterations == 1


def test_paper_brpo_runs_for_one_epoch_without_warm_up(tmp_path):
    _, args, _ = checked(copy.deepcopy(composed("+exp=paper/brpo", "hardware=cpu")), tmp_path)
    assert args.warmup_steps == 0 and args.max_steps == -1


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
        optim = ("trainer.optim=adamw_torch", "sft.trainer.optim=adamw_torch")
        cfg = copy.deepcopy(composed(f"+exp=paper/{exp}", "hardware=cpu", *optim))
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
