"""Verifiable rewards with TRL's signature: f(completions, answer, **columns) -> list[float | None].

Each function also works alone, in a stock `GRPOTrainer(reward_funcs=...)`. Nothing here imports torch.

    math      correctness of a final answer in {0, 1}, its normal form, and whether a gold answer can be graded
    format    structure of a completion
    text      the part of a completion that counts as its answer
"""
