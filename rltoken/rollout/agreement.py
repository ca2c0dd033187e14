"""Whether the policy that samples is the policy that is trained: vLLM is another implementation of the same model.

Its weights are copied after each step, and a copy that goes wrong (a stale head, another dtype, an adapter merged
twice) raises nothing: the run only trains on samples of another policy. The log-probabilities that both give to the
sampled tokens tell.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rltoken.errors import UserError

LIMITS = {torch.float32: 1e-4, torch.float64: 1e-4}
"""What is let pass by dtype, in nats per token: 20 times and more what two correct implementations differ by."""
HALF_PRECISION_LIMIT = 0.1


def limit_of(setting: float | str | None, dtype: torch.dtype) -> float:
    """The largest mean difference to let pass, by `rollout.max_logp_difference` and what the trainer computes in."""
    if setting == "auto":
        return LIMITS.get(dtype, HALF_PRECISION_LIMIT)
    return float("inf") if setting is None else setting


def refuse_disagreement(difference: float, limit: float, step: int) -> None:
    """Stop a run whose sampler serves another policy than it trains.

    Args:
        difference: mean over the sampled tokens of |trainer's - sampler's log-probability|.
        limit: from `limit_of`.
        step: optimizer steps done, for the message.

    Raises:
        UserError: they lie further apart, or the difference is not a number.
    """
    if not difference <= limit:
        raise UserError(
            f"rollout.max_logp_difference: after step {step} the sampler's log-probabilities lie {difference:.2g} per "
            f"token from the trainer's ({limit:g} is let pass), so it serves other weights or another dtype and the "
            "run would train on wrong samples; see 'When a run stops' in docs/rollouts.md, or set it higher."
        )


def kept_by_length(ratio: Tensor, mask: Tensor, low: float | None, high: float | None) -> dict[str, float]:
    """The share of tokens whose importance ratio passes unclipped, in the shorter and the longer half of the rows.

    Args:
        ratio: [B, T], or [B, 1] of whole sequences; TRL has clipped it to the bounds, or set it to 0 outside.
        mask: [B, T] 1 on sampled tokens.
        low, high: the bounds, None for none.
    """
    kept = torch.ones_like(mask, dtype=torch.bool) & (ratio > (low or 0.0))
    if high is not None:
        kept = kept & (ratio < high)
    lengths = mask.sum(1)
    longer = lengths > lengths.median()
    return {
        name: (kept[rows] * mask[rows]).sum().item() / max(1, mask[rows].sum().item())
        for name, rows in (("shorter_half", ~longer), ("longer_half", longer))
        if bool(rows.any())
    }
