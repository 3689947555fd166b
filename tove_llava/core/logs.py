"""Keep the logs of libraries off standard output, which is for results."""

import logging
import sys


class _DeepSpeed(logging.Filter):
    """Sends DeepSpeed's log to standard error."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if not message.startswith("Setting accelerator to CPU"):  # logged on every machine without a GPU
            print(f"DeepSpeed: {message}", file=sys.stderr)
        return False


def keep_stdout_clean() -> None:
    """Take DeepSpeed's log off standard output. Call it before DeepSpeed is imported."""
    logger = logging.getLogger("DeepSpeed")
    if not any(isinstance(each, _DeepSpeed) for each in logger.filters):
        logger.addFilter(_DeepSpeed())


def quiet_transformers() -> None:
    """Silence progress bars and reports of loading, but not errors."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it offers faster kernels at every import
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
