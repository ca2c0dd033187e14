"""The embedded world: verifiable problems, a tiny model that reasons about them, and nothing to download.

`rltoken.tiny.warm_start` is the function here, which hides the module of that name; `from rltoken.tiny.warm_start
import ...` still reaches into the module.
"""

from rltoken.tiny.data import problems, traces
from rltoken.tiny.reward import accuracy, answer, classes
from rltoken.tiny.tokenizer import build_tokenizer
from rltoken.tiny.warm_start import warm_start
from rltoken.tiny.world import World

__all__ = ["World", "accuracy", "answer", "build_tokenizer", "classes", "problems", "traces", "warm_start"]
