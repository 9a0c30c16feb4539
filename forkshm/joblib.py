"""``import forkshm.joblib`` registers the joblib backend ``"forkshm"``: see `ForkshmBackend`."""

from forkshm.integrations.joblib import ForkshmBackend, shutdown

__all__ = ("ForkshmBackend", "shutdown")
