"""Continuations that share their context, and evaluation under budgets, against plain `model.generate`."""

import random
import types

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig

from rltoken.evals import generate as evaluation
from rltoken.evals.generate import Settings, evaluate
from rltoken.evals.generators import TransformersGenerator
from rltoken.evals.metrics import under_budgets
from rltoken.rollout.forced import prefixes, thinking_part, well_formed
from rltoken.rollout.shared_prefix import generate
from rltoken.signals import plain_text
from rltoken.types import Template

PAD, EOS, END, ELLIPSIS, HEADER = 0, 1, 4, 14, 20
TEMPLATE = Template(think_end_id=END, cut=(ELLIPSIS, END, HEADER), ended=(HEADER,))
CONTEXTS = [[5, 31, 22, 38], [5, 33], [5, 31, 22, 38], [5, 31, 22, 39, 33, 21, 3, 6], [5, 33], [40, 41, 42]]


def a_model(tiny, lora=False):
    """A random model; a random adapter on it."""
    model = AutoModelForCausalLM.from_pretrained(tiny[0], dtype=torch.float32).eval()
    if lora:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
            model = get_peft_model(model, config).eval()
    return model


def greedy(**changes):
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": [EOS], "pad_token_id": PAD}
    return GenerationConfig(**options | changes)


def one_by_one(model, contexts, settings):
    return [
        model.generate(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long(), generation_config=settings
        )[0, len(ids) :].tolist()
        for ids in contexts
    ]


def unpadded(rows, ends=(EOS,)):
    return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in rows]


# Shared contexts


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_shared_contexts_give_what_plain_generation_gives(tiny, lora):
    """Contexts of different lengths, repeated, in one padded batch: greedily what each gives alone."""
    model = a_model(tiny, lora)
    found = generate(model, CONTEXTS, PAD, greedy()).tolist()
    assert unpadded(found) == unpadded(one_by_one(model, CONTEXTS, greedy()))
    assert found[0] == found[2] and found[1] == found[4] and len({tuple(row) for row in found}) == 4


def test_an_adapter_takes_part_in_the_context_too(tiny):
    with_it, without = (generate(a_model(tiny, lora), CONTEXTS, PAD, greedy()).tolist() for lora in (True, False))
    assert with_it != without


def test_any_token_may_end_a_continuation(tiny):
    """Ended rows are padded on the right up to the longest."""
    model = a_model(tiny)
    plain = one_by_one(model, CONTEXTS, greedy())
    stop = plain[0][3]
    settings = greedy(eos_token_id=[EOS, stop])
    found = generate(model, CONTEXTS, PAD, settings).tolist()
    assert unpadded(found, (EOS, stop)) == unpadded(plain, (EOS, stop))
    ended = found[0].index(stop)
    assert ended <= 3 and found[0][ended + 1 :] == [PAD] * (len(found[0]) - ended - 1)


def test_equal_contexts_are_encoded_once(tiny):
    model = a_model(tiny)
    seen = []
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    generate(model, CONTEXTS * 3, PAD, greedy(max_new_tokens=2))
    assert seen == [(4, 7), (18, 1), (18, 1)]


def test_samples_of_one_context_differ_and_have_its_distribution(tiny):
    """The next token after one context, 4000 times: the model's own probabilities."""
    model = a_model(tiny)
    settings = greedy(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = generate(model, [[5, 31, 22]] * 4000 + [[5, 33]] * 5, PAD, settings)[:4000, 0]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[5, 31, 22]])).logits[0, -1].softmax(-1)
    shares = torch.bincount(found, minlength=expected.numel()) / 4000
    assert (shares - expected).abs().max() < 5 * (0.05 * 0.95 / 4000) ** 0.5


def test_the_model_stays_as_it_was(tiny):
    model = a_model(tiny)
    before = (model.generation_config.to_dict(), model.training)
    generate(model, CONTEXTS, PAD, greedy())
    assert (model.generation_config.to_dict(), model.training) == before
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


# Evaluation


def odd_end(completion_ids, **_):
    """1 where the last token but the end is odd: spread on a random model."""
    return [float([i for i in ids if i != EOS][-1] % 2) if set(ids) != {EOS} else 0.0 for ids in completion_ids]


def settings_of(**changes):
    options = {
        "samples": 2,
        "temperature": 1.0,
        "max_new_tokens": 24,
        "batch_size": 5,
        "seed": 11,
        "budgets": (2, 6, 100),
        "max_answer_tokens": 4,
    }
    return Settings(**options | changes)


def table_of(tiny, reward=odd_end, template=TEMPLATE, model=None, problems=7, **changes):
    settings = settings_of(**changes)
    generator = generator_of(tiny, model or a_model(tiny), settings)
    return evaluate(generator, tiny[1], tiny[2].select(range(problems)), reward, template, settings)


def generator_of(tiny, model, settings):
    return TransformersGenerator(model, tiny[1], temperature=settings.temperature, batch_size=settings.batch_size)


def closing(model, taste=2.0):
    """The model with a taste for the end of thinking, so that some traces close."""
    head = torch.nn.Linear(64, model.config.vocab_size)
    head.weight, head.bias = model.lm_head.weight, torch.nn.Parameter(torch.zeros(model.config.vocab_size))
    head.bias.data[END] = taste
    model.lm_head = head
    return model


def test_the_columns_of_the_budgets(tiny):
    table = table_of(tiny)
    assert len(table) == 14 and table["id"].nunique() == 7
    assert [name for name in table.columns if name.startswith("correct@")] == ["correct@2", "correct@6", "correct@100"]
    values = table[["correct@2", "correct@6", "correct@100"]]
    assert values.isin([0.0, 1.0]).all().all() and 0 < values.to_numpy().mean() < 1
    assert under_budgets(table)["final_accuracy"] == pytest.approx(table["correct@100"].mean())
    assert not [name for name in table_of(tiny, budgets=()).columns if "@" in name]


def test_at_each_budget_stands_the_score_of_the_answer_forced_there(tiny):
    """Greedily, problem by problem: cut, force, answer, grade; the longest budget keeps the whole thinking."""
    model, tokenizer = closing(a_model(tiny), 0.6), tiny[1]
    dataset = tiny[2].select(range(12))
    settings = settings_of(temperature=0, samples=1)
    table = evaluate(generator_of(tiny, model, settings), tokenizer, dataset, odd_end, TEMPLATE, settings)
    closed = 0
    for example, (_, row) in zip(dataset, table.iterrows(), strict=True):
        prompt = tokenizer.apply_chat_template(example["prompt"], add_generation_prompt=True, return_dict=True)
        prompt = prompt["input_ids"]
        (whole,) = unpadded(one_by_one(model, [prompt], greedy(max_new_tokens=24)))
        thinking = thinking_part(whole, END)
        closed += thinking[-1] == END
        assert row["completion_tokens"] == len(whole) and row["truncated"] == (whole[-1] != EOS)
        for budget in (2, 6, 100):
            kept = thinking[:budget]
            prefix = kept + ([HEADER] if kept[-1] == END else [ELLIPSIS, END, HEADER])
            (answer,) = unpadded(one_by_one(model, [prompt + prefix], greedy(max_new_tokens=4)))
            formed = (prefix[len(kept) - 1 :] + answer).count(END) == 1 and kept[-1] != EOS
            assert row[f"correct@{budget}"] == odd_end([prefix + answer])[0] * formed, (budget, prefix, answer)
    assert 0 < closed < 12


def test_thinking_that_ended_is_answered_once_for_all_budgets_after_it(tiny):
    asked = []

    def count(completion_ids, **_):
        asked.extend(completion_ids)
        return [float(len(asked) % 2) for _ in completion_ids]

    table = table_of(tiny, count, model=closing(a_model(tiny)), budgets=(8, 9, 500, 600))
    short = table["thinking_tokens"] + 1 <= 8
    assert short.any() and (table["correct@500"] == table["correct@600"]).all()
    assert (table["correct@8"] == table["correct@600"])[short].all()
    assert len(asked) < 14 * 5


def test_transformers_samples_a_batch_from_one_random_state(tiny):
    """The second batch by hand: its completions in their order, then its forced answers by length, batch by batch."""
    model, tokenizer, settings = closing(a_model(tiny)), tiny[1], settings_of()
    rows = table_of(tiny, model=model).iloc[5:10]
    sampled = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}

    def batch(contexts, **changes):
        padded = tokenizer.pad({"input_ids": contexts}, padding_side="left", return_tensors="pt")
        found = model.generate(**padded, generation_config=greedy(**sampled, **changes))
        return unpadded(found[:, padded["input_ids"].size(1) :].tolist())

    examples = [tiny[2][job // 2] for job in range(5, 10)]
    prompts = tokenizer.apply_chat_template(
        [example["prompt"] for example in examples], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11 * 1_000_003 + 1)
        completions = batch(prompts, max_new_tokens=24)
        cut = [
            (i, prefix, shared)
            for i, ids in enumerate(completions)
            for prefix, shared in prefixes(thinking_part(ids, END), settings.budgets, TEMPLATE, frozenset([EOS]))
        ]
        cut.sort(key=lambda item: len(item[1].ids))
        contexts = [prompts[i] + prefix.ids for i, prefix, _ in cut]
        answers = [
            ids for start in range(0, len(cut), 5) for ids in batch(contexts[start : start + 5], max_new_tokens=4)
        ]
    assert rows["text"].tolist() == [plain_text(text) for text in tokenizer.batch_decode(completions, True)]
    expected = [0.0] * 5
    for (i, prefix, shared), answer in zip(cut, answers, strict=True):
        formed = well_formed(prefix, answer, TEMPLATE, frozenset([EOS]))
        expected[i] += shared * formed * odd_end([prefix.ids + answer])[0]
    assert rows[["correct@2", "correct@6", "correct@100"]].sum(axis=1).tolist() == expected
    assert 0 < sum(expected) < 15


class Ranks:
    """Two processes one after the other: each sees its own part, and what the others hand over."""

    def __init__(self, monkeypatch, ranks):
        self.ranks, self.tables, self.monkeypatch = ranks, [], monkeypatch

    def __call__(self, call):
        parts = []
        for rank in range(self.ranks):
            state = types.SimpleNamespace(process_index=rank, num_processes=self.ranks)
            self.monkeypatch.setattr(evaluation, "PartialState", lambda state=state: state)
            self.monkeypatch.setattr(evaluation, "gather_object", lambda tables: parts.extend(tables) or parts)
            found = call()
        return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_table_does_not_depend_on_the_number_of_processes(tiny, monkeypatch, ranks):
    alone = table_of(tiny)
    together = Ranks(monkeypatch, ranks)(lambda: table_of(tiny))
    assert list(together.index) == list(range(14))
    assert alone.equals(together)


def test_more_processes_than_batches(tiny, monkeypatch):
    alone = table_of(tiny, batch_size=9)
    assert alone.equals(Ranks(monkeypatch, 4)(lambda: table_of(tiny, batch_size=9)))


class Seeded:
    """What samples each request from its own seed alone, as an engine does: tokens, and now and then an end."""

    ends, together = frozenset([EOS]), None

    def __init__(self):
        self.seeds, self.calls = [], []

    prefilled = None
    besides = None

    def complete(self, contexts, max_new_tokens, stops, seeds, begun=()):
        self.seeds += seeds
        self.calls.append(len(contexts))
        drawn = [random.Random(seed).choices(range(1, 60), k=max_new_tokens) for seed in seeds]
        return [ids[: ids.index(EOS) + 1] if EOS in ids else ids for ids in drawn]


def seeded_table(tiny, problems=7, **changes):
    generator, settings = Seeded(), settings_of(**changes)
    table = evaluate(generator, tiny[1], tiny[2].select(range(problems)), odd_end, TEMPLATE, settings)
    return table, generator


@pytest.mark.parametrize(("chunk", "ranks"), [(1, 1), (5, 1), (2048, 2), (3, 3), (2048, 40)])
def test_requests_with_seeds_of_their_own_depend_on_nothing_else(tiny, monkeypatch, chunk, ranks):
    alone, generator = seeded_table(tiny)
    assert generator.calls[0] == 14 and len(generator.calls) == 2, "all completions at once, and all forced answers"
    assert len(set(generator.seeds)) == len(generator.seeds), "no two requests share a stream"
    assert not alone.equals(seeded_table(tiny, seed=12)[0])
    assert alone.equals(Ranks(monkeypatch, ranks)(lambda: seeded_table(tiny, batch_size=2, chunk=chunk)[0]))


def test_a_part_of_the_problems_is_sampled_as_it_is_among_all(tiny):
    assert seeded_table(tiny)[0].iloc[:6].equals(seeded_table(tiny, problems=3)[0])


def test_the_shares_of_processes_are_even():
    assert evaluation.even_chunk(9000, 1, 2048) == 1800 and evaluation.even_chunk(9000, 8, 2048) == 1125
    assert evaluation.even_chunk(40_000, 8, 2048) == 1667, "three chunks of 5000 each"
    assert evaluation.even_chunk(3, 8, 2048) == evaluation.even_chunk(0, 8, 2048) == 1


def test_global_random_states_are_left_alone(tiny):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    one = table_of(tiny)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    torch.rand(5)
    assert one.equals(table_of(tiny)), "nor do they matter"
    assert not one.equals(table_of(tiny, seed=12))


def test_the_mode_of_the_model_is_restored(tiny):
    model = a_model(tiny).train()
    table_of(tiny, model=model, problems=2)
    assert model.training


def test_an_abandoned_or_twice_ended_answer_is_wrong(tiny):
    """Everything is graded 1: what is 0 at a budget failed the format gate."""

    def ones(completion_ids, **_):
        return [1.0] * len(completion_ids)

    model = closing(a_model(tiny))
    table = table_of(tiny, ones, model=model, problems=8)
    assert (table["correct"] == 1).all() and 0 < table["correct@100"].mean() < 1


def test_a_generator_stops_at_the_end_of_the_sequence_and_at_stops(tiny):
    generator = generator_of(tiny, closing(a_model(tiny)), settings_of(batch_size=64))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rows = generator.complete(CONTEXTS * 20, 30, (END,), range(120))
    assert generator.ends == {EOS}
    assert all(not {EOS, END} & set(row[:-1]) and 1 <= len(row) <= 30 for row in rows)
    assert {END, EOS} <= {row[-1] for row in rows}
