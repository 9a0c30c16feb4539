"""Libraries that do not survive a fork once used: a pool warns, a hang names them, and the fork server works."""

from __future__ import annotations

import importlib.util

import pytest

pytestmark = [pytest.mark.nightly, pytest.mark.needs("proc")]

PROGRAM = """
import sys, warnings
import forkshm

which, method = sys.argv[1:]

def use(x):
    if which == "polars":
        import polars
        return polars.DataFrame({"a": [1, 2, 3]}).lazy().with_columns(b=polars.col("a") * x).collect()["b"].sum()
    if which == "grpc":
        import grpc
        from concurrent import futures
        server = grpc.server(futures.ThreadPoolExecutor(1))
        channel = grpc.insecure_channel(f"localhost:{server.add_insecure_port('localhost:0')}")
        server.start()
        grpc.channel_ready_future(channel).result(timeout=20)
        kept.append((server, channel))
        return 6 * x
    import numpy as np
    from sklearn.ensemble import HistGradientBoostingClassifier
    model = HistGradientBoostingClassifier(max_iter=3).fit(np.arange(2000.0)[:, None], np.arange(2000) % 2)
    return 6 * x if model.n_iter_ == 3 else None

kept = []

if __name__ == "__main__":
    assert use(1) == 6
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pool = forkshm.get_context(method).Pool(1, task_timeout=20 if method == "fork" else None)
        with pool:
            try:
                print(pool.apply(use, (2,)))
            except forkshm.TaskTimeoutError as error:
                print(error)
            except Exception as error:
                print(type(error).__name__)
    said = [str(warning.message) for warning in caught if issubclass(warning.category, forkshm.ForkshmWarning)]
    print(*said, sep="\\n")
    kept.clear()
"""

LIBRARIES = [("polars", "polars"), ("grpc", "gRPC"), ("sklearn", "GNU OpenMP")]


@pytest.mark.parametrize(("module", "name"), LIBRARIES)
def test_a_fork_warns_and_a_hang_names_the_library(run_script, module, name):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    said = run_script(PROGRAM, module, "fork")
    assert f"this process has used {name}" in said
    if "task_timeout" in said:
        assert f"forked after {name} was used" in said


@pytest.mark.parametrize(("module", "name"), LIBRARIES)
def test_the_fork_server_works_without_a_warning(run_script, module, name):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    assert run_script(PROGRAM, module, "forkserver").split() == ["12"]
