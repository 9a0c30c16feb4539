"""Workers as the ``engine`` of pandas' ``apply`` and ``map``: see `Engine`."""

from forkshm._help import publish
from forkshm.integrations.pandas_engine import Engine

__all__ = ("Engine",)

publish(globals())
