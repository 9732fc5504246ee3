"""The one exception for mistakes a user can mend."""


class UsageError(ValueError):
    """A call, file or setting is wrong; the message is one line saying what to change.

    The command line prints the message alone and exits with status 2.
    """
