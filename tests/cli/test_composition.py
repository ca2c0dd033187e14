"""Methods together: they train from the command line, and each one's tensors are those that it yields alone."""

import copy
import dataclasses
import itertools
import re

import pytest
import torch
from hydra import compose, initialize_config_module
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from rltoken import config
from rltoken.pipeline import Pipeline
from rltoken.rollout.logits import told
from rltoken.tiny import problems, warm_start
from rltoken.train import checked
from rltoken.types import Rollout, Template
from tests.trl.teachers import a_teacher
from tests.trl.two_ranks import APPENDED, ReplayedWithEnds, reward

TARGETS = "method.shapes.laser.target=5"
LENGTHS = ("method.prompts.l1.least=2", "method.prompts.l1.most=8")
FORKS = ("weight=forks", "method.weights.forks.rho=0.4")
LAST_TOKEN = (
    "exp=laser_self_reward",
    "method.credits.self_reward.after=0",
    "method.credits.self_reward.least=0.0",
    "method.aux.self_reward.scale=5.0",
    "method.aux.self_reward.reference=-3.6",
)
CLIP_COV = ("exp=clip_cov", "method.weights.clip_cov.share=0.2", "method.weights.clip_cov.lower=0.0")
KL_COV = ("exp=kl_cov", "method.marks.high_covariance.share=0.2")
KDRL = ("exp=kdrl", "teacher.source.steps=2")
COMPOSITIONS = {
    "thr + brpo": (("exp=brpo",), ("weight=thr",)),
    "spine + tldr_style": (("exp=spine",), ("exp=tldr_style",)),
    "hapo_entropy + laser": (("exp=hapo_entropy",), ("exp=laser", TARGETS)),
    "hapo_entropy + last token": (("exp=hapo_entropy",), LAST_TOKEN),
    "thr_gspo + kimi_length": (("exp=thr_gspo",), ("exp=kimi_length",)),
    "campo + kimi_length": (("exp=campo",), ("exp=kimi_length",)),
    "kl_cov + brpo": (KL_COV, ("exp=brpo",)),
    "forks + l1": (("exp=l1_max", *LENGTHS), FORKS),
    "gtpo_entropy + length_regularised": (("exp=gtpo_entropy",), ("exp=length_regularised",)),
    "kdrl + forks": (KDRL, FORKS),
    "ttrl + last token": (("exp=ttrl",), LAST_TOKEN),
    "entropy_advantage + clip_cov": (("exp=entropy_advantage",), CLIP_COV),
    "grpo_s + shorter_better": (("exp=grpo_s",), ("exp=shorter_better", "method.shapes.shorter_better.beta=0.02")),
    "nthr + dler": (("exp=nthr",), ("exp=dler",)),
    "brpo + thr + kdrl": (("exp=brpo",), ("weight=thr",), KDRL),
    "hapo_entropy + laser + last token": (("exp=hapo_entropy",), ("exp=laser", TARGETS), LAST_TOKEN),
    "ttrl + spine's band + kl_cov": (("exp=ttrl",), ("weight=spine_forks", "aux=entropy_band"), KL_COV),
}
"""Each part in the words of the command line; choices of one group act in the order of the parts."""
DYNAMIC = ("rows=dynamic_sampling",)
SCHEDULE = ("control=length_schedule", "method.controls.length_schedule.start=6")
PRUNE = ("control=think_prune", "method.controls.think_prune.stages=[[0,12],[1,7]]")
CAMPO = (
    "control=campo",
    "method.controls.campo.stages=[[0,6],[1,12]]",
    "method.controls.campo.clips=[[0.2,0.2],[0.1,0.3]]",
)
PAIRS = {
    "a shaper and a credit": (("shape=arora_zanette",), ("credit=rloo",)),
    "another shaper and credit": (("shape=kimi_length",), ("credit=grpo_lead",)),
    "a shaper and a curriculum": (("shape=laser", TARGETS), SCHEDULE),
    "another shaper and curriculum": (("shape=shorter_better", "method.shapes.shorter_better.beta=0.02"), PRUNE),
    "a third shaper and curriculum": (("shape=dler",), CAMPO),
    "a shaper and dynamic sampling": (("shape=length_regularised",), DYNAMIC),
    "another shaper and dynamic sampling": (("shape=dler",), DYNAMIC),
    "a credit and a curriculum": (("credit=gtpo_entropy",), SCHEDULE),
    "another credit and curriculum": (("credit=dler",), PRUNE),
    "a credit and dynamic sampling": (("credit=rloo",), DYNAMIC),
    "another credit and dynamic sampling": (("credit=entropy_advantage",), DYNAMIC),
    "a curriculum and dynamic sampling": (CAMPO, DYNAMIC),
    "all four": (("shape=arora_zanette",), ("credit=rloo",), SCHEDULE, DYNAMIC),
}
"""Pairs of a shaper, a credit, a curriculum and dynamic sampling, and all of them."""
EVERY = COMPOSITIONS | PAIRS
QUICK = {"thr + brpo", "spine + tldr_style", "hapo_entropy + laser", "brpo + thr + kdrl", "all four"}
"""Those that are not slow: two methods of every kind of stage, a triple, and four parts with a curriculum."""
REPLAYED = (
    "trainer.per_device_train_batch_size=16",
    "trainer.num_generations=4",
    "trainer.max_completion_length=12",
    "rollout.max_thinking_tokens=8",
    "trainer.num_iterations=2",
    "trainer.max_steps=4",
    "trainer.learning_rate=0",
    "trainer.shuffle_dataset=false",
    "trainer.save_strategy=no",
)
"""Two windows of 4 prompts x 4 completions, each used twice."""
MAKES = {"shapes": ("rewards",), "credits": ("advantages",), "bounds": ("eps_low", "eps_high"), "weights": ("weight",)}
"""What the stages of a slot make for others, besides marks, which have names of their own."""
RECORDED = (*MAKES, "marks", "ratios", "aux")
SAMPLING = ("controls", "rows")
"""The slots that make the rollouts: a run has those of all parts, and what they yield is compared too."""


def together(parts):
    """The parts as one command line."""
    words = list(itertools.chain.from_iterable(parts))
    chosen = {}
    for word in words:
        group, _, choice = word.partition("=")
        if "." not in group:
            chosen.setdefault(group, []).append(choice)
    groups = [f"+{group}=[{','.join(choices)}]" for group, choices in chosen.items()]
    return [*groups, *(word for word in words if "." in word.partition("=")[0])]


def method(parts, folder):
    """The pipeline of the parts together, and TRL's arguments."""
    config.register_schemas()
    with initialize_config_module("rltoken.conf", version_base="1.3"):
        cfg = compose("config", overrides=[*together(parts), *REPLAYED])
    pipeline, args, _ = checked(cfg, folder)
    return pipeline, args


def named():
    """Every composition; those that are not quick are slow."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in EVERY]


@pytest.mark.smoke
@pytest.mark.parametrize("name", named())
def test_they_train_from_the_command_line(cli, name):
    found = cli(*together(EVERY[name]), "eval.before=false", "eval.after=false", "trainer.num_iterations=2")
    assert found.status == 0, found.err
    (folder,) = found.runs.iterdir()
    assert '"step": 2' in (folder / "metrics.jsonl").read_text()


class Drifting(TrainerCallback):
    """After each step the weights move by the same noise, whatever was learned, so that every run sees one policy."""

    def on_step_end(self, args, state, control, model, **kwargs):
        generator = torch.Generator().manual_seed(state.global_step)
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.02 * torch.randn(value.shape, generator=generator))


class OnRecord(ReplayedWithEnds):
    """What is played back has the size of a window, not of a trial."""

    def _try_prompts_and_shapes(self):
        pass


class Recorder:
    """What a stage calls; the tensors that it returns each time are put into `seen` under its key, a copy's are not."""

    def __init__(self, stage, seen):
        self.stage, self.seen = stage, seen
        self.changes_logits, self.relabels = stage.changes_logits, stage.relabels

    def __call__(self, *needed):
        result = self.stage.call(*needed)
        self.seen.setdefault(self.stage.key, []).append(tensors_of(result))
        return result

    def __deepcopy__(self, memo):
        return copy.deepcopy(self.stage.call, memo)


def tensors_of(result):
    """A stage's result as tensors, without the metrics beside it: of a control its settings, of a rollout its rows."""
    if isinstance(result, dict):
        result = tuple(list(told(v).encode()) if key == "logits" else float(v) for key, v in sorted(result.items()))
    if isinstance(result, Rollout):
        tokens = [token for row in result.rows for token in (*row.prompt_ids, *row.completion_ids, *row.train_mask)]
        result = (result.rewards, tokens, list(result.metrics.values()))
    values = [x for x in (result if isinstance(result, tuple) else (result,)) if not isinstance(x, dict)]
    return [torch.as_tensor(value).detach().clone() for value in values]


def played(stage, results):
    """A stage that returns what another run has recorded, in order, and looks at nothing."""
    left, needs = iter(results), {"logps"} if stage.live else {"rewards", "advantages"} & set(stage.needs)

    def call(*_):
        values = next(left)
        return values[0] if len(values) == 1 else tuple(values)

    call.relabels = stage.relabels
    return dataclasses.replace(stage, call=call, needs=tuple(needs), observer=None)


def named_by(stages):
    """The signals that the stages name; advantages are made of rewards where no credit stage makes them."""
    names = {name for stage in stages for name in stage.needs + (stage.observer.needs if stage.observer else ())}
    return names | ({"rewards"} if "advantages" in names else set())


def of_a_part(whole, own, results):
    """The whole's rollout with the stages of one part; what these name of other parts is played back.

    Args:
        whole: the pipeline of all parts.
        own: the keys of the part's stages.
        results: what each stage of the whole has returned, by its key.
    """
    wanted, slots = named_by([stage for stage in whole.stages(*RECORDED) if stage.key in own]), dict(whole.slots)
    for slot in RECORDED:
        stages = []
        for stage in whole[slot]:
            makes = (stage.name,) if slot == "marks" else MAKES.get(slot, ()) + ("correct",) * stage.relabels
            if stage.key in own:
                stages.append(stage)
            elif not wanted.isdisjoint(makes):
                stages.append(played(stage, results[stage.key]))
        slots[slot] = tuple(stages)
    return Pipeline(slots)


def right_or_wrong(completion_ids, **_):
    """1 where half of the tokens or more are even: whole groups are alike now and then."""
    return [float(share >= 0.5) for share in reward(completion_ids)]


def replay(pipeline, args, folder, own=None):
    """What each stage of `own` (None: of all) returns while the same rollouts are trained, by its key."""
    seen, slots = {}, dict(pipeline.slots)
    for slot in (*SAMPLING, *RECORDED):
        slots[slot] = tuple(
            dataclasses.replace(stage, call=Recorder(stage, seen)) if own is None or stage.key in own else stage
            for stage in pipeline[slot]
        )
    trainer = OnRecord(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=right_or_wrong if pipeline["rows"] else reward,
        args=args,
        train_dataset=problems(16),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[Drifting()],
        pipeline=Pipeline(slots),
        template=Template(think_end_id=7, cut=(7,)),
        classes=lambda texts, group: [len(text.split()) % 4 - 1 for text in texts],
        appended_id=APPENDED,
        teacher=a_teacher(folder),
    )
    trainer.train()
    return seen


IDLE = {"spine + tldr_style": {"method.weights.mixed_groups"}}
"""What has nothing to do in a composition: where lengths are rewarded too, every group is mixed."""


@pytest.mark.parametrize("name", named())
def test_each_part_yields_what_it_yields_alone(cache, tmp_path, name):
    """On the same rollouts; only what a part names of another one reaches it, as the other one made it."""
    folder, parts = str(warm_start(steps=2, cache_dir=cache)), EVERY[name]
    whole = replay(*method(parts, tmp_path), folder)
    assert all(len(values) in (2, 4) for values in whole.values()), "once a window, or once a forward"
    for key, values in whole.items():
        varied = torch.cat([tensor.double().flatten() for tensors in values for tensor in tensors]).unique().numel() > 1
        assert varied or key in IDLE.get(name, {"method.bounds.unclipped"}), f"{key} does nothing here"
    replaced = [metrics[0].item() for _, _, metrics in whole.get("method.rows.dynamic_sampling", ())]
    assert sum(replaced) > 0 or not replaced, "dynamic sampling replaces nothing here"
    compared = set()
    for part in parts:
        own = {stage.key for stage in method([part], tmp_path)[0].stages(*SAMPLING, *RECORDED)}
        pipeline, args = method(parts, tmp_path)
        alone = replay(of_a_part(pipeline, own, whole), args, folder, own)
        assert alone.keys() == own
        torch.testing.assert_close({key: whole[key] for key in own}, alone, rtol=1e-4, atol=1e-5)
        compared |= own
    assert compared == whole.keys()


REFUSED = {
    "brpo + gtpo_entropy": (
        ["+exp=brpo", "+credit=gtpo_entropy"],
        r"method\.credits\.brpo: method\.credits\.gtpo_entropy comes after it and computes the advantages anew",
    ),
    "brpo + laser": (
        ["+exp=[brpo,laser]"],
        r"method\.shapes\.laser: method\.credits\.brpo takes its credit from something else than the reward",
    ),
    "hapo_entropy + kl_cov": (
        ["+exp=[hapo_entropy,kl_cov]"],
        r"method\.bounds\.hapo_entropy: method\.bounds\.unclipped acts on the same rows after it",
    ),
    "thr_gspo + grpo_s": (
        ["+exp=[thr_gspo,grpo_s]"],
        r"method\.ratios\.gspo_token: method\.ratios\.sequence_mean acts on the same rows after it",
    ),
    "spine + a KL term": (["+exp=spine", "trainer.beta=0.1"], r"trainer\.beta: .*masked_kl anchors only the tokens"),
    "thr + sequence ratios": (
        ["+exp=thr", "trainer.importance_sampling_level=sequence"],
        r"trainer\.importance_sampling_level: .*erases the per-token effect of method\.weights\.thr",
    ),
    "hapo_entropy + cispo": (
        ["+exp=hapo_entropy", "trainer.loss_type=cispo"],
        r"trainer\.loss_type: 'cispo' caps the ratio at trainer\.epsilon_high itself, while .*bounds\.hapo_entropy",
    ),
    "clip_cov + nothing between its bounds": (
        ["+exp=clip_cov", "method.weights.clip_cov.lower=6"],
        r"method\.weights\.clip_cov\.upper: nothing lies between lower=6 and 5",
    ),
    "laser + laser_d": (["+exp=[laser,laser_d]"], r"method\.shapes\.laser_d: it is another form of .*shapes\.laser,"),
    "kdrl without a teacher": (["+exp=kdrl", "teacher=none"], r"teacher: method\.aux\.kdrl needs one"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_together_is_refused_in_one_line(cli, name):
    overrides, told = REFUSED[name]
    found = cli(*overrides)
    assert found.status == 2 and not found.runs.exists()
    assert found.err.count("\n") == 1 and "Traceback" not in found.err
    assert re.search(told, found.err), found.err
