"""Entry point of `python -m looped.cli`, for launchers that start modules."""

import sys

from looped.cli import main

if __name__ == "__main__":
    sys.exit(main())
