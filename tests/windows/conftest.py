"""These tests are for Windows; on other systems there is nothing to collect."""

import sys

collect_ignore_glob = [] if sys.platform == "win32" else ["*.py"]
