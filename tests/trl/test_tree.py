"""Packed rows through the trainer: the weights after training are those of rows, whatever else is set."""

import functools
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, MistralConfig
from transformers.integrations.flex_attention import flex_attention_forward

from rltoken.errors import UserError
from rltoken.methods.brpo import brpo, budget_answers, thinking_only
from rltoken.methods.entropy_covariance import clip_cov, high_covariance, kl_cov, unclipped
from rltoken.methods.forced_answer import forced_answer
from rltoken.methods.forking_tokens import forks
from rltoken.methods.hapo_entropy import adaptive_clip
from rltoken.methods.mrt import episode_answers, episode_credit, mrt, prefix_rollouts
from rltoken.methods.thr import thr
from rltoken.rollout import tree
from rltoken.teachers import Teacher
from rltoken.trainer import TokenGRPOTrainer

SGD = {"optim": "sgd", "max_grad_norm": 0.0, "max_steps": 3, "learning_rate": 1.0}
KINDS = ("thinking", "summary")
BUDGETS = {"budgets": [2, 5, 9], "longest": 12}


def method(**slots):
    """BRPO with all its answers trained, and further stages."""
    rows = functools.partial(budget_answers, **BUDGETS, n_summaries=2, max_new_tokens=4, summary_train_rows="all")
    stages = {
        "controls": {"brpo": functools.partial(thinking_only, **BUDGETS)},
        "rows": {"brpo": rows},
        "credits": {"brpo": brpo},
    }
    return stages | slots


def assert_same_training(run, stages, *, tolerance=2e-6, packing="tree", **settings):
    settings = SGD | {"loss_type": "dr_grpo"} | settings
    rows = run(stages(), packing="rows", **settings)
    packed = run(stages(), packing=packing, **settings)
    assert packed.trainer.packing == packing
    assert rows.distance(packed) < tolerance
    for one, other in zip(rows.metrics, packed.metrics, strict=True):
        assert one.get("loss", 0.0) == pytest.approx(other.get("loss", 0.0), abs=1e-6)
        assert one.get("grad_norm", 0.0) == pytest.approx(other.get("grad_norm", 0.0), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_type": "grpo"},
        {"loss_type": "dapo"},
        {"loss_type": "cispo", "epsilon_high": 5.0},
        {"loss_type": "sapo"},
        {"importance_sampling_level": "sequence", "credits": {}},
        {"lora": True},
        {"gradient_checkpointing": True},
        {"beta": 0.1},
        {"num_iterations": 2, "steps_per_generation": 2, "gradient_accumulation_steps": 2},
        {"pack_tokens": 60},
        {"pack_tokens": None},
        {"normaliser": "all"},
    ],
    ids=lambda settings: "-".join(f"{name}={value}" for name, value in settings.items()) or "default",
)
def test_weights_are_those_of_rows(run, settings):
    slots = {"credits": settings.pop("credits")} if "credits" in settings else {}
    assert_same_training(run, functools.partial(method, **slots), **settings)


@pytest.mark.parametrize("trained", [1, 2])
def test_drawn_answers(run, trained):
    """`summary_train_rows`: where answers have no advantage, rows of one masked token stand in their places."""
    rows = functools.partial(budget_answers, **BUDGETS, n_summaries=2, max_new_tokens=4, summary_train_rows=trained)
    assert_same_training(run, functools.partial(method, rows={"brpo": rows}))


def test_twenty_steps(run):
    stages, settings = method(), SGD | {"loss_type": "dr_grpo", "max_steps": 20, "learning_rate": 0.2}
    rows, packed = (run(stages, packing=name, **settings) for name in ("rows", "tree"))
    assert rows.distance(packed) < 5e-6
    assert [line.get("budget_scores/1") for line in rows.metrics] == [
        line.get("budget_scores/1") for line in packed.metrics
    ], "the same tokens were sampled in every step"


def test_a_packed_run_resumes_exactly(run, tmp_path):
    """Within a window of packed families, drawn with a remainder, and two passes over it."""
    settings = {
        "per_device_train_batch_size": 4,
        "steps_per_generation": 4,
        "num_iterations": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "packing": "tree",
        "save_strategy": "steps",
        "save_steps": 1,
    }
    whole = run(method(), output_dir=tmp_path / "whole", **settings)
    resumed = run(method(), output_dir=tmp_path / "again", resume=tmp_path / "whole/checkpoint-3", **settings)
    assert whole.trainer.packing == "tree" and whole.distance(resumed) == 0.0
    assert [line["loss"] for line in resumed.metrics if "loss" in line][-3:] == [
        line["loss"] for line in whole.metrics if "loss" in line
    ][-3:]


EPISODES = {"separator": None, "markers": [str(digit) for digit in range(7)]}


def mrt_method():
    """A prefix's and all episodes' forced answers."""
    prefixes = functools.partial(prefix_rollouts, **EPISODES, longest=12, max_new_tokens=3)
    return {"rows": {"mrt": prefixes}, "credits": {"mrt": mrt}}


def episodes_method():
    rows = functools.partial(episode_answers, **EPISODES, answers=2, max_new_tokens=3)
    return {"rows": {"mrt": rows}, "credits": {"mrt": episode_credit}}


@pytest.mark.parametrize("stages", [mrt_method, episodes_method])
def test_forced_answers_at_episodes(run, stages):
    """MRT: what follows a prefix is trained, the prefix is not."""
    assert_same_training(run, stages, loss_type="dapo")


@pytest.mark.parametrize(
    "slots",
    [
        {"weights": {"forks": functools.partial(forks, rho=0.3, kinds=KINDS)}},
        {"weights": {"forks": functools.partial(forks, rho=0.3)}},
        {"weights": {"forks": functools.partial(forks, rho=0.3, kinds=("summary",))}},
        {"weights": {"thr": functools.partial(thr, p=0.5, max_tokens=12, kinds=KINDS)}},
        {"bounds": {"hapo": functools.partial(adaptive_clip, kinds=KINDS)}},
        {
            "marks": {"high_covariance": functools.partial(high_covariance, share=0.1, kinds=KINDS)},
            "bounds": {"unclipped": unclipped},
            "weights": {"clip_cov": functools.partial(clip_cov, share=0.1, lower=0.1)},
            "aux": {"kl_cov": kl_cov},
        },
    ],
    ids=["forks", "forks of thinking", "forks of summaries", "thr", "bounds", "marks"],
)
def test_methods_that_act_per_token(run, slots):
    """The same tokens are chosen by what a packed forward gives, on rows of the same kinds."""
    settings = {"num_iterations": 2, "steps_per_generation": 2, "learning_rate": 0.2}
    assert_same_training(run, functools.partial(method, **slots), **settings)


@pytest.mark.parametrize("packing", ["rows", "tree"])
@pytest.mark.parametrize("pack_tokens", [None, 40])
def test_kinds_are_those_of_their_rows(run, packing, pack_tokens):
    """In the forward, after shuffle, split and packs: answers have at most 4 trained tokens here, thinking has more."""
    seen = []

    def look(kind, mask, logps):
        seen.extend(zip(kind, mask.sum(1).tolist(), strict=True))
        return torch.ones_like(logps)

    settings = {"per_device_train_batch_size": 4, "steps_per_generation": 2, "max_steps": 2}
    run(
        method(weights={"look": functools.partial(look, kinds=KINDS)}),
        packing=packing,
        pack_tokens=pack_tokens,
        **settings,
    )
    counts = {kind: [tokens for name, tokens in seen if name == kind] for kind in KINDS}
    assert len(counts["summary"]) == 6 * len(counts["thinking"]) > 0
    assert max(counts["summary"]) <= 4 < min(counts["thinking"])


@pytest.mark.parametrize("packing", ["rows", "tree"])
def test_a_stage_that_names_no_kind_sees_its_kind(run, packing):
    seen = []

    def look(mask, logps):
        seen.extend(mask.sum(1).tolist())
        return torch.ones_like(logps)

    run(
        method(weights={"look": functools.partial(look, kinds=("summary",))}), packing=packing, **SGD | {"max_steps": 1}
    )
    assert len(seen) == 6 * 8 and max(seen) <= 4


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_weights_by_flex_attention(run, flex_on_cpu, monkeypatch):
    calls = []
    monkeypatch.setattr(tree, "obstacle", lambda *_, **__: None)
    monkeypatch.setattr(
        tree, "flex_attention_forward", lambda *a, **k: calls.append(1) or flex_attention_forward(*a, **k)
    )
    assert_same_training(run, method, packing="flex", beta=0.1)
    assert calls


def test_flex_attention_on_a_cpu_is_refused(run):
    with pytest.raises(UserError, match=r"rollout\.packing: .* no backward on a CPU; set it to tree"):
        run(method(), packing="flex", **SGD)


def test_flex_is_not_told_to_take_a_tree_that_cannot_be(run, tiny, tmp_path):
    folder, reason = folder_that_cannot("window", tiny[1], tmp_path)
    assert reason in tree.obstacle(AutoModelForCausalLM.from_pretrained(folder))
    with pytest.raises(UserError, match=r"rollout\.packing: .*; set it to rows"):
        run(method(), model=folder, packing="flex", **SGD)


def test_signals_of_the_rows_are_the_same(run):
    """What window stages see of old passes, and losses on the hidden state and on an appended token of a forward."""
    seen = {}

    def look(old_hidden, old_entropy, old_logps, ref_logps, old_appended, advantages, mask, *, name):
        """Keep what a window stage sees; the hidden states of padding are nobody's."""
        values = (old_hidden * mask.unsqueeze(2), old_entropy, old_logps, ref_logps, old_appended)
        seen.setdefault(name, [value.clone() for value in values])
        return advantages

    def stages(name):
        return method(
            credits={"brpo": brpo, "look": functools.partial(look, name=name, kinds=KINDS)},
            aux={
                "hidden": functools.partial(lambda hidden: 0.01 * hidden.square().mean(2), kinds=KINDS),
                "appended": functools.partial(lambda appended: 0.001 * appended.square(), kinds=KINDS),
            },
        )

    settings = SGD | {"loss_type": "dr_grpo", "max_steps": 2, "appended_id": 3, "beta": 1e-6}
    runs = [run(stages(name), packing=name, **settings) for name in ("rows", "tree")]
    assert runs[0].distance(runs[1]) < 5e-6
    for of_rows, of_tree in zip(seen["rows"], seen["tree"], strict=True):
        assert of_rows.abs().max() > 0.1
        torch.testing.assert_close(of_tree, of_rows, rtol=0, atol=1e-5)


def test_other_added_rows(run):
    """A stage that knows nothing of packing."""
    stages = {"rows": {"forced": functools.partial(forced_answer, max_new_tokens=3)}}
    assert_same_training(run, lambda: stages)


@pytest.mark.parametrize("pack_tokens", [None, 60])
def test_shared_tokens_are_encoded_once(run, monkeypatch, pack_tokens):
    """Tokens of the training forwards: with rows, every answer has its thinking in front."""
    tokens = {}

    def count(name):
        stock = TokenGRPOTrainer.forward
        counted = tokens.setdefault(name, [])

        def forward(self, model, inputs, what=frozenset()):
            handle = self.model.base_model.register_forward_hook(
                lambda module, args, output: counted.append(output.last_hidden_state.shape[:2].numel())
            )
            try:
                return stock(self, model, inputs, what)
            finally:
                handle.remove()

        return forward

    stages = method(weights={"even": lambda entropy: torch.ones_like(entropy)})
    for name in ("rows", "tree"):
        with monkeypatch.context() as patch:
            patch.setattr(TokenGRPOTrainer, "forward", count(name))
            run(stages, packing=name, pack_tokens=pack_tokens, **SGD | {"max_steps": 1})
    assert sum(tokens["tree"]) < 0.6 * sum(tokens["rows"])


def test_passes_without_gradient_are_packed_too(run, monkeypatch):
    """That of the sampling policy and that of the reference, over the same packed rows as the training forward."""
    stock, planted = tree.plant, {True: [], False: []}

    def plant(ids, *args, **settings):
        packed = stock(ids, *args, **settings)
        if len(ids) > len(tree.TRIED):
            planted[torch.is_grad_enabled()].append(packed.ids.shape)
        return packed

    monkeypatch.setattr(tree, "plant", plant)
    settings = {"num_iterations": 2, "beta": 0.1, "max_steps": 2, "pack_tokens": None, "packing": "tree"}
    run(method(), **SGD | settings)
    assert len(planted[False]) == 2 == len(planted[True]) and planted[False] == planted[True]


def test_padding_is_zero_as_in_rows(run):
    """The window's log-probabilities and entropies, those of padding among them."""
    seen = {"rows": [], "tree": []}

    def look(old_logps, old_entropy, ref_logps, advantages, *, name):
        seen[name].append(torch.stack([old_logps, old_entropy, ref_logps]))
        return advantages

    for name in seen:
        credits = {"brpo": brpo, "look": functools.partial(look, name=name, kinds=KINDS)}
        run(method(credits=credits), packing=name, **SGD | {"max_steps": 1, "beta": 0.1})
    for of_rows, of_tree in zip(seen["rows"], seen["tree"], strict=True):
        assert (of_rows == 0).any()
        torch.testing.assert_close(of_tree, of_rows, rtol=0, atol=1e-5)


@pytest.fixture(params=["window", "positions"])
def model_that_cannot(request, tiny, tmp_path):
    """(folder, the reason): its settings tell, or a trial does."""
    return folder_that_cannot(request.param, tiny[1], tmp_path)


def folder_that_cannot(kind, tokenizer, tmp_path):
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config, reason = {
        "window": (MistralConfig(**ids, **sizes, num_key_value_heads=1, sliding_window=8), "sliding window"),
        "positions": (GPT2Config(**ids, n_embd=32, n_layer=1, n_head=2, n_positions=64), "not those of rows"),
    }[kind]
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model", reason


def test_a_model_that_cannot_keeps_rows_or_is_refused(model_that_cannot, run, caplog):
    """Auto goes on with rows and says so, tree says why not."""
    folder, reason = model_that_cannot
    assert run(method(), model=folder, **SGD | {"max_steps": 1}).trainer.packing == "rows"
    (told,) = (record for record in caplog.records if "each added row is encoded whole" in record.getMessage())
    assert reason in told.getMessage()
    assert told.levelno == logging.WARNING, "which is what the command line shows"
    with pytest.raises(UserError, match=rf"rollout\.packing: .* {reason}.*; set it to rows"):
        run(method(), model=folder, packing="tree", **SGD)


@pytest.mark.parametrize("kind", ["window", "positions"])
def test_a_teacher_that_cannot_is_asked_about_rows(run, tiny, tmp_path, kind):
    """The policy is packed all the same, and what the teacher says is what it says of rows."""
    folder, seen = folder_that_cannot(kind, tiny[1], tmp_path)[0], {"rows": [], "tree": []}

    def look(teacher_logps, advantages, mask, *, name):
        seen[name].append(teacher_logps * mask)
        return advantages

    for name in seen:
        credits = {"brpo": brpo, "look": functools.partial(look, name=name, kinds=KINDS)}
        teacher = Teacher(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
        done = run(method(credits=credits), packing=name, teacher=teacher, **SGD | {"max_steps": 1})
        assert done.trainer.packing == name
    torch.testing.assert_close(seen["tree"], seen["rows"], rtol=0, atol=1e-6)
    assert seen["rows"][0].abs().max() > 0.1


def test_auto_packs_where_it_can_and_nothing_else_is_known(run):
    assert run(method(), **SGD | {"max_steps": 1}).trainer.packing == "tree"
    with pytest.raises(UserError, match=r"rollout\.packing: 'trees' is unknown; use 'auto', 'rows', 'tree' or 'flex'"):
        run(method(), packing="trees", **SGD)


def test_without_added_rows_nothing_is_packed(run):
    assert run({}, packing="tree", **SGD | {"max_steps": 1}).trainer.packing == "rows"
