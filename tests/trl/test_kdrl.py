"""KDRL and its teacher on real windows: oracles, where the log-probs come from, resume, refusals."""

import functools
import math

import pytest
import torch
from torch import nn

from rltoken.errors import SamplerLost, UserError
from rltoken.methods.forced_answer import forced_answer, group_centred
from rltoken.methods.kdrl import Distillation, distilled_advantage
from rltoken.teachers import Server, Teacher
from tests.trl.teachers import a_teacher

SGD = {"optim": "sgd", "learning_rate": 1e-2}
FORMS = ["loss", "advantage"]


def kdrl(form="loss", **settings):
    """The stages of one form."""
    if form == "loss":
        return {"aux": {"kdrl": Distillation(**{"beta": 0.5} | settings)}}
    return {"credits": {"kdrl": functools.partial(distilled_advantage, **{"beta": 0.5} | settings)}}


@pytest.fixture
def teacher(tiny):
    """teacher(**options): a new one, since a trainer makes it ready for its own temperature."""
    return functools.partial(a_teacher, tiny[0])


@pytest.fixture
def seen(run, teacher):
    """seen(names, **changes) -> what a credit stage got under these names, window by window."""

    def train(names, *, source=None, **changes):
        found = []
        look = {"found": found}
        listed = ", ".join(names)
        exec(f"def look(advantages, {listed}):\n    found.append(({listed},))\n    return advantages", look)
        run({"credits": {"look": look["look"]}}, teacher=source or teacher(), **changes)
        return found

    return train


@pytest.mark.parametrize("settings", [{}, {"num_iterations": 2, "loss_type": "grpo"}, {"beta": 0.1}])
@pytest.mark.parametrize("form", FORMS)
def test_with_coefficient_zero_it_is_grpo(run, teacher, form, settings):
    stock = run(**settings)
    assert stock.distance(run(kdrl(form, beta=0.0), teacher=teacher(), **settings)) == 0.0
    assert stock.distance(run(kdrl(form), teacher=teacher(), **settings)) > 1e-4


def loss_of_the_equations(logps, old_logps, teacher_logps, mask, rewards, correct, group, *, beta, masking, kept_only):
    """The objective with k2 and a detached weight, token by token; the mean over the window's tokens."""
    policy, distilled, kept, tokens = 0.0, 0.0, 0, 0
    for i, length in enumerate(mask.sum(1).tolist()):
        mates = group == group[i]
        advantage = float((rewards[i] - rewards[mates].mean()) / (rewards[mates].std() + 1e-4))
        chosen = {"none": True, "response": not correct[i], "group": not correct[mates].any()}[masking]
        for t in range(length):
            ratio = math.exp(logps[i, t] - old_logps[i, t])
            policy -= min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
            tokens += 1
            if chosen:
                distilled += ratio * float(teacher_logps[i, t] - logps[i, t]) ** 2 / 2
                kept += 1
    return policy / tokens + beta * distilled / (max(kept, 1) if kept_only else tokens)


@pytest.mark.parametrize("normaliser", ["all", "kept"])
@pytest.mark.parametrize("masking", ["none", "response", "group"])
def test_the_loss_is_that_of_the_equations(run, teacher, masking, normaliser):
    """On- and off-policy, against a brute force that shares no code with the stage."""
    expected = []

    def look(logps, old_logps, teacher_logps, mask, rewards, correct, group):
        signals = (logps.detach(), old_logps, teacher_logps, mask, rewards, correct, group)
        settings = {"beta": 0.5, "masking": masking, "kept_only": normaliser == "kept"}
        expected.append(loss_of_the_equations(*signals, **settings))
        return logps * 0

    stages = kdrl(masking=masking, normaliser=normaliser)
    stages["aux"]["look"] = look
    settings = {"num_iterations": 2, "max_steps": 6, "scale_rewards": "group", "loss_type": "dapo"}
    result = run(stages, teacher=teacher(), reward=mostly_wrong, **settings)
    assert [metrics["loss"] for metrics in result.metrics[:6]] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert sum(abs(loss) > 1e-3 for loss in expected) >= 4


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_signal_is_the_teachers_log_probs_at_the_temperature(seen, teacher, temperature):
    """Against its logits, which are made nowhere else."""
    source = teacher()
    prompts = []
    source.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: prompts.append((kwargs["input_ids"], kwargs["attention_mask"])), with_kwargs=True
    )
    found = seen(["teacher_logps", "ids", "mask"], source=source, temperature=temperature, max_steps=2)
    assert len(found) == len(prompts) == 2, "one pass a window"
    fresh = teacher().model
    for (logps, ids, mask), (whole, attention) in zip(found, prompts, strict=True):
        logits = fresh(input_ids=whole, attention_mask=attention).logits[:, -ids.size(1) - 1 : -1] / temperature
        expected = logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        assert not logps.requires_grad
        torch.testing.assert_close(logps[mask > 0], expected[mask > 0], rtol=1e-5, atol=1e-5)


def test_the_teacher_is_asked_once_a_window_and_never_trained(run, teacher):
    source, calls = teacher(), []
    before = {name: value.clone() for name, value in source.model.state_dict().items()}
    source.model.base_model.register_forward_hook(lambda *_: calls.append(1))
    stages = kdrl() | {"credits": {"of_window": lambda advantages, teacher_logps: advantages}}
    run(stages, teacher=source, num_iterations=2)
    assert len(calls) == 2, "two stages, two windows of two steps each"
    assert all(torch.equal(value, before[name]) for name, value in source.model.state_dict().items())
    assert not any(value.requires_grad or value.grad is not None for value in source.model.parameters())


def test_a_teacher_that_no_stage_names_is_not_asked(run, teacher):
    source, calls = teacher(), []
    source.model.base_model.register_forward_hook(lambda *_: calls.append(1))
    assert run().distance(run({}, teacher=source)) == 0.0 and not calls


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_the_base_of_an_adapter_is_its_reference(seen, num_iterations):
    names = ["teacher_logps", "ref_logps", "old_logps", "mask"]
    settings = {"lora": True, "num_iterations": num_iterations, "learning_rate": 5e-2}
    found = seen(names, source=Teacher(None), **settings)
    assert all(torch.equal(base, reference) for base, reference, *_ in found)
    moved = [((base - old) * mask).abs().max().item() for base, _, old, mask in found]
    assert moved[0] < 1e-5 and moved[-1] > 1e-3


def test_an_adapter_is_distilled_from_its_base(run):
    result = run(kdrl(beta=1.0), teacher=Teacher(None), lora=True, num_iterations=2, gradient_checkpointing=True)
    assert result.distance(run({}, lora=True, num_iterations=2, gradient_checkpointing=True)) > 1e-5
    kl = [metrics["kdrl/reverse_kl"] for metrics in result.metrics if "kdrl/reverse_kl" in metrics]
    assert kl[0] == pytest.approx(0.0, abs=1e-6) and kl[-1] != 0.0


def test_ends_that_the_teacher_does_not_know_are_unknown(seen, teacher, tiny):
    """All of them where it ends otherwise, none where it ends alike or in more ways."""
    end = tiny[1].eos_token_id
    names, settings = ["teacher_logps", "ids", "mask"], {"max_completion_length": 100}
    for ends, unknown in ((frozenset({end + 1}), True), (frozenset({end, end + 1}), False), (None, False)):
        found = seen(names, source=teacher(ends=ends), **settings)
        for logps, ids, mask in found:
            assert torch.equal(logps.isnan(), (ids == end) & unknown) and mask.any()
        assert any((ids == end)[mask > 0].any() for _, ids, mask in found)


def test_unknown_tokens_reach_neither_loss_nor_weights(run, teacher, tiny):
    source = teacher(ends=frozenset({tiny[1].eos_token_id + 1}))
    loss, advantage = (run(form, teacher=source, max_completion_length=100) for form in (kdrl(), kdrl("advantage")))
    assert all(value.isfinite().all() for result in (loss, advantage) for value in result.weights.values())
    assert min(metrics["kdrl/kept"] for metrics in loss.metrics if "kdrl/kept" in metrics) < 1


class FromModel(Server):
    """A server that says what a model of this process gives, or fails."""

    def __init__(self, model, failure=None):
        super().__init__("http://nowhere", patience=1)
        self.model, self.failure, self.rows = model, failure, 0

    def logps(self, prompts, completions):
        if self.failure:
            raise self.failure
        self.rows += len(prompts)
        return [self.of(prompt, ids) for prompt, ids in zip(prompts, completions, strict=True)]

    def of(self, prompt, ids):
        with torch.no_grad():
            logps = self.model(torch.tensor([[*prompt, *ids]])).logits.log_softmax(-1)
        return [logps[0, len(prompt) + t - 1, token].item() for t, token in enumerate(ids)]


@pytest.mark.parametrize("form", FORMS)
def test_a_server_and_a_model_teach_the_same(run, teacher, form):
    server = FromModel(teacher().model)
    own = run(kdrl(form), teacher=teacher(), **SGD)
    served = run(kdrl(form), teacher=Teacher(server), **SGD)
    assert own.distance(served) < 1e-6 and server.rows == 32
    assert served.trainer.notes_steps and not own.trainer.notes_steps, "a step can be saved when the server is lost"


def test_a_server_that_is_lost_ends_the_run(run):
    lost = Teacher(FromModel(nn.Identity(), SamplerLost("teacher.url: gone")))
    with pytest.raises(SamplerLost, match="gone"):
        run(kdrl(), teacher=lost)


@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo", "grpo"])
@pytest.mark.parametrize("form", FORMS)
def test_accumulation_and_packs_change_nothing(run, teacher, loss_type, form):
    """Also with statistics of the window and of whole groups, whose rows TRL shuffles and splits."""
    stages = kdrl(form, masking="group", normaliser="kept")
    settings = SGD | {"loss_type": loss_type, "reward": mostly_wrong}
    one = run(stages, teacher=teacher(), per_device_train_batch_size=8, **settings)
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    four = run(stages, teacher=teacher(), **split, **settings)
    packed = run(stages, teacher=teacher(), per_device_train_batch_size=8, pack_tokens=40, **settings)
    assert packed.forwards > one.forwards
    assert one.distance(four) < 5e-7 and one.distance(packed) < 5e-7
    assert one.distance(run(**settings)) > 1e-6


def mostly_wrong(completion_ids, **_):
    """1 for completions whose first token divides by four, so that some groups have no correct one."""
    return [float(ids[0] % 4 == 0) for ids in completion_ids]


def test_gradient_checkpointing_changes_nothing(run, teacher):
    plain, checkpointed = (
        run(kdrl(), teacher=teacher(), gradient_checkpointing=checkpointing, **SGD) for checkpointing in (False, True)
    )
    assert plain.distance(checkpointed) < 1e-7


class Garbled(FromModel):
    """The same with nonsense about some rows of a window."""

    def __init__(self, model, rows):
        super().__init__(model)
        self.garbled = rows

    def logps(self, prompts, completions):
        found = super().logps(prompts, completions)
        for i in range(len(found))[self.garbled]:
            found[i] = [-9.0] * len(found[i])
        return found


def test_added_rows_are_not_distilled(run, teacher):
    """The eight thinking rows of a window come first; what the teacher says of the others changes nothing."""
    rows = {"force": functools.partial(forced_answer, max_new_tokens=3)}
    stages = kdrl() | {"rows": rows, "credits": {"summary": group_centred}}
    settings = SGD | {"num_iterations": 2, "reward": sometimes_even, "pack_tokens": 60}
    clean, added, thinking = (
        run(stages, teacher=Teacher(Garbled(teacher().model, chosen)), **settings)
        for chosen in (slice(0), slice(8, None), slice(8))
    )
    assert clean.trainer.teacher.model.rows > 16, "it is asked of all of them"
    assert clean.distance(added) == 0.0 and clean.distance(thinking) > 1e-4


def sometimes_even(completion_ids, **_):
    """1 for completions whose last token is even."""
    return [float(ids[-1] % 2 == 0) for ids in completion_ids]


@pytest.mark.parametrize("step", [1, 2, 3])
def test_resume_is_exact(run, teacher, tmp_path, step):
    """While the coefficient falls, at an odd step of a window too."""
    stages = kdrl(delta=0.1, beta_min=0.15, masking="response", normaliser="kept")
    settings = {"steps_per_generation": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    settings |= {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 9}
    whole = run(stages, teacher=teacher(), output_dir=tmp_path / "whole", **settings)
    assert [metrics["kdrl/beta"] for metrics in whole.metrics[:4]] == pytest.approx([0.5, 0.4, 0.3, 0.2])
    checkpoint = str(tmp_path / f"whole/checkpoint-{step}")
    resumed = run(stages, teacher=teacher(), output_dir=tmp_path / "resumed", resume=checkpoint, **settings)
    assert whole.distance(resumed) == 0.0 and whole.metrics == resumed.metrics
    with pytest.raises(UserError, match=r"weights that are not trained \(.*the teacher\) are others than then"):
        run(stages, teacher=teacher(scale=2.0), output_dir=tmp_path / "other", resume=checkpoint, **settings)


def test_a_method_without_its_teacher_is_refused(run):
    with pytest.raises(UserError, match=r"teacher: method\.aux\.kdrl needs one; choose teacher=hf teacher\.path="):
        run(kdrl())
