"""``python tests/doubles/launch.py serve ...``: the ``qpair`` command on the double, for tests without a compiled engine."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import doubles.engine

sys.modules["qpair._engine"] = doubles.engine

from qpair.cli import main  # noqa: E402 (after the double has taken the engine's place)

if __name__ == "__main__":
    sys.exit(main())
