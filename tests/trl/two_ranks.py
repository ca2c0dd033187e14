"""Train on replayed rollouts and save what comes out: started by test_two_ranks.py, alone or by accelerate launch."""

import functools
import gc
import hashlib
import sys
from collections import Counter
from pathlib import Path

import torch
from datasets import load_from_disk
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

from rltoken.cli import leave_process_group
from rltoken.config import register_schemas, to_grpo_config
from rltoken.methods.brpo import brpo, budget_answers, thinking_only
from rltoken.methods.budget_prompt import budget_prompt
from rltoken.methods.campo import StagedLength, without_loops
from rltoken.methods.entropy_advantage import entropy_advantage
from rltoken.methods.entropy_bonus import entropy_bonus
from rltoken.methods.entropy_covariance import clip_cov, high_covariance, kl_cov, unclipped
from rltoken.methods.forced_answer import forced_answer, group_centred
from rltoken.methods.forking_tokens import forks
from rltoken.methods.gspo_token import gspo_token
from rltoken.methods.hapo_entropy import AdaptiveTemperature, Redistribution, adaptive_clip, token_average
from rltoken.methods.kdrl import Distillation, distilled_advantage
from rltoken.methods.last_token import class_balance, mix_self_reward, self_reward_loss
from rltoken.methods.length_regularised import length_regularised
from rltoken.methods.mrt import episode_answers, episode_credit, mrt, mrt_progress, prefix_rollouts
from rltoken.methods.spine import entropy_band, masked_kl, mixed_groups, random_tokens, reference_band, spine_forks
from rltoken.methods.thr import nthr, thr
from rltoken.methods.ttrl import majority_vote
from rltoken.pipeline import build
from rltoken.trainer import TokenGRPOTrainer
from rltoken.trl_compat import gather_list
from rltoken.types import Template
from tests.cli.test_smoke import SHRUNK
from tests.trl.on_cpu import sharded, stand_in
from tests.trl.teachers import a_teacher


def whole_batch_rank(rewards):
    """A shaper that needs the rewards of all ranks: the share of the window's rewards that are lower."""
    return (rewards.unsqueeze(0) < rewards.unsqueeze(1)).float().mean(1)


def classes(texts, group):
    """Two answers, told apart by the number of words."""
    return [len(text.split()) % 2 for text in texts]


def bonus_of_summaries(entropy):
    """An auxiliary loss of summary rows with a metric: some micro-batch on some rank has none of them."""
    return -0.01 * entropy, {"summary_entropy": entropy.mean().item()}


def mean_reward_of_a_rank(old_hidden, rewards):
    """Weights of 1, and a metric of a stage that sees the rows of its rank alone, as whoever names hidden states."""
    return torch.ones_like(rewards), {"mean_reward": rewards.mean().item()}


BUDGETS = {"budgets": [2, 4, 7], "longest": 8, "drawn": True}
ALL = {"n_summaries": 2, "max_new_tokens": 3, "summary_train_rows": "all"}
CLIPS = [[0.001, 0.002], [0.3, 0.3]]
EPISODES = {"separator": None, "markers": ["1", "2", "3"]}
METHODS = {
    "grpo": {},
    "tokens": {
        "prompts": {"budget": functools.partial(budget_prompt, budgets=[4, 8])},
        "shapes": {
            "rank": whole_batch_rank,
            "length": functools.partial(length_regularised, longest=12),
        },
        "credits": {
            "entropy": functools.partial(entropy_advantage, alpha=0.05),
            "kdrl": functools.partial(distilled_advantage, beta=0.5, masking="group"),
        },
        "weights": {"forks": functools.partial(forks, rho=0.3)},
        "ratios": {"gspo": gspo_token},
        "aux": {
            "bonus": functools.partial(entropy_bonus, coef=0.05),
            "band": functools.partial(entropy_band, coef=0.5),
        },
    },
    "thr": {
        "weights": {"thr": functools.partial(thr, p=0.5, max_tokens=12), "nthr": nthr, "look": mean_reward_of_a_rank},
        "ratios": {"gspo": gspo_token},
    },
    "marks": {
        "marks": {"high_covariance": functools.partial(high_covariance, share=0.1)},
        "bounds": {"unclipped": unclipped},
        "weights": {"clip_cov": functools.partial(clip_cov, share=0.1, lower=0.1)},
        "aux": {"kl_cov": kl_cov},
    },
    "self_reward": {
        "marks": {"class_balance": class_balance},
        "aux": {"self_reward": functools.partial(self_reward_loss, reference=-3.6, scale=5.0)},
        "credits": {"mixed": functools.partial(mix_self_reward, reference=-3.6, scale=5.0, least=0.0, after=0)},
    },
    "rows": {
        "rows": {"force": functools.partial(forced_answer, max_new_tokens=3)},
        "credits": {"summary": group_centred},
        "weights": {"forks": functools.partial(forks, rho=0.5, kinds=("thinking", "summary"))},
        "aux": {"told": functools.partial(bonus_of_summaries, kinds=("summary",))},
    },
    "brpo": {
        "controls": {"brpo": functools.partial(thinking_only, budgets=[2, 4, 7], longest=8)},
        "rows": {"brpo": functools.partial(budget_answers, **BUDGETS, n_summaries=2, max_new_tokens=3)},
        "credits": {"brpo": functools.partial(brpo, prior="linear")},
    },
    "packed": {
        "controls": {"brpo": functools.partial(thinking_only, budgets=[2, 4, 7], longest=8)},
        "rows": {"brpo": functools.partial(budget_answers, **BUDGETS, **ALL)},
        "credits": {"brpo": brpo},
        "weights": {"forks": functools.partial(forks, rho=0.5, kinds=("thinking", "summary"))},
    },
    "hapo": {
        "controls": {"hapo": AdaptiveTemperature()},
        "credits": {"hapo": token_average},
        "bounds": {"hapo": adaptive_clip},
        "weights": {"hapo": Redistribution()},
    },
    "spine": {
        "shapes": {"ttrl": majority_vote},
        "weights": {
            "forks": functools.partial(spine_forks, rho=0.4),
            "random": functools.partial(random_tokens, rho=0.8),
            "mixed": mixed_groups,
        },
        "aux": {
            "kl": masked_kl,
            "band": functools.partial(reference_band, coef=0.5),
        },
    },
    "kdrl": {"aux": {"kdrl": Distillation(beta=0.5, masking="response", normaliser="kept")}},
    "mrt": {
        "rows": {
            "mrt": functools.partial(prefix_rollouts, **EPISODES, longest=8, max_new_tokens=3, progress_answers=2),
            "episodes": functools.partial(episode_answers, **EPISODES, answers=2, max_new_tokens=3),
        },
        "shapes": {"progress": mrt_progress},
        "credits": {"mrt": functools.partial(mrt, baseline="joint"), "episodes": episode_credit},
    },
    "campo": {
        "controls": {"campo": StagedLength(stages=[[0, 6], [90, 12]], longest=12, clips=CLIPS, windows=1, rise=9.0)},
        "shapes": {"campo": without_loops},
    },
}
LOSSES = {"self_reward": "dr_grpo", "rows": "grpo", "brpo": "dr_grpo", "packed": "dr_grpo"}
"""The loss of each of these methods that has another than DAPO's."""
PACKED = 60
"""Tokens of a pack on two ranks, where one rank packs nothing."""
EXPS = Path(__file__).resolve().parents[2] / "conf" / "exp"
SIZES = (
    *("trainer.per_device_train_batch_size=8", "trainer.num_generations=4", "trainer.max_completion_length=12"),
    *("trainer.max_steps=2", "trainer.num_train_epochs=1", "trainer.learning_rate=1e-2", "trainer.optim=sgd"),
    *("trainer.lr_scheduler_type=constant", "trainer.warmup_steps=0", "trainer.shuffle_dataset=false"),
    *("trainer.save_strategy=no", "trainer.eval_strategy=no", "trainer.log_completions=false"),
    *("trainer.gradient_accumulation_steps=1", "trainer.steps_per_generation=1", "trainer.bf16=false"),
    *("trainer.gradient_checkpointing=false", "trainer.dataloader_pin_memory=false"),
    *("rollout.max_thinking_tokens=8", "rollout.max_answer_tokens=3", "model.episodes.markers=['1','2','3']"),
)
"""Of two windows of 4 prompts x 4 generations, or one window of two steps where an exp iterates."""
L1 = ("method.prompts.l1.least=2", "method.prompts.l1.most=8")
TAGS = ("model.formats.direct=A", "model.formats.short=B", "model.structures=null")
LASER = ("lowest=2", "highest=8", "interval=1")
OWN = {
    "l1_exact": L1,
    "l1_max": L1,
    "laser": ["method.shapes.laser.target=4"],
    "laser_d": [f"method.shapes.laser_d.{setting}" for setting in LASER],
    "laser_de": [f"method.shapes.laser_de.{setting}" for setting in LASER],
    "fast_math_r1": ["method.shapes.fast_math_r1.longest=8"],
    "ttrl/extra_votes": ["method.rows.extra_votes.votes=5"],
    "laser_self_reward": [
        *("method.aux.self_reward.scale=5.0", "method.credits.self_reward.after=0"),
        *("method.aux.self_reward.reference=-3.6", "method.credits.self_reward.reference=-3.6"),
    ],
    "kdrl/distillation": ["method.aux.kdrl.beta=0.5"],
    "paper/brpo": ["method.rows.brpo.budgets=[2,4,8]", "eval.budgets=[2,4,8]"],
    "paper/campo": ["method.controls.campo.stages=[[0,6],[1,12]]"],
    "paper/think_prune": ["method.controls.think_prune.stages=[[0,12],[1,6]]"],
    "paper/hbpo": ["method.prompts.hbpo.budgets=[2,4,6,8]"],
    **dict.fromkeys(("ada_grpo", "ada_grpo/grpo", "paper/ada_grpo"), TAGS),
}
"""What an exp needs at the size of these rollouts."""


APPENDED = 2


class SomeEnd:
    """Completions of an odd number of tokens end with an end-of-sequence token."""

    def sample(self, prompt_ids, **kwargs):
        completions, logps = super().sample(prompt_ids, **kwargs)
        return [ids + self.eos_token_ids[:1] * (len(ids) % 2) for ids in completions], logps


class Replayed(TokenGRPOTrainer):
    """Completions that depend on the context and on how often it was seen in the same call, not on the rank."""

    def sample(self, prompt_ids, *, num_generations=1, max_new_tokens=None, stops=()):
        seen, completions = Counter(), []
        for ids in prompt_ids:
            key = tuple(ids)
            digest = hashlib.sha256(repr((key, seen[key])).encode()).digest()
            seen[key] += 1
            length = 1 + digest[0] % (max_new_tokens or 8)
            completion = [4 + byte % 30 for byte in digest[1 : 1 + length]]
            stop = next((i for i, token in enumerate(completion) if token in stops), length - 1)
            completions.append(completion[: stop + 1])
        return completions, None

    def extend(self, contexts, *, max_new_tokens=None, stops=(), batch_rows=None):
        return self.sample(contexts, max_new_tokens=max_new_tokens, stops=stops)

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        if self._replay is not None:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        return self.sample(prompt_ids)


def reward(completion_ids, **_):
    """The share of even tokens."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def arguments(out, rows, *, max_steps=2, **changes):
    """Optimizer steps of groups of 4, `rows` of them on each rank."""
    return GRPOConfig(
        output_dir=out + ".run",
        per_device_train_batch_size=int(rows),
        num_generations=4,
        max_completion_length=12,
        max_steps=max_steps,
        bf16=False,
        use_cpu=not sharded(),
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        shuffle_dataset=False,
        dataloader_pin_memory=False,
        **changes,
    )


class ReplayedWithEnds(SomeEnd, Replayed):
    """Some completions end, so that some are cut."""


def coarse_reward(completion_ids, **_):
    """Right or wrong, so that now and then a whole group is."""
    return [float(sum(i % 2 == 0 for i in ids) > len(ids) / 4) for ids in completion_ids]


def of_method(name, out, rows):
    """Arguments, method and reward of one of METHODS: one window used twice, four where a stage moves on."""
    settings = {"learning_rate": 1e-2, "optim": "sgd", "loss_type": LOSSES.get(name, "dapo"), "num_iterations": 2}
    return arguments(out, rows, max_steps=8 if name == "campo" else 2, **settings), METHODS[name], reward


def of_exp(name, out, rows):
    """Arguments, method and reward of one of conf/exp."""
    asked = [*SHRUNK.get(name, []), *SIZES, *OWN.get(name, OWN.get(name.removeprefix("paper/"), []))]
    asked += [f"trainer.per_device_train_batch_size={rows}", f"trainer.use_cpu={not sharded()}"]
    with initialize_config_module("rltoken.conf", version_base="1.3"):
        cfg = compose("config", overrides=[f"+exp={name}", *asked])
    args = to_grpo_config(cfg.trainer, output_dir=out + ".run", seed=cfg.seed)
    method = instantiate(cfg.method, _convert_="object")
    return args, method, coarse_reward if "dynamic_sampling" in cfg.method.rows else reward


def trained(case, model, dataset, out, rows, packed):
    """The trainer of a case, after training; statistics of a micro-batch, as TRL's entropy bonus, allow no packs."""
    kind, _, name = case.partition("/")
    args, method, graded = {"exp": of_exp, "stages": of_method}[kind](name, out, rows)
    pipeline = build(method)
    trainer = (ReplayedWithEnds if pipeline.needs("appended") or pipeline.needs("truncated") else Replayed)(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward_funcs=graded,
        args=args,
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(model),
        pipeline=pipeline,
        template=Template(think_end_id=7, cut=(7,)),
        packing="rows" if name == "packed" and int(rows) == 16 else "auto",  # alone each row is encoded whole
        pack_tokens=None if args.entropy_coef or args.top_entropy_quantile < 1 else packed,
        classes=classes,
        appended_id=APPENDED,
        teacher=a_teacher(model) if pipeline.needs("teacher_logps") else None,
    )
    trainer.train()
    return trainer


def found(trainer):
    """Weights, state of stages, cursor of the prompt stream and a metric of each rank, as rank 0 has them."""
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}  # ZeRO-3 gives them to rank 0 alone
    stages = gather_list([trainer.pipeline.state_dict()])[-1]  # of the last rank: alike on all of them
    numbers = {f"{key}.{name}": state[name] for key, state in stages.items() for name in state}
    numbers["cursor"] = trainer.sampler.stream.cursor
    numbers |= {name: value for name, value in trainer.state.log_history[-1].items() if name == "mean_reward"}
    return {name: value.float() for name, value in weights.items()}, numbers


def main(model, data, out, rows, *cases):
    """Train each case from the same start, on any number of ranks: stages/NAME of METHODS, or exp/NAME of conf/exp."""
    stand_in()
    register_schemas()
    gc.freeze()  # each training asks for full collections
    dataset = load_from_disk(data)
    dataset = dataset.add_column("original_tokens", [4 + i % 5 for i in range(len(dataset))])
    packed = PACKED if int(rows) < 16 and "zero" not in Path(out).stem else None
    results = {}
    for case in cases:
        trainer = trained(case, model, dataset, out, rows, packed)
        results[case] = found(trainer)
        rank = trainer.accelerator.process_index
        del trainer
        gc.collect()
    if rank == 0:
        torch.save(results, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave_process_group()
