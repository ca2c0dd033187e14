"""Two ranks under gloo, by DDP, FSDP2 and DeepSpeed, give the weights of one rank on the same rollouts.

One process trains every case, and so do two under each of these; what is compared is every weight, in float32, and the
state of stages. The cases are methods put together here and every conf/exp.
"""

import functools
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

SCRIPT = Path(__file__).with_name("two_ranks.py")
ROOT = SCRIPT.parents[2]
CONFIGS = ROOT / "rltoken" / "accelerate_configs"
TOLERANCE = 1e-6
"""Of a weight, where training moves weights by more than ten times that."""
BNPO = {"exp/fast_math_r1", "exp/paper/fast_math_r1"}
"""Their loss divides by the tokens of a rank's micro-batch, in TRL too, so that the number of ranks changes it."""
STAGES = ("tokens", "thr", "marks", "self_reward", "rows", "brpo", "packed", "mrt", "hapo", "spine", "campo", "kdrl")
EXPS = sorted(f"exp/{path.relative_to(ROOT / 'conf/exp')}"[:-5] for path in ROOT.glob("conf/exp/**/*.yaml"))
FAST = (
    *(f"stages/{name}" for name in STAGES),
    *("exp/brpo", "exp/dynamic_sampling", "exp/entropy_advantage", "exp/mrt/bonus", "exp/rlvr", "exp/hapo_history"),
)
"""Together they have every slot, a reference, a teacher, drawn prompts and added rows; all other exps are slow."""
SLOW = tuple(exp for exp in EXPS if exp not in FAST and exp not in BNPO)
ZERO = (
    *("exp/grpo", "exp/brpo", "exp/dynamic_sampling", "exp/entropy_advantage", "exp/laser_self_reward", "exp/mrt"),
    *("exp/rlvr", "exp/kdrl", "exp/hapo_history"),
)
"""What DeepSpeed trains: one of each kind."""


def launcher(arm):
    """The command that starts a script in one process, or in two of the shipped configuration of that name."""
    if arm == "alone":
        return [sys.executable]
    files = ["--config_file", str(CONFIGS / f"{arm}.yaml"), "--num_processes", "2", "--main_process_port", "0"]
    return [sys.executable, "-m", "accelerate.commands.launch", *files]


def started(script, arm, tiny, out, *arguments):
    """What a script saves that trains 16 rows in one process, or 8 in each of two."""
    folder, _, dataset = tiny
    data = out.with_name("data")
    if not data.exists():
        dataset.save_to_disk(data)
    env = os.environ | {"PYTHONPATH": str(ROOT), "TORCHDYNAMO_DISABLE": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*launcher(arm), str(script), folder, data, out, "16" if arm == "alone" else "8", *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def results(tiny, tmp_path_factory):
    """results(arm, cases) -> case -> weights and numbers; each arm is started once."""
    folder = tmp_path_factory.mktemp("two-ranks")

    @functools.cache
    def of(arm, cases):
        return started(SCRIPT, arm, tiny, folder / f"{arm}.pt", *cases)

    return of


def distance(one, two):
    return max((one[name] - two[name]).abs().max().item() for name in one)


def check_equal(one, two, start):
    """Weights of one rank and of two, the state of stages, and that training did anything."""
    (weights, numbers), (others, other_numbers) = one, two
    assert weights.keys() == others.keys() == start.keys()
    assert distance(weights, others) < TOLERANCE
    assert distance(start, weights) > 10 * TOLERANCE
    torch.testing.assert_close(numbers, other_numbers, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def start(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny[0], dtype=torch.float32).state_dict()


@pytest.mark.parametrize("case", FAST)
@pytest.mark.parametrize("arm", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_ranks_equal_one(results, start, arm, case):
    one, two = (results(name, FAST)[case] for name in ("alone", arm))
    check_equal(one, two, start)
    numbers = one[1]
    assert (case == "stages/hapo") == ("method.controls.hapo.pivot" in numbers), "the state of stages is compared too"
    if case == "stages/campo":
        assert numbers["method.controls.campo.stage"] == 1 and len(numbers["method.controls.campo.lengths"]) == 1
    assert (case == "stages/thr") == ("mean_reward" in numbers), "so is a metric that each rank has of its own rows"
    if case == "exp/dynamic_sampling":
        assert numbers["cursor"] > 0, "prompts were drawn, and they are those of one rank"


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
@pytest.mark.parametrize("arm", ["ddp", "fsdp2"])
def test_two_ranks_equal_one_for_every_exp(results, start, arm, case):
    check_equal(*(results(name, SLOW)[case] for name in ("alone", arm)), start)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs pip install 'rltoken[deepspeed]'")
@pytest.mark.parametrize("case", ZERO)
@pytest.mark.parametrize("arm", ["zero2", "zero3"])
def test_two_ranks_of_deepspeed_equal_one(results, start, arm, case):
    check_equal(*(results(name, ZERO)[case] for name in ("alone", arm)), start)


def test_every_shape_and_credit_sees_its_whole_groups_on_two_ranks(tiny, tmp_path):
    """Rewards and advantages of all ranks' windows; a window of two ranks holds the same prompts in the same order."""
    script = SCRIPT.with_name("two_ranks_stages.py")
    one, two = (started(script, arm, tiny, tmp_path / f"{arm}.pt") for arm in ("alone", "ddp"))
    assert one.keys() == two.keys() and len(one) > 20
    for name in one:
        assert len(one[name]) == 2, name
        for alone, together in zip(one[name], two[name], strict=True):
            for a, b in zip(alone, together, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=name)
        assert any(advantages.abs().max() > 0.01 for _, advantages in one[name]), name
