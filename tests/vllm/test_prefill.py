"""Tokens that the engine computes again for forced answers: what the prefix cache leaves of 16 answers to a trace."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rltoken.rollout import vllm_cpu
from rltoken.rollout.forced import prefixes
from rltoken.types import Template
from tests.vllm.test_sampling import recorded

SHARES = (0.25, 0.5, 0.75, 1.0)
SUMMARIES = 4


@pytest.fixture(scope="module")
def long(tiny, tmp_path_factory):
    """The folder of a tiny random model for 8192 tokens."""
    folder, tokenizer, _ = tiny
    config = AutoConfig.from_pretrained(folder)
    config.max_position_embeddings = 8192
    path = tmp_path_factory.mktemp("long")
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def prefilled(trainer, length, seed):
    """Prompt tokens that were not in the cache, over `length`, when all answers to one trace are asked for at once."""
    generator = torch.Generator().manual_seed(seed)
    prompt, thinking = (torch.randint(3, 20, (n,), generator=generator).tolist() for n in (80, length))
    template = Template(think_end_id=1, cut=(4, 1, 5), ended=(5,), stops=())
    budgets = [int(share * length) for share in SHARES]
    found = [prefix for prefix, _ in prefixes(thinking, budgets, template, frozenset())]
    assert len(found) == len(SHARES)
    calls = recorded(trainer)
    trainer.extend([prompt + prefix.ids for prefix in found for _ in range(SUMMARIES)], max_new_tokens=2)
    (outputs,) = calls
    return sum(len(output.prompt_token_ids) - output.num_cached_tokens for output in outputs) / length


@pytest.mark.parametrize("block", [32, 128])
def test_a_long_trace_is_read_once(make, long, monkeypatch, block):
    monkeypatch.setitem(vllm_cpu.SETTINGS, "block_size", block)
    trainer = make(folder=long)
    shares = {length: prefilled(trainer, length, seed=length) for length in (250, 500, 1000, 2000, 4000)}
    told = ", ".join(f"{length}: {share:.3f}" for length, share in shares.items())
    print(f"\ntokens prefilled over thinking tokens, blocks of {block}: {told}")
    assert shares[4000] < 1.3
    assert shares[4000] <= shares[1000], "what is left over is a part of a block for each answer"
