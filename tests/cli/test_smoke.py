"""Every conf/exp, and every group at once, trains two steps from the command line and is evaluated."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXPS = sorted(str(path.relative_to(ROOT / "conf/exp"))[:-5] for path in ROOT.glob("conf/exp/**/*.yaml"))
SMALL = [
    *(
        "model=tiny",
        "model.source.steps=2",
        "data=tiny",
        "data.train.n=32",
        "data.eval.n=4",
        "reward=tiny",
        "hardware=cpu",
    ),
    *("rollout.max_answer_tokens=4", "trainer.gradient_accumulation_steps=1", "trainer.steps_per_generation=1"),
]
BASE = [*SMALL, "~model.path", "model.think_end='</think>'"]
"""For a model that does not think at the paper's size."""
LASER = ("lowest=4", "highest=24", "interval=4")
SHRUNK = {
    "paper/brpo": [*SMALL, "~data.template", "method.rows.brpo.budgets=[8,16]", "eval.budgets=[8,16]"],
    "paper/arora_zanette": SMALL,
    "paper/campo": [*SMALL, "~model.path", "~data.template", "method.controls.campo.stages=[[0,12],[1,24]]"],
    "paper/dapo": [*SMALL, "reward=[tiny,overlong]", "reward.funcs.overlong.soft_punish_cache=8"],
    "paper/dler": SMALL,
    "paper/grpo_lead": SMALL,
    "paper/gspo": [*SMALL[:-2], "trainer.gradient_accumulation_steps=1", "trainer.steps_per_generation=4"],
    "paper/hbpo": [*SMALL, "method.prompts.hbpo.budgets=[4,8,12,16]"],
    "paper/l1_exact": [*SMALL, "~model.path", "method.prompts.l1.least=4", "method.prompts.l1.most=16"],
    "paper/l1_max": [*SMALL, "method.prompts.l1.least=4", "method.prompts.l1.most=16"],
    "paper/laser_de": [*SMALL, *(f"method.shapes.laser_de.{setting}" for setting in LASER)],
    "paper/mrt": [*SMALL, "~model.path"],
    "paper/rlvr": [*SMALL, "~reward.last_number"],
    "paper/shorter_better": SMALL,
    "paper/think_prune": [*SMALL, "~method.prompts.think_prune", "method.controls.think_prune.stages=[[0,24],[1,12]]"],
    "paper/ada_grpo": [*SMALL, "~model.path", "sft=tiny", "sft.merge=true"],
    "paper/fast_math_r1": [
        *(*SMALL, "~model.path", "~data.template", "sft=tiny"),
        *("trainer.optim=adamw_torch", "sft.trainer.optim=adamw_torch", "sft.trainer.packing=false"),
    ],
    "paper/kdrl": [*SMALL, "teacher=tiny", "~teacher.path"],
    "paper/clip_cov": BASE,
    "paper/hapo_entropy": [*BASE, "reward=[tiny,overlong]", "reward.funcs.overlong.soft_punish_cache=8"],
    "paper/kl_cov": BASE,
    "paper/laser_self_reward": [*BASE, "~data.hub", "model.appended='<unk>'"],
    "paper/nthr": BASE,
    "paper/spine": [*SMALL, "~model.path"],
    "paper/thr": BASE,
    "paper/ttrl": [*BASE, "~data.eval_hub", "~data.eval_split", "~data.hub"],
}
"""Of a paper's size, with the embedded world's model and data; tests/methods/test_paper_configs.py has the settings."""
UNDER = {
    "lora": ["+lora=default"],
    "gradient checkpointing": ["trainer.gradient_checkpointing=true"],
    "two iterations": ["trainer.num_iterations=2"],
}
EVERY_GROUP = (
    "+prompt=budget",
    "+control=length_schedule",
    "method.controls.length_schedule.start=8",
    "+rows=[dynamic_sampling,forced_answer]",
    "+shape=length_regularised",
    "+credit=[entropy_advantage,self_reward,group_centred]",
    "method.credits.self_reward.after=0",
    "trainer.scale_rewards=group",
    "+mark=[high_covariance,class_balance]",
    "+bounds=clip_range",
    "+weight=[forks,forks_microbatch,thr,clip_cov]",
    "method.weights.forks.kinds=[thinking,summary]",
    "+ratio=gspo_token",
    "+aux=[entropy_bonus,kl_cov,self_reward]",
)


SLOW = {"arora_zanette", "hapo_history", "kimi_length", "l1_exact", "laser_de"}
SLOW |= {"length_regularised", "shorter_better", "tldr_style"}
"""Exps whose stages test_every_shape_at_once trains too."""


def is_slow(exp):
    """Whether what the exp trains is trained by another one too, as variants and the papers' settings are."""
    return exp in SLOW or "/" in exp


OTHER_FORMS = {
    "laser",
    "laser_d",
    "l1_max",
    "ttrl_extra",
}  # forms of one reward are refused together; these have their exps
NOT_HERE = {
    "hawkeye",
    "mrt_progress",
} | OTHER_FORMS  # need a column, rows that publish progress
SHAPES = [path.stem for path in sorted(ROOT.glob("conf/shape/*.yaml")) if path.stem not in NOT_HERE]
SHAPES.sort(key=lambda name: name != "ttrl")  # a vote makes rewards of its own: it comes first


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """The last third of a run of two steps; other tests look at it."""
    monkeypatch.setattr("rltoken.report.picture", lambda *args: None)


def check_run(found):
    assert found.status == 0, found.err
    (folder,) = found.runs.iterdir()
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in metrics) == 2
    report = json.loads((folder / "report.json").read_text())
    assert 0 <= report["before"]["accuracy"] <= 1 and 0 <= report["after"]["accuracy"] <= 1


def settings(exp):
    """What makes a run of the exp short."""
    teacher = ["teacher.source.steps=2"] if "kdrl" in exp else []
    staged = not {"ada_grpo", "fast_math_r1"}.isdisjoint(exp.split("/"))
    supervised = ["sft.trainer.max_steps=2", "data.traces.n=64"] if staged else []
    return [*SHRUNK.get(exp, []), *teacher, *supervised]


@pytest.mark.smoke
@pytest.mark.parametrize("exp", [pytest.param(exp, marks=pytest.mark.slow) if is_slow(exp) else exp for exp in EXPS])
def test_every_exp(cli, exp):
    check_run(cli(f"+exp={exp}", *settings(exp)))


@pytest.mark.slow
@pytest.mark.parametrize("under", UNDER)
@pytest.mark.parametrize("exp", EXPS)
def test_every_exp_under(cli, exp, under):
    check_run(cli(f"+exp={exp}", *settings(exp), *UNDER[under]))


@pytest.mark.smoke
@pytest.mark.parametrize(
    "extra",
    [
        (),
        ("+lora=default", "trainer.gradient_checkpointing=true"),
        ("trainer.beta=0.1", "rollout.pack_tokens=100"),
    ],
)
def test_every_group_at_once(cli, extra):
    check_run(cli("+exp=grpo", *EVERY_GROUP, "trainer.num_iterations=2", *extra))


@pytest.mark.smoke
def test_every_shape_at_once(cli):
    """With the prompts that fill their columns, and a credit that leaves the reward's scale as it is."""
    shapes = f"+shape=[{','.join(SHAPES)}]"
    check_run(cli("+exp=grpo", "+prompt=[l1,tldr_style]", shapes, "+credit=rloo"))


@pytest.mark.smoke
@pytest.mark.parametrize("world", ["formats", "label_free", "tagged"])
def test_every_world(cli, world):
    check_run(cli("+exp=grpo", f"world={world}"))
