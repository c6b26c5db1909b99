"""``python -m lightning_powersgd`` is the program ``lightning-powersgd``."""

import sys

from lightning_powersgd.planner.command import main

if __name__ == "__main__":
    sys.exit(main())
