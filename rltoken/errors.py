"""The exceptions that mean: the user can mend this."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """An impossible setting or input, told in one line that names the config key and the fix.

    The entry points print the message without a traceback and exit with status 2. Anything else that is raised is a
    bug (or a user's own function) and keeps its traceback.

    Example:
        >>> raise UserError("model.path: no such folder: ./llm. Set model.path to a folder that holds config.json.")
        Traceback (most recent call last):
        ...
        rltoken.errors.UserError: model.path: no such folder: ./llm. Set model.path to a folder that holds config.json.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class SharedError(UserError):
    """A UserError that every rank raises at the same point, so that rank 0 alone tells it."""


class SamplerLost(UserError):
    """A server that a run needs is gone or stands still; the run saves its last step and leaves."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class name where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the nearest of the known names, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""
