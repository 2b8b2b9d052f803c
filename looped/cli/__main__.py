"""The command line as `python -m looped.cli`, for launchers that start modules."""

import sys

from looped.cli import main

sys.exit(main())
