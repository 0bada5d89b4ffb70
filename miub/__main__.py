"""Run the ``miub`` command as ``python -m miub``."""

import sys

from miub.cli import main

if __name__ == "__main__":
    sys.exit(main())
