"""``python -m qpair.cli``."""

import sys

from qpair.cli import main

sys.exit(main())
