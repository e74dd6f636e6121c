"""The base of every error that a user can mend; the command line turns it into one sentence and exit code 2."""


class BoldForgeError(Exception):
    """A mistake in the user's input, files or environment.

    The message is one sentence (or a short list of them) that names the file or key, says what was found and what was
    expected, and how to mend it. Programming errors are never raised as this class.
    """


class ConfigError(BoldForgeError):
    """A recipe or an override has an unknown key or a value that does not fit."""
