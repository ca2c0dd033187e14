"""LaSeR where vLLM samples: the appended position is read in the trainer's own passes only."""

import functools

import pytest

from rltoken.methods.last_token import class_balance, mix_self_reward, self_reward_loss


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_samplers_log_probabilities_still_agree(make, lora):
    settings = {"scale": 5.0, "reference": -3.6}
    kept = []

    def look(logps, old_appended, appended):
        kept.append((old_appended - appended.detach()).abs().max().item())
        return 0.0 * logps

    stages = {
        "marks": {"class_balance": class_balance},
        "aux": {"self_reward": functools.partial(self_reward_loss, **settings), "look": look},
        "credits": {"mixed": functools.partial(mix_self_reward, least=0.0, after=0, **settings)},
    }
    trainer = make(stages, lora=lora, appended_id=2, temperature=0.8)
    trainer.train()
    differences = [entry["sampling/sampling_logp_difference/max"] for entry in trainer.state.log_history[:-1]]
    assert len(differences) == 4 and max(differences) < 1e-3
    assert len(kept) == 4 and max(kept) < 1e-4, "one policy, with one optimizer step per window"
