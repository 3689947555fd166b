"""Standard output is for results: what libraries log goes to standard error, or nowhere."""

import logging
import sys


class _DeepSpeed(logging.Filter):
    """DeepSpeed logs to standard output, where it would stand in front of a JSON result."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if not message.startswith("Setting accelerator to CPU"):  # said on every machine without a GPU
            print(f"DeepSpeed: {message}", file=sys.stderr)
        return False


def keep_stdout_clean() -> None:
    """Take DeepSpeed's log off standard output. Call it before DeepSpeed is imported."""
    logger = logging.getLogger("DeepSpeed")
    if not any(isinstance(each, _DeepSpeed) for each in logger.filters):
        logger.addFilter(_DeepSpeed())


def quiet_transformers() -> None:
    """No progress bars and reports while weights are loaded: only errors."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it offers faster kernels at every import
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
