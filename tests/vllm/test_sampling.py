"""Continuations of forced contexts, stops, the prefix cache and seeds, on the engine itself."""

import functools
import itertools
import os

import pytest
import torch

from rltoken.methods import brpo
from rltoken.rollout import vllm_cpu
from tests.vllm.conftest import logged


def recorded(trainer):
    """Let each call of the engine leave its prompts and outputs in the returned list."""
    calls, generate = [], trainer.vllm_generation.llm.generate

    def recording(prompts, **options):
        outputs = generate(prompts, **options)
        calls.append(outputs)
        return outputs

    trainer.vllm_generation.llm.generate = recording
    return calls


def contexts_of(trainer, n, length):
    """n contexts as forced answers have them: a prompt and `length` sampled tokens."""
    prompts = trainer.tokenize([trainer.train_dataset[i] for i in range(n)])
    thinking, _ = trainer.sample(prompts, max_new_tokens=length)
    return [prompt + ids for prompt, ids in zip(prompts, thinking, strict=True)]


def own_logps(trainer, context, ids):
    """The trainer's own log-probabilities of a continuation."""
    with torch.no_grad():
        logits = trainer.model(torch.tensor([context + ids])).logits[0, len(context) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def test_continuations_stop_where_they_are_told_and_carry_their_log_probs(make):
    trainer = make()
    contexts = [context for context in contexts_of(trainer, 8, 10) for _ in range(4)]
    common = max(range(len(trainer.processing_class)), key=lambda token: token not in trainer.eos_token_ids)
    stops = [common, common + 1, common + 2]
    ids, logps = trainer.extend(contexts, max_new_tokens=30, stops=stops)
    ends = {*stops, *trainer.eos_token_ids}
    assert all(not ends.intersection(row[:-1]) and (row[-1] in ends or len(row) == 30) for row in ids)
    assert {row[-1] for row in ids} >= set(stops), "every stop has ended some continuation, and stands at its end"
    assert any(len(row) == 30 for row in trainer.extend(contexts, max_new_tokens=30)[0]) or max(map(len, ids)) < 30
    for context, row, found in zip(contexts, ids, logps, strict=True):
        torch.testing.assert_close(torch.tensor(found), own_logps(trainer, context, row), atol=1e-4, rtol=0)


def test_after_a_stop_completions_go_on_as_before(make):
    trainer = make()
    contexts = contexts_of(trainer, 8, 4)
    stop = [token for token in range(len(trainer.processing_class)) if token not in trainer.eos_token_ids]
    assert all(len(row) == 1 for row in trainer.extend(contexts, stops=stop)[0])
    longer, _ = trainer.extend(contexts)
    assert max(map(len, longer)) > 1
    assert all(len(row) == 12 or row[-1] in trainer.eos_token_ids for row in longer)


def test_a_window_of_brpo_asks_the_engine_twice_and_shares_prefixes(make):
    trainer = make(
        {
            "rows": {
                "brpo": functools.partial(
                    brpo.budget_answers, budgets=[16, 32, 48], longest=48, n_summaries=4, max_new_tokens=4
                )
            }
        },
        max_completion_length=48,
        max_steps=2,
        loss_type="dr_grpo",
    )
    calls = recorded(trainer)
    trainer.train()
    assert len(calls) == 4, "in each window the completions, and all forced answers at once"
    thinking, answers = calls[2:]
    assert len(thinking) == 8 and len(answers) > 8 * 4
    shared = sum(output.num_cached_tokens for output in answers)
    assert shared > 0.3 * sum(len(output.prompt_token_ids) for output in answers)
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) < 1e-3


def test_every_request_has_a_stream_of_its_own(make, tmp_path):
    def completions(seed, generator):
        trainer = make(seed=seed, max_steps=2, output_dir=tmp_path / f"seed{seed}", max_completion_length=24)
        calls = recorded(trainer)
        torch.manual_seed(generator)
        trainer.train()
        trainer.close()
        return [[tuple(output.outputs[0].token_ids) for output in call] for call in calls]

    first, again, other = completions(3, generator=1), completions(3, generator=2), completions(4, generator=1)
    assert first == again
    assert all(len(set(call[i : i + 4])) > 2 for call in first for i in range(0, len(call), 4)), "siblings differ"
    long = [{ids for ids in itertools.chain(*calls) if len(ids) > 3} for calls in (first, other)]
    assert all(long) and long[0].isdisjoint(long[1])


@pytest.mark.parametrize(("stopped_at", "lora"), [(1, False), (2, False), (3, False), (2, True)])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(make, tmp_path, stopped_at, lora):
    def weights(name, **changes):
        resume = changes.pop("resume", None)
        trainer = make(
            lora=lora, output_dir=tmp_path / name, max_steps=4, save_strategy="steps", save_steps=1, **changes
        )
        trainer.train(resume_from_checkpoint=resume)
        trainer.close()
        return trainer.model.state_dict()

    straight = weights("run")
    resumed = weights("resumed", resume=str(tmp_path / "run" / f"checkpoint-{stopped_at}"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_handing_an_adapter_over_leaves_its_base_alone_to_the_last_bit(make, server):
    for trainer in (make(lora=True), make(lora=True, server=server)):
        before = {name: value.clone() for name, value in trainer.model.named_parameters() if "base_layer" in name}
        trainer.train()
        after = dict(trainer.model.named_parameters())
        assert before and all(torch.equal(value, after[name]) for name, value in before.items())


def test_runs_that_start_at_once_do_not_take_the_same_port(make, monkeypatch):
    monkeypatch.delenv("MASTER_PORT", raising=False)
    ports, engine = [], vllm_cpu.engine
    monkeypatch.setattr(
        vllm_cpu,
        "engine",
        lambda *args, **fields: (ports.append(os.environ["MASTER_PORT"]), engine(*args, **fields))[1],
    )
    make()
    assert ports[0] != "29500", "what TRL takes first, and so would every run"
    assert "MASTER_PORT" not in os.environ, "a child would take itself for a rank"
