"""The two errors that a door turns into one line and an exit status.

Code below the doors raises these, and nothing else, for what a user can mend. The message names the thing, what was
given and what would be valid; any other exception is a defect of ours and keeps its traceback.
"""


class UsageError(ValueError):
    """A flag, a config value or an input that cannot be right. Exit status 2."""

    exit_status = 2


class RunError(RuntimeError):
    """A run that could not go on: a full disk, a broken checkpoint, a loss that is not finite. Exit status 1."""

    exit_status = 1
