"""A reward that lets submitit tell the job, once, that its time is nearly over."""

import os
import signal
from pathlib import Path

from tests.resume.phases import parity

TOLD = Path("told")


def parity_until_told(completion_ids, trainer_state, **_):
    """The share of even tokens; in the second step of the first start, rank 0 is sent submitit's signal."""
    if trainer_state.global_step == 1 and os.environ.get("RANK", "0") == "0" and not TOLD.exists():
        TOLD.touch()
        os.kill(os.getpid(), signal.SIGUSR2)
    return parity(completion_ids)
