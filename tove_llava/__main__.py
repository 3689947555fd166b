"""``python -m tove_llava`` is ``tove-llava``."""

import sys

from tove_llava.cli import main

if __name__ == "__main__":
    sys.exit(main())
