"""GSPO-token: a sequence's importance ratio with each token's own gradient.

Paper: Zheng et al., "Group Sequence Policy Optimization", 2025 (arXiv 2507.18071), section 4.3.

    s_i     = exp(mean_t (log pi - log pi_old))            the sequence ratio, length-normalised
    s_{i,t} = sg[s_i] * pi(y_t) / sg[pi(y_t)]              its value, the token's gradient

TRL's ratio is exp(logps - old_logps), so s_{i,t} is obtained by replacing the old log-probs by
sg[logps - mean_t (logps - old_logps)]. TRL's own `importance_sampling_level=sequence` lets the gradient flow through
the mean and thereby erases token-level credit; this does not. Deviation: none.
"""

from torch import Tensor

from rltoken.ops import masked_mean


def gspo_token(logps: Tensor, old_logps: Tensor, mask: Tensor) -> Tensor:
    """[B, T] replaced old log-probs (the pipeline detaches them) from [B, T] log-probs and the [B, T] mask."""
    assert logps.shape == old_logps.shape == mask.shape
    return logps - masked_mean(logps - old_logps, mask, dim=1, keepdim=True)


gspo_token.off_policy_only = True
