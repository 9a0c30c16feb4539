"""Limits the threads that BLAS, OpenMP and similar libraries use in a worker.

Each of these libraries starts a thread for each core, in every worker. With as many workers as cores, this is the
square of the number of cores. So a worker gets its share of the cores. Libraries that are loaded already are limited
through ``threadpoolctl``, if it is installed. Libraries that are loaded later read environment variables. A spawned
process has the variables before it imports ``__main__``, see `forkshm.processes`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import Any

from forkshm.backend import kernel

__all__ = ("VARIABLES", "limit", "prepare", "set_by_user", "share", "variables")

VARIABLES = {
    "OMP_NUM_THREADS": "openmp",
    "OPENBLAS_NUM_THREADS": "openblas",
    "MKL_NUM_THREADS": "mkl",
    "BLIS_NUM_THREADS": "blis",
    "VECLIB_MAXIMUM_THREADS": "",
    "NUMBA_NUM_THREADS": "",
    "NUMEXPR_NUM_THREADS": "",
}
"""The environment variables, each with the name that ``threadpoolctl`` has for the library that reads it."""
# If such a library is loaded, at least one of these modules is imported.
_USERS = ("numpy", "scipy", "torch", "sklearn", "faiss", "numexpr", "pyarrow", "lightgbm", "xgboost")

# Finds the libraries. Created before the workers are forked, so that they need not search.
_controller: Any = None
# Number of imported modules at that time.
_modules = 0
# Variable of each OpenBLAS library, by its path, that holds the number of threads. OpenBLAS' function that sets it
# would start all threads first, including those that are not to be used. Each of them takes a core for up to 0.1 s
# before it sleeps, so a worker that runs for less would take longer to start than to work.
_numbers: dict[str, Any] = {}
_NUMBER = "blas_cpu_number"


def share(cores: int, workers: int) -> int | None:
    """Return how many threads each of *workers* may use, or None if each may use all *cores*."""
    each = max(1, cores // workers)
    return None if each >= cores else each


def set_by_user() -> dict[str, str]:
    """Return the environment variables that are set here. A process of the fork server has those of its server."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def variables(count: int, *, is_explicit: bool) -> dict[str, str]:
    """Return the environment variables to set. Variables that the user set stay unless *is_explicit*."""
    if is_explicit:
        return dict.fromkeys(VARIABLES, str(count))
    # All libraries use OMP_NUM_THREADS if their own variable is not set.
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    return {name: str(count) for name in VARIABLES if name not in os.environ}


def prepare() -> None:
    """Find the libraries that are loaded, before workers are forked. Takes about 0.5 ms, or nothing without them.

    A library is loaded with a module, so the search is repeated only if the number of modules has changed.
    """
    global _controller, _modules
    modules = len(sys.modules)
    if modules == _modules:
        return
    _controller = None
    if any(name in sys.modules for name in _USERS) and importlib.util.find_spec("threadpoolctl") is not None:
        try:
            _controller = importlib.import_module("threadpoolctl").ThreadpoolController()
            for library in _controller.lib_controllers:
                if library.internal_api == "openblas" and library.filepath not in _numbers:
                    number = kernel.global_int(library.filepath, _NUMBER)
                    # Other versions may name the variable differently, or give it another meaning.
                    if number is not None and number.value == library.num_threads:
                        _numbers[library.filepath] = number
        except Exception:  # an unknown library: continue without the limit
            _controller = None
    _modules = len(sys.modules)  # threadpoolctl itself is one


def limit(count: int, *, is_explicit: bool, by_user: dict[str, str]) -> None:
    """Limit the libraries of this worker to this many threads each, but never raise their current default."""
    os.environ.update(by_user)
    chosen = variables(count, is_explicit=is_explicit)
    if _controller is None:
        prepare()
    if _controller is not None:
        by_name = {VARIABLES[name]: name for name in chosen}
        for library in _controller.lib_controllers:
            try:
                if library.internal_api not in by_name:
                    continue
                number = _numbers.get(library.filepath)
                if number is not None and count <= number.value:
                    number.value = count
                elif is_explicit or (library.num_threads or 0) > count:
                    library.set_num_threads(count)
            except Exception:  # noqa: S112 - as above
                continue
    os.environ.update(chosen)
