"""Verifiable rewards with TRL's signature: f(completions, answer, **columns) -> list[float | None].

Each function also works alone, in a stock `GRPOTrainer(reward_funcs=...)`. Nothing here imports torch.

    math        correctness of a final answer in {0, 1}, its normal form, and whether a gold answer can be graded
    format      structure of a completion: boxes, the thinking block, tags
    repetition  loops at the end of a completion
    guard       a user's own function, called so that one bad sample costs no more than itself
    text        the part of a completion that counts as its answer
"""
