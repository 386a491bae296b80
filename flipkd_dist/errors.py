"""The ways a run ends early; the command line turns them into exit codes."""


class UserError(Exception):
    """The user's mistake (exit code 2). The message is one line: what is wrong, where, what to do."""


class StoppedOnRequest(Exception):
    """A termination signal was honoured after a complete checkpoint (exit code 75)."""


class StoppedAtOnce(BaseException):
    """A termination signal came where nothing is lost (exit code 75); no `except Exception` may hold it up."""


class HeadLost(StoppedAtOnce):
    """Ray's head is gone; nothing of the run is lost with it (exit code 75)."""


class PeerFailed(RuntimeError):
    """Another rank's failure, quoted: it is the cause, this one the consequence."""


class WorkerFailed(Exception):
    """A worker failed for good (exit code 1). The message is one line that begins with its rank and host."""
