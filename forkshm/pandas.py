"""Workers as the ``engine`` of pandas' ``apply`` and ``map``: see `Engine`."""

from forkshm.integrations.pandas_engine import Engine

__all__ = ("Engine",)
