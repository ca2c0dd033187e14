"""How well a score tells correct completions from wrong ones, and votes that it weighs: pure functions.

The score of LaSeR (arXiv 2510.14943) is the self-reward of `rltoken.methods.last_token`: near 1 for a completion that
the model holds to be correct, near 0 otherwise. `appended_logps` gives what it is made of, for any completions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from torch import Tensor
from transformers import PreTrainedModel

THRESHOLD = 0.5
"""A completion whose score is above is held to be correct."""


@torch.no_grad()
def appended_logps(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], appended_id: int, *, temperature: float = 1.0
) -> Tensor:
    """[n] log-probability of a token right after each sequence, in one forward without padding on the right.

    Args:
        model: a causal language model; only the last position's logits, [n, V], are made.
        sequences: token ids of prompt and completion, each up to and with the token that ended it.
        appended_id: the token.
        temperature: that of training, so that the score is the one that was trained.
    """
    longest = max(map(len, sequences))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in sequences], device=model.device)
    lengths = torch.tensor([len(row) for row in sequences], device=model.device)
    attention = (torch.arange(longest, device=model.device) >= longest - lengths[:, None]).long()
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    output = model(input_ids=ids, attention_mask=attention, position_ids=positions, logits_to_keep=1, use_cache=False)
    return (output.logits[:, -1].float() / temperature).log_softmax(-1)[:, appended_id]


def verification(scores: Sequence[float], correct: Sequence[bool]) -> dict[str, float | int]:
    """How well scores agree with the grader.

    Args:
        scores: one per completion; NaN where there is none, as after a completion that was cut.
        correct: what the grader said.

    Returns:
        Of the completions with a score: `accuracy` and `f1` (of the class correct; 0 where neither has one) at a
        threshold of 0.5, `auroc` (NaN unless both classes are there), and their number `n`. NaN where there is none.
    """
    known = [(score, bool(right)) for score, right in zip(scores, correct, strict=True) if not math.isnan(score)]
    if not known:
        return {"accuracy": math.nan, "f1": math.nan, "auroc": math.nan, "n": 0}
    held, right = np.array([score > THRESHOLD for score, _ in known]), np.array([right for _, right in known])
    return {
        "accuracy": float((held == right).mean()),
        "f1": 2.0 * int((held & right).sum()) / max(1, int(held.sum()) + int(right.sum())),
        "auroc": auroc([score for score, _ in known], right.tolist()),
        "n": len(known),
    }


def auroc(scores: Sequence[float], correct: Sequence[bool]) -> float:
    """The probability that a correct completion scores above a wrong one, ties counting half; NaN without both."""
    ranks, right = rankdata(scores), np.asarray(correct, dtype=bool)
    positives, negatives = int(right.sum()), int((~right).sum())
    if not positives or not negatives:
        return math.nan
    return float((ranks[right].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def vote(answers: Sequence[int], weights: Sequence[float] | None = None) -> int:
    """The index of a completion that gives the answer with the largest sum of weights; -1 where nothing answers.

    Args:
        answers: equivalence class of each completion's answer, -1 where there is none.
        weights: one per completion, brought into [0, 1], NaN counting 0 (a plain majority when None). Where no
            answer has any weight, the plain majority decides.

    Returns:
        The first completion with that answer; of equal sums the one that comes first.
    """
    own = [1.0] * len(answers) if weights is None else [_share(weight) for weight in weights]
    sums: dict[int, float] = {}
    for answer, weight in zip(answers, own, strict=True):
        if answer >= 0:
            sums[answer] = sums.get(answer, 0.0) + weight
    if not sums:
        return -1
    if not any(sums.values()):
        return vote(answers)
    return list(answers).index(max(sums, key=sums.__getitem__))


def voted(table: pd.DataFrame, weights: str | None = None) -> list[bool]:
    """Whether the vote of each problem's completions is correct, in the order in which problems come.

    Args:
        table: one row per completion, with the problem in `id`, its class within the problem in `answer` (-1: none)
            and `correct`.
        weights: the column of the weights; None for a plain majority.
    """
    found = []
    for _, rows in table.groupby("id", sort=False):
        chosen = vote(rows["answer"].tolist(), None if weights is None else rows[weights].tolist())
        found.append(chosen >= 0 and bool(rows["correct"].iloc[chosen]))
    return found


def _share(weight: float) -> float:
    return 0.0 if math.isnan(weight) else min(1.0, max(0.0, weight))
