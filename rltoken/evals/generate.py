"""Sample completions of a problem set with transformers and grade them, leaving every random state as it was."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rltoken.rng import forked_rng
from rltoken.signals import plain_text, thinking_length


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    reward: Callable[..., list[float | None]],
    *,
    samples: int,
    temperature: float,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    think_end_id: int | None,
    label: str = "evaluation",
) -> pd.DataFrame:
    """Sample and grade `samples` completions per problem.

    Args:
        dataset: with `prompt` (conversational), `id` and what `reward` reads.
        reward: correctness in TRL's signature; None counts as wrong.
        samples: completions per problem; `temperature` 0 is greedy, for which one is enough.
        max_new_tokens: completion tokens at most.
        batch_size: completions that are generated at once. It is part of what a seed reproduces.
        seed: of the sampling; the global random states are restored afterwards.
        label: what the progress bar says.

    Returns:
        One row per sample: id, sample, correct (0 or 1), thinking_tokens, completion_tokens, truncated, text.
    """
    jobs = [(row, sample) for row in range(len(dataset)) for sample in range(samples)]
    ends = _end_tokens(model, tokenizer)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    training = model.training
    model.eval()
    records: list[dict[str, Any]] = []
    try:
        with (
            forked_rng(seed),
            torch.no_grad(),
            tqdm(total=len(jobs), desc=label, disable=not sys.stderr.isatty()) as bar,
        ):
            for start in range(0, len(jobs), batch_size):
                batch = jobs[start : start + batch_size]
                records += _graded(model, tokenizer, dataset, reward, batch, settings, ends, think_end_id)
                bar.update(len(batch))
    finally:
        model.train(training)
    return pd.DataFrame.from_records(records)


def _graded(model, tokenizer, dataset, reward, batch, settings, ends, think_end_id) -> list[dict[str, Any]]:
    examples = [dataset[row] for row, _ in batch]
    prompts = tokenizer.apply_chat_template(
        [example["prompt"] for example in examples], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    encoded = tokenizer.pad({"input_ids": prompts["input_ids"]}, padding_side="left", return_tensors="pt")
    encoded = encoded.to(model.device)
    output = model.generate(
        input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], generation_config=settings
    )
    completions = [_until_end(ids, ends) for ids in output[:, encoded["input_ids"].size(1) :].tolist()]
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    columns = {key: [example[key] for example in examples] for key in examples[0] if key != "prompt"}
    correct = reward(
        prompts=[example["prompt"] for example in examples],
        completions=[[{"role": "assistant", "content": text}] for text in texts],
        completion_ids=completions,
        **columns,
    )
    return [
        {
            "id": example["id"],
            "sample": sample,
            "correct": float(value or 0.0),
            "thinking_tokens": thinking_length(ids, think_end_id),
            "completion_tokens": len(ids),
            "truncated": not ids or ids[-1] not in ends,
            "text": plain_text(text),
        }
        for example, (_, sample), value, ids, text in zip(examples, batch, correct, completions, texts, strict=True)
    ]


def _until_end(ids: list[int], ends: frozenset[int]) -> list[int]:
    """The tokens up to and with the first that ends a sequence."""
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: stop + 1]


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    declared = model.generation_config.eos_token_id
    declared = [] if declared is None else [declared] if isinstance(declared, int) else declared
    return frozenset([*declared, tokenizer.eos_token_id])
