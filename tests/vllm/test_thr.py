"""THR where vLLM samples: states, log-probabilities and head are the trainer's, of the weights that sampled."""

import pytest
import torch

from rltoken.methods.thr import thr


@pytest.mark.parametrize(("head", "lora"), [("tied", False), ("untied", True)])
def test_scores_are_made_of_the_trainers_own_pass(make, untied, head, lora):
    kept = []

    def look(old_hidden, old_logps, ids, mask, head, correct, rewards, group):
        logits = head.logits(old_hidden.flatten(0, 1), torch.arange(head.weight.size(0)))
        made = logits.log_softmax(-1).gather(1, ids.view(-1, 1)).view_as(old_logps)
        weights, _ = thr(old_hidden, old_logps, ids, mask, head, correct, rewards, group, p=0.5)
        kept.append((((made - old_logps) * mask).abs().max().item(), weights))
        return weights

    trainer = make({"weights": {"thr": look}}, folder=untied if head == "untied" else None, lora=lora, temperature=0.8)
    trainer.train()
    assert len(kept) == 4 and max(difference for difference, _ in kept) < 1e-4
    assert all(weights.isfinite().all() and weights.min() >= 0 for _, weights in kept)
    assert any((weights != 1).any() for _, weights in kept)
