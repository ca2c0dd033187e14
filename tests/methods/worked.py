"""The group of four responses that the specifications work most rewards out for, and how results are compared."""

import copy

import torch

from rltoken.pipeline import build

CORRECT = torch.tensor([True, True, False, True])
REWARDS = CORRECT.float()
LENGTHS = torch.tensor([1000, 3000, 4000, 2000])
GROUP = torch.tensor([5, 5, 5, 5])
PROMPTS = [{"prompt": [{"role": "user", "content": f"q{i // 4}"}], "answer": "1"} for i in range(160)]
"""Those of forty groups of four."""
GROUPS = torch.arange(160) // 4


def assert_close(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), rtol=1e-5, atol=2e-6, equal_nan=True)


def grpo(rewards):
    """TRL's advantages of one group."""
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


def rows(**columns):
    """The inputs of the group, each with these columns."""
    return [columns] * 4


def by_group(changed, name):
    """The column's value of each group of `PROMPTS`, which all of its rows must share."""
    values = [example[name] for example in changed]
    assert all(len(set(values[i : i + 4])) == 1 for i in range(0, len(values), 4))
    return values[::4]


def assert_same_future(make):
    """A shape that `make` makes goes on from its saved state as the one that saved it does."""
    windows = list(random_windows(7))
    first, second = (build({"shapes": {"mine": make()}}) for _ in range(2))
    for window in windows[:4]:
        first["shapes"][0].run(window)
    state = first.state_dict()
    kept = copy.deepcopy(state)
    second.load_state_dict(state)
    for window in windows[4:]:
        assert torch.equal(first["shapes"][0].run(window), second["shapes"][0].run(window))
    assert state == kept, "what was saved must not change as training goes on"
    assert first.state_dict() == second.state_dict() != state


def random_windows(count):
    """Signals of windows of four groups, of three prompts that come again."""
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(16) // 4
    for _ in range(count):
        correct = torch.rand(16, generator=generator) < 0.6
        yield {
            "rewards": correct.float(),
            "correct": correct,
            "group": group,
            "lengths": torch.randint(1, 500, (16,), generator=generator),
            "texts": [""] * 16,
            "prompt_id": [f"p{number % 3}" for number in group.tolist()],
        }
