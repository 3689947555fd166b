"""Run torch's launcher without the traceback that it prints after a rank's error.

``python -m tove_llava.train.torchrun`` takes the flags of torchrun.
"""

import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

if __name__ == "__main__":
    logging.disable(logging.ERROR)
    try:
        run.run(run.parse_args(None))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        sys.exit(code if code >= 0 else 128 - code)
