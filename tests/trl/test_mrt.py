"""MRT through the trainer: what goes on, what terminates, what is trained, and where it would be GRPO."""

import functools

import pytest
import torch

from rltoken.errors import UserError
from rltoken.methods.mrt import episode_answers, episode_credit, mrt, mrt_progress, prefix_rollouts

SGD = {"optim": "sgd", "max_grad_norm": 0.0, "max_steps": 2, "learning_rate": 1.0, "loss_type": "dr_grpo"}
EPISODES = {"separator": None, "markers": [str(digit) for digit in range(7)]}
PREFIX = EPISODES | {"longest": 12, "max_new_tokens": 3}


def method(look, *, credit=mrt, shapes=None, **settings):
    """Prefix rollouts, and every finished rollout in `look`."""

    def keep(rollout):
        look.append(rollout)
        return rollout

    rows = {"mrt": functools.partial(prefix_rollouts, **PREFIX | settings), "look": keep}
    return {"rows": rows, "credits": {"mrt": credit}} | ({"shapes": shapes} if shapes else {})


def common(rows):
    """Tokens that the completions of all rows begin with."""
    together = zip(*(row.completion_ids for row in rows), strict=False)
    return next(
        (i for i, tokens in enumerate(together) if len(set(tokens)) > 1), min(len(r.completion_ids) for r in rows)
    )


def test_groups_go_on_from_one_prefix_that_is_not_trained(run):
    look = []
    run(method(look, terminations=2), **SGD)
    cuts = []
    for rollout in look:
        n, size = len(rollout.inputs), rollout.group_size
        for first in range(0, n, size):
            siblings = rollout.rows[first : first + size]
            ended = [row for row in rollout.rows[n:] if row.parent // size == first // size]
            cut = siblings[0].train_mask.index(1) if 1 in siblings[0].train_mask else len(siblings[0].train_mask)
            assert common(siblings) >= cut and common([siblings[0], *ended]) >= cut
            for row in siblings:
                assert row.train_mask == [0] * cut + [1] * (len(row.completion_ids) - cut)
                assert len(row.completion_ids) <= 12
            assert [row.parent for row in ended] == [first, first + 1]
            assert all(row.kind == "summary" and row.reward is not None for row in ended)
            cuts.append(cut)
    assert 0 in cuts and max(cuts) > 2


def test_the_rewards_are_those_of_the_new_completions(run):
    """`token_parity` of each row as it now is, not as it was first sampled."""
    look = []
    run(method(look), **SGD)
    for rollout in look:
        parity = [sum(i % 2 == 0 for i in row.completion_ids) / len(row.completion_ids) for row in rollout.rows]
        assert rollout.rewards.squeeze(1).tolist() == pytest.approx(parity[: len(rollout.inputs)])


@pytest.mark.parametrize("baseline", ["termination", "joint"])
def test_advantages_of_both_kinds_are_those_of_the_equations(run, baseline):
    seen = []

    def watch(advantages, rewards, group, kind, mask, *, kinds=("thinking", "summary")):
        seen.append((advantages.clone(), rewards, group, kind, mask))
        return advantages

    stages = method([], credit=functools.partial(mrt, baseline=baseline))
    stages["credits"]["watch"] = watch
    run(stages, **SGD)
    for advantages, rewards, group, kind, mask in seen:
        expected = mrt(rewards, group, kind, baseline=baseline).unsqueeze(1).expand_as(mask)
        assert kind.count("summary") == 8
        torch.testing.assert_close(advantages * mask, expected * mask)


def test_the_bonus_reaches_the_reward(run):
    look, seen = [], []

    def watch(advantages, rewards, episode_progress):
        seen.append((rewards, episode_progress))
        return advantages

    stages = method(look, shapes={"progress": functools.partial(mrt_progress, alpha=0.5)}, progress_answers=2)
    stages["credits"]["watch"] = watch
    run(stages, **SGD)
    for rollout, (rewards, progress) in zip(look, seen, strict=True):
        torch.testing.assert_close(rewards, rollout.rewards.squeeze(1) + 0.5 * progress)
    assert any(progress.abs().max() > 0 for _, progress in seen)


def test_progress_is_the_score_after_the_episode_less_that_of_the_answers_at_the_prefix(run, monkeypatch):
    """Every answer after an episode scores 2; those at the prefix are the group's terminating rows."""
    monkeypatch.setattr("rltoken.methods.mrt.mean_scores", lambda rollout, sampler, cuts, **_: torch.full((8,), 2.0))
    look = []
    run(method(look, progress_answers=2), **SGD)
    for rollout in look:
        n, size = len(rollout.inputs), rollout.group_size
        before = torch.tensor([row.reward for row in rollout.rows[n:]]).view(n // size, -1).mean(1)
        expected = 2.0 - before.repeat_interleave(size)
        torch.testing.assert_close(rollout.signals["episode_progress"], expected)


def test_the_bonus_needs_progress_to_be_measured(run):
    with pytest.raises(UserError, match=r"no rows stage published 'episode_progress'"):
        run(method([], shapes={"progress": mrt_progress}), **SGD)


def episodes(alpha):
    rows = functools.partial(episode_answers, **EPISODES, answers=2, max_new_tokens=3, most_episodes=4)
    return {"rows": {"episodes": rows}, "credits": {"episodes": functools.partial(episode_credit, alpha=alpha)}}


def test_credit_per_episode_adds_the_progress(run):
    seen = []

    def watch(advantages, episodes, episode_scores, mask):
        seen.append((advantages.clone(), episodes, episode_scores, mask))
        return advantages

    stages = episodes(0.5)
    stages["credits"] = (
        {"first": lambda advantages: torch.zeros_like(advantages)} | stages["credits"] | {"watch": watch}
    )
    run(stages, **SGD)
    for advantages, ends, scores, mask in seen:
        for row in range(len(mask)):
            for start, end, before, after in zip(ends[row], ends[row, 1:], scores[row], scores[row, 1:], strict=False):
                credit = advantages[row, start:end]
                assert credit.tolist() == pytest.approx([0.5 * float(after - before)] * len(credit))
            assert not advantages[row, ends[row, -1] :].any()
    assert any(ends[:, 2].gt(ends[:, 1]).any() for _, ends, _, _ in seen)


def test_without_weight_it_is_grpo(run):
    """After one step: forced answers take random numbers, so the next one samples others."""
    once = SGD | {"max_steps": 1}
    assert run(episodes(0.0), **once).distance(run({}, **once)) < 1e-6


def test_one_ratio_per_response_is_refused(run):
    """Averaged over a response, the progress of its episodes would be J_end - J_0: GRPO's own credit with noise."""
    with pytest.raises(UserError, match=r"'sequence' averages .* per-token effect of method\.credits\.episodes"):
        run(episodes(1.0), importance_sampling_level="sequence", **SGD)
