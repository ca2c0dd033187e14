"""A real model with an adapter: trained through vLLM on GSM8K, merged, and saying then what the adapter said."""

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from rltoken import models
from rltoken.evals.engine import engine
from rltoken.evals.generators import TransformersGenerator, VllmGenerator
from tests.vllm.servers import ROOT
from tests.vllm.test_evaluation import CPU, TIE, gaps

SHORT = (
    "model=smollm2", "+lora=default", "data=gsm8k", "data.limit=16", "data.eval_limit=4", "rollout=vllm_colocate",
    "name=run", "eval.before=false", "eval.after=false", "trainer.max_steps=3",
    "trainer.per_device_train_batch_size=8", "trainer.num_generations=4", "trainer.max_completion_length=48",
    "rollout.max_thinking_tokens=40", "trainer.learning_rate=1e-3", "trainer.loss_type=dr_grpo", "eval.budgets=null",
    "trainer.vllm_max_model_length=1024", "reward.funcs.accuracy._target_=tests.resume.phases.parity",
)  # fmt: skip


def started(cwd, *arguments):
    """A command of rltoken in a process of its own."""
    left = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=cwd, capture_output=True, text=True, timeout=1500,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert left.returncode == 0 and "Traceback" not in left.stderr, left.stderr


@pytest.mark.slow
@pytest.mark.parametrize("exp", ["grpo", "brpo"])
def test_an_adapter_trained_through_vllm_and_merged_says_the_same(tmp_path, data_dir, exp):
    files = [f"data.path={data_dir / 'gsm8k_train.jsonl'}", f"data.eval_path={data_dir / 'gsm8k_test.jsonl'}"]
    started(tmp_path, "rltoken.train", f"+exp={exp}", *SHORT, *files)
    lines = [json.loads(line) for line in (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()]
    differences = [line["sampling/sampling_logp_difference/max"] for line in lines]
    assert len(differences) == 3 and max(differences) < 1e-3
    started(tmp_path, "rltoken.merge", "runs/run", "merged", "--dtype", "float32")

    base = models.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(base)
    questions = [json.loads(line)["problem"] for line in (data_dir / "gsm8k_test.jsonl").read_text().split("\n")[:6]]
    prompts = tokenizer.apply_chat_template(
        [[{"role": "user", "content": text}] for text in questions], add_generation_prompt=True, return_dict=True
    )["input_ids"]

    def completed(model):
        hf = TransformersGenerator(model.eval(), tokenizer, temperature=0.0, batch_size=6)
        return hf.complete(prompts, 48, (), range(6)), hf.ends

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    untrained, _ = completed(plain)
    adapted = PeftModel.from_pretrained(plain, str(tmp_path / "runs/run/final"))
    by_adapter, ends = completed(adapted)
    by_merged, _ = completed(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    with engine(str(tmp_path / "merged"), dtype=torch.float32, device=CPU, max_model_len=1024) as llm:
        by_engine = VllmGenerator(llm, ends, temperature=0.0).complete(prompts, 48, (), range(6))
    assert by_adapter != untrained, "or the test would not notice a lost adapter"
    for other in (by_merged, by_engine):
        found = gaps(adapted, prompts, by_adapter, other)
        print(f"{exp}: {len(found)} of 6 completions part, at gaps of {found}")
        assert len(found) <= 1 and all(gap < 10 * TIE for gap in found)
