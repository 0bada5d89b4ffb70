"""``python -m scalora``."""

from scalora.cli import main

main()
