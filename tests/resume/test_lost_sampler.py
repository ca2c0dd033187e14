"""A sampler that is lost in the middle of a step: the step before is saved, and the run goes on from it exactly."""

import pytest

from rltoken.errors import SamplerLost
from rltoken.preemption import EXIT_CODE
from rltoken.resume import newest_whole
from rltoken.trl_saving import SavingTrainer
from tests.resume.phases import PHASES, at_call
from tests.resume.test_preemption import RUN, assert_equal

WINDOWS = ("trainer.gradient_accumulation_steps=2", "trainer.steps_per_generation=1")
"""Two generation windows in each optimizer step."""
SAMPLED = "rltoken.trl_compat.SeamTrainer._calculate_rewards"
"""Called once a window's completions are there, and every random state has moved on."""


def lose():
    raise SamplerLost("trainer.vllm_server_base_url: the server is gone.")


@pytest.fixture(autouse=True)
def noted(monkeypatch):
    """As with a server."""
    monkeypatch.setattr(SavingTrainer, "notes_steps", True)


@pytest.mark.parametrize(
    ("method", "settings", "function", "count"),
    [
        ("+exp=grpo", (), PHASES["generation"], 2),
        ("+exp=grpo", (), SAMPLED, 2),
        ("+exp=brpo", (), PHASES["forced answers"], 2),
        ("+exp=grpo", WINDOWS, SAMPLED, 4),
        ("+exp=dynamic_sampling", (), "rltoken.trl_compat.SeamTrainer.sample", 3),
    ],
)
def test_the_step_before_is_saved_and_gone_on_from_exactly(cli, monkeypatch, method, settings, function, count):
    whole = cli(method, *RUN, *settings, "runs_dir=whole")
    assert whole.status == 0, whole.err
    with monkeypatch.context() as patch:
        at_call(patch, function, count, lose)
        left = cli(method, *RUN, *settings)
    run = left.runs / "x"
    checkpoint, damaged = newest_whole(run)
    step = int(checkpoint.name.rpartition("-")[2])
    assert left.status == EXIT_CODE and damaged == [] and step in (1, 2)
    assert left.err.splitlines()[-1] == (
        f"stopped by trainer.vllm_server_base_url: the server is gone at step {step} of 3, saved in "
        f"runs/x/checkpoint-{step}; the same command with resume=auto goes on"
    )
    resumed = cli(method, *RUN, *settings, "resume=auto")
    assert resumed.status == 0, resumed.err
    assert_equal(run, left.cwd / "whole/x")


def test_a_step_that_is_saved_already_is_not_saved_again(cli, monkeypatch):
    settings = (*RUN, "trainer.save_steps=1")
    with monkeypatch.context() as patch:
        at_call(patch, PHASES["generation"], 3, lose)
        left = cli("+exp=grpo", *settings)
    written = (left.runs / "x/checkpoint-2/rltoken_manifest.json").stat().st_mtime_ns
    state = (left.runs / "x/checkpoint-2/trainer_state.json").stat().st_mtime_ns
    assert left.status == EXIT_CODE and state <= written


def test_before_the_first_step_there_is_nothing_to_save(cli, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(patch, PHASES["generation"], 1, lose)
        left = cli("+exp=grpo", *RUN)
    assert left.status == EXIT_CODE and "at step 0 of 3, before anything was learned" in left.err
    assert not list((left.runs / "x").glob("checkpoint-*"))
    resumed = cli("+exp=grpo", *RUN, "resume=auto")
    assert resumed.status == 0, resumed.err
