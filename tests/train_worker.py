"""Run several trainer command lines in one process or rank group.

Starting DeepSpeed takes long.

Usage: python -m train_worker FILE, where FILE holds a JSON list of argument lists.
"""

import gc
import json
import sys
from pathlib import Path

from tove_llava.train.run import main, run_as_process

if __name__ == "__main__":
    gc.freeze()  # accelerate collects garbage after each run; what is imported is none
    *first, last = json.loads(Path(sys.argv[1]).read_text())
    sys.exit(max([main(arguments) for arguments in first] + [run_as_process(last)]))
