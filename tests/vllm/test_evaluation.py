"""Evaluation by vLLM: greedily what transformers gives, sampled by seeds alone; training's engine stays as it was."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from rltoken import models
from rltoken.adapters import base_name
from rltoken.errors import UserError
from rltoken.evals import during
from rltoken.evals.engine import engine
from rltoken.evals.generate import SelfReward, Settings, evaluate
from rltoken.evals.generators import TransformersGenerator, VllmGenerator, ends_of
from rltoken.rollout.forced import encode_template, prefixes, thinking_part
from rltoken.tiny import accuracy, problems, warm_start
from tests.adapters.conftest import an_adapter
from tests.trl.conftest import WALL_CLOCK
from tests.trl.test_under_budgets import Ranks

CPU = torch.device("cpu")
TIE = 1e-4
"""Nats between the two most probable tokens below which two correct float32 implementations may choose differently."""
SHARE = 0.02
"""Of the completions, at most so many may come to a tie."""
BUDGETS = (4, 12, 24)
SHORT = ("eval.limit=3", "eval.samples=2", "eval.max_new_tokens=24", "eval.budgets=[4,8,24]", "data.eval.n=4")


def settings_of(**changes):
    options = {
        "samples": 4, "temperature": 1.0, "max_new_tokens": 48, "batch_size": 32, "seed": 11, "budgets": BUDGETS,
        "max_answer_tokens": 4,
    }  # fmt: skip
    return Settings(**options | changes)


def prompts_of(tokenizer, dataset):
    """Token ids of the problems."""
    told = tokenizer.apply_chat_template(list(dataset["prompt"]), add_generation_prompt=True, return_dict=True)
    return told["input_ids"]


def gaps(model, contexts, one, other):
    """For each context whose two greedy completions part, by how much the model prefers its first choice there.

    Fails where one of them took neither the first nor the second choice.
    """
    found = []
    for context, a, b in zip(contexts, one, other, strict=True):
        if a != b:
            at = next(i for i, pair in enumerate(itertools.zip_longest(a, b)) if len(set(pair)) == 2)
            with torch.no_grad():
                logps = model(torch.tensor([context + a[:at]])).logits[0, -1].float().log_softmax(-1)
            values, choices = logps.topk(2)
            assert {a[at], b[at]} == set(choices.tolist())
            found.append(float(values[0] - values[1]))
    return found


def assert_alike(model, contexts, one, other):
    """Two lists of greedy completions are the same but for few ties, which are printed."""
    found = gaps(model, contexts, one, other)
    print(f"{len(found)} of {len(contexts)} completions part, at gaps of {found}")
    assert len(found) <= SHARE * len(contexts) and all(gap < TIE for gap in found)


@pytest.fixture(scope="class")
def both(vllm, cache):
    """An engine and a model of transformers from the same folder: the embedded world's, trained a little."""
    folder = str(warm_start(steps=60, cache_dir=cache))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with engine(folder, dtype=torch.float32, device=CPU) as llm:
        yield SimpleNamespace(
            model=model,
            tokenizer=tokenizer,
            dataset=problems(100, split="eval"),
            template=encode_template(tokenizer, think_end="</think>"),
            vllm=lambda temperature: VllmGenerator(
                llm, ends_of(models.generation_config(folder), tokenizer), temperature=temperature
            ),
            hf=lambda temperature: TransformersGenerator(model, tokenizer, temperature=temperature, batch_size=32),
            llm=llm,
        )


class TestAnEngine:
    """A class, so that the engine ends before the next one begins."""

    def table(self, both, generator, n=100, **changes):
        settings = settings_of(**changes)
        dataset = both.dataset.select(range(n))
        return evaluate(generator, both.tokenizer, dataset, accuracy, both.template, settings)

    def test_greedy_completions_and_forced_answers_are_those_of_transformers(self, both):
        prompts = prompts_of(both.tokenizer, both.dataset)
        assert both.vllm(0.0).ends == both.hf(0.0).ends
        one, other = (generator.complete(prompts, 64, (), range(100)) for generator in (both.hf(0.0), both.vllm(0.0)))
        assert_alike(both.model, prompts, one, other)
        stops = [both.template.think_end_id]
        contexts = [
            prompt + prefix.ids
            for prompt, ids in zip(prompts, one, strict=True)
            for prefix, _ in prefixes(thinking_part(ids, stops[0]), BUDGETS, both.template, both.hf(0.0).ends)
        ]
        assert len(contexts) > 200
        one, other = (
            generator.complete(contexts, 8, stops, range(len(contexts))) for generator in (both.hf(0.0), both.vllm(0.0))
        )
        assert_alike(both.model, contexts, one, other)

    def test_greedy_tables_are_alike(self, both):
        one, other = (self.table(both, make(0.0), temperature=0.0, samples=1) for make in (both.hf, both.vllm))
        one = one.drop(columns="prefilled_tokens")
        assert one.columns.tolist() == other.columns.tolist() and one["correct@24"].nunique() == 2
        assert (one != other).any(axis=1).sum() <= SHARE * len(BUDGETS) * len(one)

    def test_a_sampled_table_depends_on_nothing_but_seeds(self, both, monkeypatch):
        first = self.table(both, both.vllm(1.0), n=12)
        assert (first.groupby("id")["text"].nunique() > 2).all(), "samples of a problem differ"
        again = {
            "rerun": self.table(both, both.vllm(1.0), n=12),
            "batch size": self.table(both, both.vllm(1.0), n=12, batch_size=3),
            "processes": Ranks(monkeypatch, 2)(lambda: self.table(both, both.vllm(1.0), n=12)),
        }
        monkeypatch.undo()
        again["chunks"] = self.table(both, both.vllm(1.0), n=12, chunk=7)
        assert all(first.equals(table) for table in again.values()), [
            k for k, t in again.items() if not t.equals(first)
        ]
        other = self.table(both, both.vllm(1.0), n=12, seed=12)
        assert (first["text"] != other["text"]).mean() > 0.5

    def test_the_top_p_tokens_alone_are_sampled(self, both):
        prompt = prompts_of(both.tokenizer, both.dataset)[0]
        with torch.no_grad():
            values, order = both.model(torch.tensor([prompt])).logits[0, -1].softmax(-1).sort(descending=True)
        below = values.cumsum(0)
        share = float((below[0] + below[2]) / 2)  # between the first token and the first three
        kept = set(order[: int((below < share).sum()) + 1].tolist())
        ends = both.vllm(1.0).ends
        found = VllmGenerator(both.llm, ends, temperature=1.0, top_p=share).complete([prompt] * 500, 1, (), range(500))
        assert {ids[0] for ids in found} <= kept and len(kept) < len(values) / 2
        free = both.vllm(1.0).complete([prompt] * 500, 1, (), range(500))
        assert not {ids[0] for ids in free} <= kept

    def test_a_chunk_asks_twice_and_forced_answers_share_their_thinking(self, both, monkeypatch):
        calls, generate = [], both.llm.generate
        monkeypatch.setattr(both.llm, "generate", lambda *args, **kw: calls.append(generate(*args, **kw)) or calls[-1])
        both.llm.reset_prefix_cache()
        self.table(both, both.vllm(1.0), n=24, budgets=(32, 40, 48))
        thinking, answers = calls
        assert len(thinking) == 96 and len(answers) > 96
        assert sum(output.num_cached_tokens for output in answers) > 0.3 * sum(
            len(output.prompt_token_ids) for output in answers
        )

    def test_more_contexts_than_are_encoded_at_once(self, both):
        prompts = prompts_of(both.tokenizer, both.dataset) * 4
        assert sum(map(len, prompts)) > both.llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
        both.llm.reset_prefix_cache()
        generator = both.vllm(1.0)
        whole = generator.complete(prompts, 8, (), range(400))
        apart = [generator.complete(prompts[i : i + 50], 8, (), range(i, i + 50)) for i in range(0, 400, 50)]
        assert whole == list(itertools.chain(*apart))

    def test_continuations_end_with_an_end_or_a_stop(self, both):
        prompts = prompts_of(both.tokenizer, both.dataset)
        generator, stops = both.vllm(1.0), [both.template.think_end_id]
        found = generator.complete(prompts, 32, stops, range(100))
        ends = generator.ends.union(stops)
        assert all(not ends.intersection(ids[:-1]) and (ids[-1] in ends or len(ids) == 32) for ids in found)
        assert {ids[-1] for ids in found} & set(stops)

    def test_log_probabilities_of_completions_are_those_of_transformers(self, both):
        prompts = prompts_of(both.tokenizer, both.dataset)
        completions = [[*ids, 2] for ids in both.vllm(1.0).complete(prompts, 24, (), range(100))]
        one, other = (generator.logps(prompts, completions, 1.0) for generator in (both.hf(1.0), both.vllm(1.0)))
        for ids, expected, found in zip(completions, one, other, strict=True):
            assert len(found) == len(ids) and found == pytest.approx(expected, abs=1e-4)
        assert both.vllm(1.0).logps([], [], 1.0) == []

    def test_the_self_rewards_of_one_table_are_alike(self, both):
        asked = SelfReward(token=2, reference=-4.0, scale=0.1, temperature=1.0)
        one, other = (
            self.table(both, make(0.0), n=20, temperature=0.0, samples=1, budgets=(), self_reward=asked)
            for make in (both.hf, both.vllm)
        )
        alike = one["text"] == other["text"]
        assert alike.sum() >= 19 and one["self_reward"].notna().sum() >= 5
        for column in ("self_reward", "appended_logp", "mean_logp"):
            assert other[column][alike].tolist() == pytest.approx(one[column][alike].tolist(), abs=1e-4, nan_ok=True)

    def test_what_is_too_long_to_be_scored_is_refused(self, both):
        longest = both.llm.llm_engine.model_config.max_model_len
        assert len(both.vllm(1.0).logps([[5] * (longest - 3)], [[6, 7]], 1.0)[0]) == 2
        with pytest.raises(
            UserError, match=rf"^eval\.max_new_tokens: to score .* takes {longest + 1} tokens.*{longest};"
        ):
            both.vllm(1.0).logps([[5] * (longest - 2)], [[6, 7]], 1.0)

    def test_what_does_not_fit_the_engine_is_refused(self, both):
        longest = both.llm.llm_engine.model_config.max_model_len
        assert len(both.vllm(0.0).complete([[5] * (longest - 1)], 1, (), [0])[0]) == 1
        with pytest.raises(UserError, match=rf"^eval\.max_new_tokens: .*have {longest + 1} tokens.*serves {longest};"):
            both.vllm(0.0).complete([[5] * longest], 1, (), [0])


# The trainer's own engine


def own(trainer, prompts, **changes):
    """Completions of 12 tokens by the generator of the evaluations before and after training."""
    with during.generating(trainer, settings_of(**changes)) as generator:
        return generator.complete(prompts, 12, (), range(len(prompts)))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_engine_of_training_serves_the_weights_as_they_stand(make, tiny, lora):
    trainer = make(lora=lora)
    prompts = trainer.tokenize(list(tiny[2]))
    stale = own(trainer, prompts, temperature=0.0)
    torch.manual_seed(1)
    for weight in trainer.model.parameters():
        if weight.requires_grad:
            weight.data.add_(0.1 * torch.randn_like(weight))
    found = own(trainer, prompts, temperature=0.0)
    hf = TransformersGenerator(trainer.model, trainer.processing_class, temperature=0.0, batch_size=64)
    assert_alike(trainer.model.eval(), prompts, hf.complete(prompts, 12, (), range(64)), found)
    assert sum(a != b for a, b in zip(stale, found, strict=True)) > 32


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_training_goes_on_as_if_nothing_had_been_asked(make, tiny, tmp_path, lora):
    """The adapter begins as one that is trained further. A resumed run evaluates no second time.

    Only a run of all weights is resumed here: each time that TRL hands an adapter over, it merges it into its base and
    takes it out again, which changes the base's last bits.
    """

    def trained(name, *, evaluated, resume=None):
        trainer = make(lora=lora, output_dir=tmp_path / name, max_steps=3, save_strategy="steps", save_steps=1)
        handed_over, sync = [], trainer.vllm_generation.sync_weights
        trainer.vllm_generation.sync_weights = lambda: handed_over.append(sync())
        generator = torch.Generator().manual_seed(1)
        for key, weight in trainer.model.named_parameters():
            if "lora_B" in key:
                weight.data.copy_(0.1 * torch.randn(weight.shape, generator=generator))
        if evaluated:
            left_alone = torch.get_rng_state(), trainer._calls, trainer.state.num_input_tokens_seen, trainer._metrics
            with during.generating(trainer, settings_of()) as by:
                evaluate(
                    by, trainer.processing_class, tiny[2].select(range(8)), accuracy, trainer.template, settings_of()
                )
            assert torch.equal(torch.get_rng_state(), left_alone[0])
            now = trainer._calls, trainer.state.num_input_tokens_seen, trainer._metrics
            assert now == left_alone[1:]
        trainer.train(resume_from_checkpoint=resume)
        assert len(handed_over) == (3 if resume is None else 1), "once for each step's weights"
        trainer.close()
        history = [{k: v for k, v in line.items() if k not in WALL_CLOCK} for line in trainer.state.log_history]
        return trainer.model.state_dict(), history

    weights, history = trained("with", evaluated=True)
    others = [trained("without", evaluated=False)]
    if not lora:
        others.append(trained("resumed", evaluated=False, resume=str(tmp_path / "with" / "checkpoint-2")))
    for found, lines in others:
        assert all(torch.equal(weights[name], found[name]) for name in weights)
        assert lines[:3] == history[:3]


# From the command line


def test_evaluations_between_steps_change_nothing(cli):
    settings = ("+exp=grpo", "rollout=vllm_colocate", "eval.before=false", "eval.after=false", "trainer.max_steps=3")
    assert cli(*settings, "name=plain").status == 0
    during = (
        "trainer.eval_strategy=steps",
        "trainer.eval_steps=1",
        "eval.during.samples=2",
        "eval.during.budgets=[4,16]",
    )
    found = cli(*settings, *during, "name=between")
    assert found.status == 0, found.err
    plain, between = (
        AutoModelForCausalLM.from_pretrained(found.runs / name / "final").state_dict() for name in ("plain", "between")
    )
    assert all(torch.equal(value, between[name]) for name, value in plain.items())
    table = pd.read_parquet(found.runs / "between/evaluations/own/step-000003.parquet")
    assert len(table) == 8 and {"correct@4", "correct@16"} <= set(table.columns)


def test_a_run_an_adapter_and_a_model(cli):
    asked = "eval.self_reward.reference=-4"
    run = cli("+exp=brpo", "rollout=vllm_colocate", "+lora=default", asked, "name=run")
    assert run.status == 0, run.err
    report = json.loads((run.runs / "run/report.json").read_text())
    found = cli.evaluate("runs=[runs/run]", "out=again")
    assert found.status == 0, found.err
    results = json.loads((run.cwd / "again/metrics.json").read_text())
    assert results["settings"]["run"]["sampled_by"] == "vllm_colocate", "as the run was trained"
    assert results["models"]["run"] == report["after"], "merged on disk or in the trainer's engine"
    written = {"metrics.json", "summary.csv", "curves.png", "run.parquet"}
    assert {path.name for path in (run.cwd / "again").iterdir()} == written
    base = base_name(run.runs / "run/final")
    found = cli.evaluate(f"models=[runs/run/final,{base}]", "rollout=vllm_colocate", *SHORT, "out=models")
    assert found.status == 0, found.err
    results = json.loads((run.cwd / "models/metrics.json").read_text())
    assert [numbers["samples"] for numbers in results["models"].values()] == [6, 6]
    found = cli.evaluate("runs=[runs/run]", "rollout=hf", *SHORT, "out=hf")
    assert found.status == 0, found.err
    assert json.loads((run.cwd / "hf/metrics.json").read_text())["settings"]["run"]["sampled_by"] == "hf"


def test_what_vllm_cannot_serve_is_refused(cli, tiny, tmp_path):
    _, tokenizer, _ = tiny
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for asked, told in (
        ((), r"model\.path: model has attention heads of size 16.*set rollout=hf"),
        (("trainer.torch_compile=true",), r"rollout: model samples by vllm_colocate\. trainer\.torch_compile: "),
    ):
        found = cli.evaluate("models=[model]", "rollout=vllm_colocate", "model.dtype=float32", *asked)
        assert found.status == 2 and re.search(rf"^error: {told}", found.err, re.MULTILINE), found.err


def test_an_adapter_that_cannot_be_merged_is_refused(cli, tiny, tmp_path):
    an_adapter(tiny[0], tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"])
    found = cli.evaluate("models=[adapter]", "rollout=vllm_colocate", "model.dtype=float32", "out=results")
    told = r"error: rollout: adapter changes the embeddings .*one tied weight.*set rollout=hf\."
    assert found.status == 2 and re.search(told, found.err), found.err
    assert not (found.cwd / "results").exists(), "nothing came of it"


@pytest.mark.slow
def test_two_processes_give_the_same_tables(cache, tiny, tmp_path):
    """Two models one after the other: what shuts down the first engine leaves the processes their group."""
    one = str(warm_start(steps=60, cache_dir=cache))
    launcher = Path(sys.executable).parent / "torchrun"
    for name, start in (("alone", [sys.executable]), ("together", [launcher, "--nproc_per_node=2"])):
        command = [
            "-m",
            "rltoken.evaluate",
            f"models=[{one},{tiny[0]}]",
            "rollout=vllm_colocate",
            f"out={name}",
            *SHORT,
        ]
        left = subprocess.run([*start, *command], cwd=tmp_path, capture_output=True, text=True, timeout=400)
        assert left.returncode == 0 and "Traceback" not in left.stderr, left.stderr
    tables = [sorted((tmp_path / name).glob("*.parquet")) for name in ("alone", "together")]
    assert len(tables[0]) == 2
    for alone, together in zip(*tables, strict=True):
        assert pd.read_parquet(alone).equals(pd.read_parquet(together))


@pytest.mark.slow
def test_smollm2_answers_greedily_as_with_transformers():
    folder = models.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    asked = [f"Explain in a few sentences how {thing} works." for thing in ("a kettle", "a sail", "rain", "a lock")]
    prompts = tokenizer.apply_chat_template(
        [[{"role": "user", "content": text}] for text in asked], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    hf = TransformersGenerator(model, tokenizer, temperature=0.0, batch_size=4)
    with engine(folder, dtype=torch.float32, device=CPU, max_model_len=1024) as llm:
        by_engine = VllmGenerator(llm, hf.ends, temperature=0.0)
        one, other = (generator.complete(prompts, 96, (), range(4)) for generator in (hf, by_engine))
    found = gaps(model, prompts, one, other)
    print(f"{len(found)} of 4 completions part, at gaps of {found}")
    assert sum(map(len, one)) > 200 and len(found) <= 1 and all(gap < 10 * TIE for gap in found)


def test_an_interrupted_evaluation_goes_on_and_ends_with_the_same_bytes(cli, cache, monkeypatch):
    command = (f"models=[{warm_start(steps=60, cache_dir=cache)}]", "rollout=vllm_colocate", *SHORT, "eval.chunk=2")
    whole = cli.evaluate(*command, "out=whole")
    assert whole.status == 0, whole.err
    stock, calls = VllmGenerator.complete, []

    def dying(self, *args):
        calls.append(args)
        if len(calls) == 3:  # the second chunk; each has one call for thinking and one for answers
            raise KeyboardInterrupt
        return stock(self, *args)

    monkeypatch.setattr(VllmGenerator, "complete", dying)
    assert cli.evaluate(*command, "out=stopped").status == 130
    (shards,) = (whole.cwd / "stopped").glob("*.shards")
    assert len(list(shards.glob("*.parquet"))) == 1
    assert cli.evaluate(*command, "out=stopped").status == 0
    assert len(calls) == 3 + 2 * 2, "the two chunks that were missing"
    for path in (whole.cwd / "whole").iterdir():
        assert (whole.cwd / "stopped" / path.name).read_bytes() == path.read_bytes(), path.name
