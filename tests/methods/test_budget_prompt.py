"""Budgets in prompts: one for a group, told in the words of the template."""

import torch

from rltoken.methods.budget_prompt import budget_prompt


def test_budget_prompt_gives_one_budget_to_a_group():
    inputs = [{"prompt": [{"role": "user", "content": f"q{i // 2}"}], "answer": "1"} for i in range(6)]
    group = torch.arange(6) // 2
    changed = budget_prompt(inputs, group, torch.Generator().manual_seed(0), budgets=[8, 16], template=" <{budget}>")
    budgets = [example["budget"] for example in changed]
    assert budgets[0::2] == budgets[1::2] and set(budgets) <= {8, 16}
    assert changed[0]["prompt"][-1]["content"] == f"q0 <{budgets[0]}>"
    assert inputs[0]["prompt"][-1]["content"] == "q0", "the data set's own rows stay as they are"
