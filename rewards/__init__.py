"""Verifiable rewards with TRL's signature: f(completions, answer, **columns) -> list[float | None].

Each function also works alone, in a stock `GRPOTrainer(reward_funcs=...)`. Nothing here imports torch.

    math        correctness of a final answer in {0, 1}; which answers of a group are equal; which golds are readable
    extraction  where the final answer of a completion stands
    equality    whether two answers are equal, by math-verify
    notation    what is rewritten for it, or read without it; `limits` what it is never given
    grader      processes that can be killed, for what may hang or crash; `worker` is their main module
    outcomes    correct, wrong, no answer, unparsable, timed out, crashed
    format      structure of a completion: boxes, the thinking block, tags
    repetition  loops at the end of a completion
    guard       a user's own function, called so that one bad sample costs no more than itself
    text        completions as text, and the boxes in them
"""
