"""The main module of a worker of `rltoken.rewards.grader`: reads items, calls a function on them, answers.

It is run by its path, before `sys.path` is known, and imports nothing but the standard library and what the function
needs. On both pipes messages are small and one-way: in come pickled pairs (kind, pickled data), the first of which
brings `sys.path`; out goes, per function and per item, a header and the pickled value, or the error as text.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import resource
import signal
import struct
import sys
from typing import BinaryIO

REPLY = struct.Struct("<?QQ")
"""The header of a reply: whether there is a value, the memory in use in bytes, the length of what follows in bytes."""
OUT_OF_MEMORY = 112
"""The exit status of a worker that met its memory bound: there may be none left to say so in a reply."""
MAX_DETAIL = 200
"""The longest text of an error, in characters."""

_PR_SET_PDEATHSIG = 1
_MB = 2**20


def main() -> None:
    """Serve the process whose id is the first argument, within as many MB of memory as the second one says."""
    parent, memory_mb = map(int, sys.argv[1:])
    _die_with(parent)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    bound = memory_mb * _MB if hard == resource.RLIM_INFINITY else min(memory_mb * _MB, hard)
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    # What the function prints, in C too, must not get between the replies.
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    serve(requests, replies)


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer requests until there are no more.

    Args:
        requests: where the requests are read.
        replies: where the replies are written.

    Raises:
        SystemExit, MemoryError: if the function raised it, which ends the worker.
    """
    sys.path[:] = pickle.load(requests)
    function, statm = None, os.open("/proc/self/statm", os.O_RDONLY)
    while True:
        try:
            kind, data = pickle.load(requests)
        except EOFError:
            return
        try:
            content = pickle.loads(data)
            if kind == "function":
                function, value = content, None
                warm_up = getattr(sys.modules.get(getattr(function, "__module__", None)), "warm_up", None)
                if warm_up is not None:
                    warm_up()
            else:
                value = function(content)
            good, payload = True, pickle.dumps(value)
        except (SystemExit, MemoryError):
            raise
        except BaseException as error:  # math-verify's TimeoutException is no Exception
            good, payload = False, describe(error).encode(errors="replace")
        content = value = None
        replies.write(REPLY.pack(good, _memory_in_use(statm), len(payload)) + payload)
        replies.flush()


def describe(error: BaseException) -> str:
    """The class of an error and the first line of its message, of at most `MAX_DETAIL` characters."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # the message of a foreign error may fail to be made, as that of a huge number does
        lines = []
    return ": ".join([type(error).__name__, *lines[:1]])[:MAX_DETAIL]


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends, even while C code runs."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # A parent that ended before the line above sends no signal any more.
    if os.getppid() != parent:
        os._exit(1)


def _memory_in_use(statm: int) -> int:
    """Resident bytes. `getrusage` would not do: its maximum begins with the size of the process that was forked."""
    return int(os.pread(statm, 256, 0).split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    try:
        main()
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
