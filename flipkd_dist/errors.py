"""The two ways a run ends early; the command line turns them into exit codes."""


class UserError(Exception):
    """The user's mistake (exit code 2). The message is one line: what is wrong, where, what to do."""


class StoppedOnRequest(Exception):
    """A termination signal was honoured after a complete checkpoint (exit code 75)."""
