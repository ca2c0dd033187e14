"""TTRL: the answer that most of the group gives stands in for the gold answer.

Paper: Zuo et al., "TTRL: Test-Time Reinforcement Learning", 2025 (arXiv 2504.16084); code: PRIME-RL/TTRL, in which the
equations were read. For a group of G responses with the final answers a_1 ... a_G:

    y*  = the answer that most of them give; of several, the one seen first
    r_i = 1[a_i = y*]
    majority share = (responses that give y*) / G

The reward so far, gold or not, is not looked at: it is replaced. So is what counts as correct (the signal `correct`)
for every stage after this one. Gold answers, where there are any, are for two metrics and for evaluations. A group
without any answer has no label, and reward 0 throughout.

The authors sample 64 responses, let all of them vote, and train on the first 32. `extra_votes` does that: to the
`trainer.num_generations` responses that are trained it samples others that only vote, and G counts both.

Leave-one-out (an option of SPINE): r_i = 1[a_i = y*_{-i}], the vote of the others.

Logged: `ttrl/majority_share`, mean over groups; where the reward functions graded, `ttrl/label_accuracy`, the share of
groups whose label is right (left out are those whose label only extra votes gave: nobody has graded it), and
`ttrl/reward_accuracy`, the share of rows whose reward is what gold would say.

Deviations: the authors' code votes on normalised strings and then rewards what is symbolically equal to the winner;
here the vote itself is one of equivalence classes (`reward.classes`). Their code drops what has no answer but lets an
empty answer vote; the signal `answers` does not tell the two apart, so neither votes, or with `empty_votes` both do, as
one class. If that one wins, there is no label; what their verifier makes of an empty label could not be read. With
`leave_one_out`, ties go to the answer seen first in the whole group. Their reward sits at the last token of the last
response whatever the response (a leaked loop variable), which a sum over tokens hides.
"""

import dataclasses

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from rltoken.ops import group_amax, group_sum
from rltoken.ranges import Count
from rltoken.types import Rollout, Sampler


def extra_votes(rollout: Rollout, sampler: Sampler, *, votes: Count = 8) -> Rollout:
    """Sample `votes` more completions of every prompt and publish their final answers; nothing else of them is kept.

    Args:
        rollout: graded thinking rows; publishes `extra_answers` [n, votes].
        votes: completions that only vote.

    Raises:
        ValueError: sampling stops at the end of thinking, so that there is no answer to vote for.
    """
    if rollout.thinking_only:
        raise ValueError(
            "there is no answer to vote for, since sampling stops at the end of thinking; leave out the control stage "
            "that stops it, such as ~method.controls.brpo"
        )
    n, size = len(rollout.inputs), rollout.group_size
    asked = [first for first in range(0, n, size) for _ in range(votes)]
    sampled = sampler.generate([rollout.rows[i].prompt_ids for i in asked])
    texts = sampler.decode([rollout.inputs[i] for i in asked], [completion.ids for completion in sampled])
    # those that are trained come first, so that they have the numbers of the signal `answers`
    numbers = sampler.classes([*rollout.texts, *texts], [i // size for i in [*range(n), *asked]])
    answers = torch.tensor(numbers[n:]).view(n // size, votes).repeat_interleave(size, 0)
    return dataclasses.replace(rollout, signals=rollout.signals | {"extra_answers": answers})


extra_votes.only_for = "extra_answers"


def majority_vote(
    rewards: Tensor,
    correct: Tensor,
    group: Tensor,
    answers: Tensor,
    *,
    leave_one_out: bool = False,
    empty_votes: bool = False,
) -> tuple[Tensor, dict[str, float]]:
    """[B] 1 where a response gives the answer of most responses of its group, else 0; and what is logged.

    Args:
        rewards: [B] float, of which only NaN is read: such a row was not graded, and is in no metric of gold.
        correct: [B] bool, for metrics only.
        group: [B]; `answers`: [B] number of the answer within its group, in order of appearance; -1 for none.
        leave_one_out: a response has no vote on its own label.
        empty_votes: responses without an answer vote too, as one class, which earns nothing if it wins.
    """
    nobody = answers.new_empty(len(answers), 0)
    settings = {"leave_one_out": leave_one_out, "empty_votes": empty_votes}
    return majority_vote_with_extra(rewards, correct, group, answers, nobody, **settings)


def majority_vote_with_extra(
    rewards: Tensor,
    correct: Tensor,
    group: Tensor,
    answers: Tensor,
    extra_answers: Tensor,
    *,
    leave_one_out: bool = False,
    empty_votes: bool = False,
) -> tuple[Tensor, dict[str, float]]:
    """The same where the [B, N] answers that `extra_votes` has sampled, alike in all rows of a group, vote too."""
    assert rewards.shape == correct.shape == group.shape == answers.shape
    everyone = torch.cat([answers.unsqueeze(1), extra_answers], 1)
    ballots = ballots_of(everyone, empty_votes=empty_votes)
    votes = group_sum(ballots[:, 0], group) + ballots[:, 1:].sum(1)
    agrees = gives_the_label(answers, votes)
    voters = group_sum(torch.ones_like(votes[:, 0]), group) + extra_answers.size(1)
    share = votes.amax(1) / voters
    metrics = {"ttrl/majority_share": share.mean().item()}
    graded = ~rewards.isnan()
    if graded.any():
        label_right = group_amax((agrees & correct).float(), group, graded)
        known = graded & ((group_amax(agrees.float(), group) > 0) | (share == 0))
        if known.any():
            metrics["ttrl/label_accuracy"] = label_right[known].mean().item()
        metrics["ttrl/reward_accuracy"] = (agrees == correct)[graded].float().mean().item()
    if leave_one_out:
        agrees = gives_the_label(answers, votes - ballots[:, 0])
    return agrees.to(rewards.dtype), metrics


majority_vote.relabels = majority_vote_with_extra.relabels = True


def ballots_of(answers: Tensor, *, empty_votes: bool) -> Tensor:
    """[..., C + 1] float, 1 at each of the answers [...], of C in the window; the last column is no answer."""
    classes = max(int(answers.max()) + 1, 1)
    ballots = one_hot(answers.masked_fill(answers < 0, classes), classes + 1).float()
    if not empty_votes:
        ballots[..., classes] = 0.0
    return ballots


def gives_the_label(answers: Tensor, votes: Tensor) -> Tensor:
    """[B] bool: the row's own answer has the most of the votes [B, C + 1] of its group, and came first among equals."""
    own = answers.clamp(min=0)
    voted_for = votes.gather(1, own.unsqueeze(1)).squeeze(1) > 0
    return (answers >= 0) & voted_for & (votes.argmax(1) == own)
