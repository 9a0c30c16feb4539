"""What pytest does not collect, and what the collector of garbage need not look at."""

import gc
from importlib.util import find_spec

# The doctests of integrations with libraries that are not installed.
collect_ignore = [] if find_spec("torch") else ["forkshm/integrations/torch.py"]


def pytest_collection_finish(session):
    """Let the collections around each test pass over the libraries: with PyTorch they take 0.1 s each."""
    gc.collect()
    gc.freeze()
