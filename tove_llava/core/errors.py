"""Errors that a user can mend.

Every message says which file, record, flag or key is at fault and what to do about it. The command line prints the
message alone (no traceback) and exits with code 2; library users catch the class they care about.
"""


class ToveError(Exception):
    """Base class of every error that is the input's fault rather than the program's."""


class ConfigError(ToveError, ValueError):
    """A preset, configuration key, flag or registered name is wrong."""


class DataError(ToveError, ValueError):
    """A record, image or annotation file cannot be used as it is."""


class CheckpointError(ToveError, RuntimeError):
    """A checkpoint is missing, incomplete, untrusted, or belongs to another model."""


class NonFiniteError(ToveError, RuntimeError):
    """A loss or an expert's output is NaN or infinite."""


class ServiceError(ToveError, RuntimeError):
    """A service on the network refuses, fails, or answers with something that is no answer."""


class BusyError(ToveError, RuntimeError):
    """An engine takes no further question now: its queue is full, or it is shutting down."""


class AnswerError(ToveError, RuntimeError):
    """A question was taken, and its answer could not be finished."""
