"""Errors that a user can mend.

Every message names the file, record, flag or key at fault and says what to do. The command line prints only the message
(no traceback) and exits with code 2; library users catch the class they care about.
"""


class ToveError(Exception):
    """Base class of the errors that the input causes, not the program.

    Example:
        >>> try:
        ...     tove_llava.load_tower("tinny")
        ... except tove_llava.ToveError as error:
        ...     print(error)
        'tinny' is no folder, no preset and no repository (owner/name). Did you mean 'tiny'? Presets: ...
    """


class ConfigError(ToveError, ValueError):
    """A preset, configuration key, flag or registered name is wrong.

    Example:
        >>> tove_llava.load_preset("tiny", ["vision.topk=2"])
        Traceback (most recent call last):
        tove_llava.core.errors.ConfigError: ...'topk'...Did you mean 'top_k'...
    """


class DataError(ToveError, ValueError):
    """A record, image or annotation file cannot be used as it is.

    Example:
        >>> from tove_llava.data import read_records
        >>> read_records("nowhere.json")
        Traceback (most recent call last):
        tove_llava.core.errors.DataError: ...nowhere.json...
    """


class CheckpointError(ToveError, RuntimeError):
    """A checkpoint is missing, incomplete, untrusted, or belongs to another model.

    Example:
        >>> tove_llava.load_model("nowhere")
        Traceback (most recent call last):
        tove_llava.core.errors.CheckpointError: nowhere is not a folder; give the output folder of a training run
    """


class NonFiniteError(ToveError, RuntimeError):
    """A loss or an expert's output is NaN or infinite.

    Example:
        >>> tower = tove_llava.load_tower("tiny").train()
        >>> tower(torch.full((1, 3, 96, 96), torch.nan))
        Traceback (most recent call last):
        tove_llava.core.errors.NonFiniteError: expert 'depth' returned non-finite values for image(s) [0]...
    """


class ServiceError(ToveError, RuntimeError):
    """A service on the network refuses, fails, or answers with something unusable."""


class BusyError(ToveError, RuntimeError):
    """An engine's queue is full, or it is shutting down."""


class AnswerError(ToveError, RuntimeError):
    """A question was accepted, but its answer could not be finished."""
