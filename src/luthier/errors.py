"""What a user did wrong, said once and completely."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in the input: what was given, what is allowed, where, and what to do.

    The command line prints it without a traceback and exits with code 2. A bug is never a
    ``UserError``.
    """


class MemoryRanOut(UserError):
    """What was asked for does not fit into this machine's memory."""


class Interrupted(Exception):
    """A signal asked the run to stop; the state was saved and ``--resume`` continues it."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return a sentence that names the closest allowed word, or lists them all."""
    names = sorted(set(allowed))
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.55)
    if close:
        return f"Did you mean '{close[0]}'?"
    return f"Allowed: {', '.join(names)}." if names else "Nothing is allowed here."
