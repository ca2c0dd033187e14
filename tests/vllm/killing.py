"""A rows stage that loses the server in the middle of the third window, once."""

import os
import time
from pathlib import Path


class Killing:
    """Send a signal to a process group in the window of step 3; a file says that and when it was done."""

    def __init__(self, group, number):
        self._group, self._number = group, number

    def __call__(self, rollout, sampler):
        done = Path("killed_at")
        if rollout.progress.step == 2 and not done.exists():
            done.write_text(str(time.time()))
            os.killpg(self._group, self._number)
            sampler.generate([row.prompt_ids for row in rollout.rows[:4]], max_new_tokens=4)
        return rollout
