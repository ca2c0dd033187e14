"""TRL's loss of numbers that no model has given."""

import torch


def loss_of(trainer, logps, advantages, mask, *, old_logps=None, ref_logps=None):
    """The loss of a micro-batch as evaluation reduces it.

    Args:
        logps: [B, T] under the policy; `old_logps` and `ref_logps` likewise, 0 where they are not given.
        advantages: [B].
        mask: [B, T] long.
    """
    ones = torch.ones(len(mask), 1, dtype=torch.long)
    inputs = {
        "prompt_ids": ones,
        "prompt_mask": ones,
        "completion_ids": torch.ones_like(mask),
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": torch.zeros_like(logps) if old_logps is None else old_logps,
        "ref_per_token_logps": torch.zeros_like(logps) if ref_logps is None else ref_logps,
        "num_items_in_batch": mask.sum(),
    }
    trainer.model.eval()
    return trainer.stock_loss(trainer.model, inputs, (logps, torch.zeros_like(logps), None))
