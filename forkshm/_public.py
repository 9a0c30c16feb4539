"""Sets the module of public classes to their public package, for reprs, tracebacks and ``help()``."""

from __future__ import annotations

from typing import Any

__all__ = ("publish",)


def publish(namespace: dict[str, Any]) -> None:
    """Set the ``__module__`` of the classes in ``__all__`` of a package to the package.

    Args:
        namespace: The ``globals()`` of the package. Classes of its private modules get its name as ``__module__``.
    """
    package = namespace["__name__"]
    for name in namespace["__all__"]:
        thing = namespace.get(name)
        if isinstance(thing, type) and thing.__module__.startswith(f"{package}._"):
            thing.__module__ = package
