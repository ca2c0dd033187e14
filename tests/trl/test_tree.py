"""Packed rows through the trainer: the weights after training are those of rows, whatever else is set."""

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig

from rltoken.errors import UserError
from rltoken.methods.brpo import brpo, budget_answers, thinking_only
from rltoken.methods.forced_answer import forced_answer
from rltoken.rollout import tree
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


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_weights_by_flex_attention(run, flex_on_cpu, monkeypatch):
    monkeypatch.setattr(tree, "obstacle", lambda model, flex=False: None)
    assert_same_training(run, method, packing="flex", beta=0.1)


def test_flex_attention_on_a_cpu_is_refused(run):
    with pytest.raises(UserError, match=r"rollout\.packing: .* no backward on a CPU; set it to tree"):
        run(method(), packing="flex", **SGD)


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


def test_shared_tokens_are_encoded_once(run, monkeypatch):
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
            run(stages, packing=name, pack_tokens=None, **SGD | {"max_steps": 1})
    assert sum(tokens["tree"]) < 0.6 * sum(tokens["rows"])


def test_a_model_that_cannot_keeps_rows_or_is_refused(tiny, run, tmp_path):
    """A sliding window: auto goes on with rows, tree says why not."""
    _, tokenizer, _ = tiny
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=8,
        eos_token_id=tokenizer.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "window")
    assert run(method(), model=tmp_path / "window", **SGD | {"max_steps": 1}).trainer.packing == "rows"
    with pytest.raises(UserError, match=r"rollout\.packing: .* sliding window"):
        run(method(), model=tmp_path / "window", packing="tree", **SGD)


def test_without_added_rows_nothing_is_packed(run):
    assert run({}, packing="tree", **SGD | {"max_steps": 1}).trainer.packing == "rows"
