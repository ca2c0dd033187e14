"""Several continuations of the same context with transformers: its keys and values are computed once for all of them.

vLLM does this by itself (its prefix cache); here it makes the many answers forced after one piece of thinking cheap.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel


def generate(
    model: PreTrainedModel, contexts: Sequence[Sequence[int]], pad_token_id: int, settings: GenerationConfig
) -> Tensor:
    """[n, new tokens] one sampled continuation per context, padded on the right as `model.generate` pads.

    Args:
        model: a decoder, adapters included, on one device.
        contexts: token ids, two or more each; equal ones are encoded once.
        settings: what `model.generate` is to do.
    """
    distinct = list(dict.fromkeys(map(tuple, contexts)))
    place = {ids: i for i, ids in enumerate(distinct)}
    rows = torch.tensor([place[tuple(ids)] for ids in contexts], device=model.device)
    longest = max(map(len, distinct))
    ids = torch.tensor([[pad_token_id] * (longest - len(row)) + list(row) for row in distinct], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in distinct], device=model.device)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model.get_decoder()(
            input_ids=ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, :-1],
            past_key_values=cache,
            use_cache=True,
        )
        cache.batch_select_indices(rows)
        output = model.generate(
            input_ids=ids[rows], attention_mask=mask[rows], past_key_values=cache, generation_config=settings
        )
    return output[:, longest:]
