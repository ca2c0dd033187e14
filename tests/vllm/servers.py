"""vLLM servers of tests, started as a user starts them: by `python -m rltoken.serve`."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from torch.distributed.elastic.utils.distributed import get_free_port

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 300


class Served:
    """A server in a process group of its own.

    Args:
        log: a file for what it prints.
        model: overrides that say which model.
        environment: variables.

    Attributes:
        url: where it answers.
        overrides: what tells a run of `rltoken.train` of it.
    """

    def __init__(self, log, *model, port=None, **environment):
        self.log, self.port = log, port or get_free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.overrides = ["rollout=vllm_server", f"trainer.vllm_server_port={self.port}"]
        command = [sys.executable, "-m", "rltoken.serve", *model, *self.overrides]
        with open(log, "a") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
            )  # fmt: skip

    def wait(self):
        """Until it answers."""
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until and self.process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=2):
                return self
            time.sleep(0.5)
        raise AssertionError(f"no server: {Path(self.log).read_text()[-3000:]}")

    def send(self, number):
        """A signal to the server and the engine that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def kill(self):
        """SIGKILL, and what is left of it."""
        self.send(signal.SIGKILL)
        self.process.wait()
