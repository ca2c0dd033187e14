"""What an evaluation costs in tokens: answers at many budgets do not compute the thinking again, and stay the same."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from rltoken.evals.generate import Settings, evaluate
from rltoken.evals.generators import TransformersGenerator
from rltoken.models import load_tokenizer
from rltoken.rollout.forced import encode_template
from rltoken.tiny import accuracy, problems, warm_start

TEN = tuple(range(20, 201, 20))


class Forgetful(TransformersGenerator):
    """Computes every context in full."""

    def complete(self, contexts, max_new_tokens, stops, seeds, begun=()):
        return super().complete(contexts, max_new_tokens, stops, seeds)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A tiny model that knows nothing yet, and its tokenizer."""
    folder = str(warm_start(steps=2, cache_dir=tmp_path_factory.mktemp("cache")))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), load_tokenizer(
        folder, think_end="</think>"
    )


def without(model, tokenizer, monkeypatch):
    """Let the model end neither its thinking nor the sequence."""
    stock, never = model.lm_head.forward, [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("</think>")]

    def forward(hidden):
        return stock(hidden).index_fill(-1, torch.tensor(never), -1e9)

    monkeypatch.setattr(model.lm_head, "forward", forward)


def table_of(loaded, budgets, kind=TransformersGenerator, temperature=1.0, longest=200):
    model, tokenizer = loaded
    settings = Settings(2, temperature, longest, 6, 3, budgets, 4, top_p=0.9)
    generator = kind(model, tokenizer, temperature=temperature, top_p=0.9, batch_size=6)
    template = encode_template(tokenizer, think_end="</think>")
    return evaluate(generator, tokenizer, problems(6, split="eval"), accuracy, template, settings)


def test_ten_budgets_cost_little_more_than_none(loaded, monkeypatch):
    without(*loaded, monkeypatch)
    one, ten, twice = table_of(loaded, ()), table_of(loaded, TEN), table_of(loaded, TEN, Forgetful)
    cost = {name: table["sampled_tokens"] + table["prefilled_tokens"] for name, table in
            {"one": one, "ten": ten, "twice": twice}.items()}  # fmt: skip
    prompt = one["prefilled_tokens"]
    assert (one["sampled_tokens"] == 200).all() and prompt.between(5, 60).all()
    assert (ten["sampled_tokens"] == 200 + 10 * 4).all()
    # of every context the end of thinking alone, and where all 200 tokens are kept the last of them, never fed
    assert (ten["prefilled_tokens"] - prompt).isin([10, 11]).all()
    # the prompt eleven times, the kept thinking and the end of it
    assert (twice["prefilled_tokens"] == 11 * prompt + sum(TEN) + 10).all()
    print({name: int(tokens.sum()) for name, tokens in cost.items()})
    assert cost["ten"].sum() <= 1.5 * cost["one"].sum() < 3 * cost["one"].sum() < cost["twice"].sum()


def test_answers_are_those_of_contexts_computed_in_full(loaded):
    """Greedily, with traces and prompts of many lengths: prompts are padded, thinking ends where it wants."""
    one, other = (table_of(loaded, (2, 7, 30, 60), kind, 0.0, 60) for kind in (TransformersGenerator, Forgetful))
    free = [name for name in one.columns if name != "prefilled_tokens"]
    assert one[free].equals(other[free])
    assert one["prefilled_tokens"].sum() < other["prefilled_tokens"].sum()


def test_a_sample_at_one_budget_has_the_model_s_own_distribution(loaded):
    """The first answer token after a cut, many times, against the model's probabilities after the same context."""
    model, tokenizer = loaded
    generator = TransformersGenerator(model, tokenizer, temperature=1.0, batch_size=3000)
    prompts = [[5, 31, 22, 38, 7], [5, 33]] * 2
    first = generator.complete(prompts, 12, (), range(4))
    context = prompts[1] + first[1][:3] + [9]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = generator.complete([context] * 3000, 1, (), range(3000), [(1, len(prompts[1]) + 3)] * 3000)
    assert generator.prefilled == [1] * 3000
    with torch.no_grad():
        expected = model(torch.tensor([context])).logits[0, -1].softmax(-1)
    shares = torch.bincount(torch.tensor(found)[:, 0], minlength=expected.numel()) / 3000
    assert (shares - expected).abs().max() < 5 * (0.25 / 3000) ** 0.5


def test_the_top_p_tokens_alone_are_sampled(loaded):
    model, tokenizer = loaded
    prompt = [5, 31, 22, 38]
    with torch.no_grad():
        values, order = model(torch.tensor([prompt])).logits[0, -1].softmax(-1).sort(descending=True)
    kept = set(order[: int((values.cumsum(0) < 0.3).sum()) + 1].tolist())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generator = TransformersGenerator(model, tokenizer, temperature=1.0, top_p=0.3, batch_size=2000)
        found = {ids[0] for ids in generator.complete([prompt] * 2000, 1, (), range(2000))}
    assert found == kept and len(kept) < len(values) / 2
