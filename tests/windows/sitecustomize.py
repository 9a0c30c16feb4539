"""Run by each Python that the tests start on Windows, whose PYTHONPATH has this folder: defines signals for tests."""

import sys

if sys.platform == "win32":
    import _signals

    _signals.stand_in()
