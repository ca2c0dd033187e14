"""Token-level reinforcement learning of reasoning models on top of TRL.

Importing this package imports nothing heavy: torch, transformers and TRL are loaded by the modules that use them.
"""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout `rewards/` and `conf/` stand beside this package, not inside it as in a wheel. Without an install, or
# where the working directory shadows one, only this makes them importable as `rltoken.rewards` and `rltoken.conf`.
_here = Path(__file__).resolve().parent
if not (_here / "rewards").is_dir():
    __path__.append(str(_here.parent))
