"""Run the ``scalora`` command as ``python -m scalora``."""

import sys

from scalora.cli import main

sys.exit(main())
