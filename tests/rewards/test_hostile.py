"""Grading ends in time whatever a completion holds, in a counted outcome, and its neighbours keep theirs."""

import runpy
import time
from pathlib import Path

import pytest

from rltoken.rewards.math import accuracy, classes
from rltoken.rewards.outcomes import Outcome

HOSTILE = runpy.run_path(str(Path(__file__).with_name("hostile.py")))["hostile"]()
SECONDS = 2.0
BEFORE, AFTER = r"It is \boxed{\frac{84}{2}}.", r"It is \boxed{\frac{83}{2}}."
RIGHT = {"percent_signs", "degree_signs", "arabic_digits", "full_width_digits"}
"""Read as 42, which is the gold answer."""


@pytest.fixture(scope="module", autouse=True)
def warm_pool():
    accuracy([BEFORE, AFTER], ["42", "42"], workers=2, seconds=SECONDS)


def test_there_are_enough_of_them():
    assert len(HOSTILE) >= 60


@pytest.mark.parametrize("name", HOSTILE)
def test_grading_ends_in_a_counted_outcome_and_the_neighbours_keep_theirs(name):
    logged = {}
    completions = [BEFORE, HOSTILE[name], AFTER]
    started = time.monotonic()
    rewards = accuracy(completions, ["42"] * 3, workers=2, seconds=SECONDS, log_extra=logged.__setitem__)
    took = time.monotonic() - started
    before, hostile, after = logged["outcome"]
    assert (before, after) == (Outcome.CORRECT, Outcome.WRONG)
    assert hostile in list(Outcome)
    assert rewards == [1.0, float(name in RIGHT), 0.0]
    assert took < SECONDS + 1


@pytest.mark.parametrize("name", ["expanded_binomial", "integral", "tower", "nan", "surrogates", "lone_surrogate"])
def test_a_hostile_answer_votes_for_itself_alone(name):
    completions = [BEFORE, HOSTILE[name], r"\boxed{42}", HOSTILE[name], AFTER]
    assert classes(completions, [0] * 5, workers=2, seconds=SECONDS) == [0, 1, 0, 1, 2]
