"""Errors that a user can mend.

Every message names the file, record, flag or key at fault and says what to do. The command line prints only the message
(no traceback) and exits with code 2; library users catch the class they care about.
"""


class ToveError(Exception):
    """Base class of the errors that the input causes, not the program."""


class ConfigError(ToveError, ValueError):
    """A preset, configuration key, flag or registered name is wrong."""


class DataError(ToveError, ValueError):
    """A record, image or annotation file cannot be used as it is."""


class CheckpointError(ToveError, RuntimeError):
    """A checkpoint is missing, incomplete, untrusted, or belongs to another model."""


class NonFiniteError(ToveError, RuntimeError):
    """A loss or an expert's output is NaN or infinite."""


class ServiceError(ToveError, RuntimeError):
    """A service on the network refuses, fails, or answers with something unusable."""


class BusyError(ToveError, RuntimeError):
    """An engine's queue is full, or it is shutting down."""


class AnswerError(ToveError, RuntimeError):
    """A question was accepted, but its answer could not be finished."""
