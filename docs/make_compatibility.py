"""Run the smallest real job of each library that takes a pool, an executor or a map, and write the table.

    python docs/make_compatibility.py [NAME ...]            print the table, of all programs or of these
    python docs/make_compatibility.py --write [NAME ...]    write it to docs/_include/compatibility.md

Each program runs in an interpreter of its own. It fails if its answer is wrong, or if its work did not run in forkshm's
workers. Rows of libraries that are not installed are kept from the file. ``tests/ecosystem/test_compatibility.py`` runs
the same programs.
"""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

FILE = pathlib.Path(__file__).parent / "_include" / "compatibility.md"
SECONDS = 300


class Program(NamedTuple):
    """One job of one library."""

    # Distributions that must be installed. The version of the first one is shown.
    needs: tuple[str, ...]
    job: str
    # The object or function of forkshm that the library takes.
    takes: str
    source: str
    # Whether it runs in a few seconds.
    quick: bool = False


HEAD = '''
import os, sys, warnings
import forkshm

PARENT = os.getpid()

class Seen:
    """Records the pids of its callers, in a file that all processes write to."""

    def __init__(self):
        self.path = f"seen-{PARENT}"

    def __call__(self):
        with open(self.path, "a") as file:
            file.write(f"{os.getpid()}\\n")

    def check(self, also_here=False):
        """Check that only workers have called it, or also this process, because SciPy evaluates some points itself."""
        pids = {int(line) for line in open(self.path)}
        if also_here:
            pids.discard(PARENT)
        assert pids and PARENT not in pids, f"ran in this process: {pids}"

seen = Seen()
'''

FUNCTION = """
import numpy as np

def parabola(x):
    seen()
    return float(((np.asarray(x) - 1.0) ** 2).sum())
"""

PROGRAMS: dict[str, Program] = {}


def program(name: str, needs: str, job: str, takes: str, source: str, *, quick: bool = False) -> None:
    PROGRAMS[name] = Program(tuple(needs.split()), job, takes, HEAD + source, quick)


# -- SciPy ---------------------------------------------------------------------------------------

for name, call in {
    "differential_evolution": (
        "scipy.optimize.differential_evolution(parabola, [(-3, 3)] * 2, workers=take, updating='deferred', "
        "maxiter=20, rng=1).fun < 0.1"
    ),
    "brute": "abs(scipy.optimize.brute(parabola, [(-3, 3)], Ns=7, workers=take, finish=None) - 1) < 1e-9",
    "minimize": (
        "scipy.optimize.minimize(parabola, [0.0, 0.0], method='BFGS', options={'workers': take}, jac='2-point').fun "
        "< 1e-6"
    ),
    "shgo": "scipy.optimize.shgo(parabola, [(-3, 3)] * 2, workers=take).fun < 1e-6",
    "least_squares": "scipy.optimize.least_squares(residuals, [0.0, 0.0], workers=take).cost < 1e-9",
    "quad_vec": "abs(scipy.integrate.quad_vec(parabola, 0, 2, workers=take)[0] - 2 / 3) < 1e-6",
    "cubature": (
        "abs(scipy.integrate.cubature(many, [0.0], [2.0], workers=take).estimate "
        "- 2 / 3 * (0.7**1.5 + 1.3**1.5)) < 1e-4"
    ),
}.items():
    for takes, opened, take in (
        ("Pool.map", "forkshm.Pool(2) as pool", "pool.map"),
        ("Executor.map", "forkshm.Executor(2) as executor", "executor.map"),
    ):
        program(
            f"scipy {name} {takes}",
            "scipy numpy",
            f"`{name}`",
            f"`{takes}`",
            FUNCTION
            + f"""
import scipy.integrate, scipy.optimize

def residuals(x):
    seen()
    return np.asarray(x) - 1.0

def many(points):
    seen()
    return np.sqrt(np.abs(points[:, 0] - 0.7))

if __name__ == "__main__":
    with {opened}:
        take = {take}
        assert {call}
    seen.check(also_here=True)
""",
            quick=name in ("brute", "differential_evolution") and takes == "Pool.map",
        )

# -- samplers and optimizers -----------------------------------------------------------------------

SAMPLED = (
    FUNCTION
    + """
def log_probability(x, *args):
    return -0.5 * parabola(x)
"""
)

program(
    "emcee",
    "emcee numpy",
    "`EnsembleSampler(pool=)`",
    "`Pool`",
    SAMPLED
    + """
import emcee

if __name__ == "__main__":
    with forkshm.Pool(2) as pool:
        sampler = emcee.EnsembleSampler(8, 2, log_probability, pool=pool)
        sampler.run_mcmc(np.random.default_rng(1).normal(size=(8, 2)), 10)
    assert sampler.get_chain().shape == (10, 8, 2)
    seen.check()
""",
)
program(
    "zeus",
    "zeus-mcmc numpy",
    "`EnsembleSampler(pool=)`",
    "`Pool`",
    SAMPLED
    + """
import zeus

if __name__ == "__main__":
    with forkshm.Pool(2) as pool:
        sampler = zeus.EnsembleSampler(8, 2, log_probability, pool=pool, verbose=False)
        sampler.run_mcmc(np.random.default_rng(1).normal(size=(8, 2)), 5, progress=False)
    assert sampler.get_chain().shape == (5, 8, 2)
    seen.check()
""",
)
program(
    "lmfit",
    "lmfit emcee numpy",
    "`Minimizer.emcee(workers=)`",
    "`Pool`",
    FUNCTION
    + """
import lmfit

def residual(params):
    seen()
    return np.array([params["a"] - 1.0, params["b"] - 2.0])

if __name__ == "__main__":
    params = lmfit.create_params(a={"value": 0.5, "min": -5, "max": 5}, b={"value": 0.5, "min": -5, "max": 5})
    with forkshm.Pool(2) as pool:
        result = lmfit.Minimizer(residual, params).emcee(nwalkers=8, steps=10, burn=0, workers=pool, progress=False)
    assert result.chain.shape[0] in (8, 10)
    seen.check(also_here=True)
""",
)
program(
    "dynesty",
    "dynesty numpy",
    "`NestedSampler(pool=)` without `queue_size`",
    "`Pool`",
    SAMPLED
    + """
import dynesty

def prior(unit):
    return 6 * unit - 3

if __name__ == "__main__":
    with forkshm.Pool(2) as pool:
        sampler = dynesty.NestedSampler(log_probability, prior, 2, pool=pool, nlive=30, rstate=np.random.default_rng(1))
        sampler.run_nested(maxiter=30, print_progress=False)
    assert len(sampler.results.samples) > 30
    seen.check()
""",
)
for kind in ("Pool", "Executor"):
    program(
        f"nautilus {kind}",
        "nautilus-sampler numpy",
        "`Sampler(pool=)`",
        f"`{kind}`",
        SAMPLED
        + f"""
import nautilus

def prior(unit):
    return 6 * unit - 3

if __name__ == "__main__":
    with forkshm.{kind}(2) as pool:
        sampler = nautilus.Sampler(prior, log_probability, n_dim=2, n_live=100, pool=pool, seed=1, n_networks=0)
        sampler.run(verbose=False, n_like_max=400)
    assert sampler.n_like >= 400
    seen.check()
""",
    )
program(
    "pyabc",
    "pyabc numpy",
    "`ConcurrentFutureSampler(cfuture_executor=)`",
    "`Executor`",
    """
import pyabc, tempfile

def model(parameters):
    seen()
    return {"y": parameters["mean"]}

def distance(x, y):
    return abs(x["y"] - y["y"])

if __name__ == "__main__":
    with forkshm.Executor(2) as executor:
        sampler = pyabc.sampler.ConcurrentFutureSampler(executor)
        abc = pyabc.ABCSMC(model, pyabc.Distribution(mean=pyabc.RV("uniform", 0, 2)), distance, population_size=10,
                           sampler=sampler)
        abc.new("sqlite:///" + tempfile.mkstemp()[1], {"y": 1.0})
        history = abc.run(max_nr_populations=2)
    assert history.n_populations == 2
    seen.check()
""",
)
program(
    "nevergrad",
    "nevergrad numpy",
    "`optimizer.minimize(executor=)`",
    "`Executor`",
    FUNCTION
    + """
import nevergrad

if __name__ == "__main__":
    optimizer = nevergrad.optimizers.OnePlusOne(parametrization=2, budget=40, num_workers=2)
    with forkshm.Executor(2) as executor:
        found = optimizer.minimize(parabola, executor=executor, batch_mode=False)
    assert found.value.shape == (2,)
    seen.check()
""",
)
program(
    "optuna",
    "optuna",
    "`study.ask` and `study.tell` around `map`",
    "`Executor.map`",
    """
import optuna

def parabola(x):
    seen()
    return (x - 1.0) ** 2

if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    with forkshm.Executor(2) as executor:
        for _ in range(5):
            trials = [study.ask() for _ in range(4)]
            values = executor.map(parabola, [trial.suggest_float("x", -3, 3) for trial in trials])
            for trial, value in zip(trials, values):
                study.tell(trial, value)
    assert len(study.trials) == 20 and study.best_value < 1
    seen.check()
""",
)
program(
    "pymoo",
    "pymoo numpy",
    "`StarmapParallelization`",
    "`Pool.starmap`",
    FUNCTION
    + """
from pymoo.algorithms.soo.nonconvex.ga import GA
from pymoo.core.problem import ElementwiseProblem
from pymoo.optimize import minimize
try:
    from pymoo.parallelization.starmap import StarmapParallelization
except ImportError:
    from pymoo.core.problem import StarmapParallelization

class Problem(ElementwiseProblem):
    def __init__(self, **options):
        super().__init__(n_var=2, n_obj=1, xl=-3, xu=3, **options)

    def _evaluate(self, x, out, *args, **kwargs):
        out["F"] = parabola(x)

if __name__ == "__main__":
    with forkshm.Pool(2) as pool:
        found = minimize(Problem(elementwise_runner=StarmapParallelization(pool.starmap)), GA(pop_size=20),
                         ("n_gen", 5), seed=1)
    assert found.F[0] < 1
    seen.check()
""",
)
program(
    "DEAP",
    "deap",
    '`toolbox.register("map", ...)`',
    "`Pool.map`",
    """
import random
from deap import algorithms, base, creator, tools

creator.create("Fitness", base.Fitness, weights=(1.0,))
creator.create("Individual", list, fitness=creator.Fitness)

def ones(individual):
    seen()
    return (sum(individual),)

if __name__ == "__main__":
    random.seed(1)
    toolbox = base.Toolbox()
    toolbox.register("bit", random.randint, 0, 1)
    toolbox.register("individual", tools.initRepeat, creator.Individual, toolbox.bit, 20)
    toolbox.register("population", tools.initRepeat, list, toolbox.individual)
    toolbox.register("evaluate", ones)
    toolbox.register("mate", tools.cxTwoPoint)
    toolbox.register("mutate", tools.mutFlipBit, indpb=0.05)
    toolbox.register("select", tools.selTournament, tournsize=3)
    with forkshm.Pool(2) as pool:
        toolbox.register("map", pool.map)
        population, _ = algorithms.eaSimple(toolbox.population(20), toolbox, 0.5, 0.2, 5, verbose=False)
    assert max(ones(one)[0] for one in population) > 12
""",
)
program(
    "cma",
    "cma numpy",
    "`ask` and `tell` around `map`",
    "`Pool.map`",
    FUNCTION
    + """
import cma

if __name__ == "__main__":
    strategy = cma.CMAEvolutionStrategy([0.0, 0.0], 0.5, {"seed": 1, "verbose": -9})
    with forkshm.Pool(2) as pool:
        for _ in range(30):
            points = strategy.ask()
            strategy.tell(points, pool.map(parabola, points))
    assert strategy.result.fbest < 0.1
    seen.check()
""",
)
program(
    "adaptive",
    "adaptive",
    "`BlockingRunner(executor=)`",
    "`Executor`",
    """
import adaptive

def line(x):
    seen()
    return 2 * x

if __name__ == "__main__":
    learner = adaptive.Learner1D(line, bounds=(0, 1))
    with forkshm.Executor(2) as executor:
        adaptive.BlockingRunner(learner, npoints_goal=12, executor=executor)
    assert all(value == 2 * x for x, value in learner.data.items()) and len(learner.data) >= 12
    seen.check()
""",
)

# -- joblib, scikit-learn, pandas, Dask --------------------------------------------------------------

program(
    "joblib",
    "joblib",
    '`Parallel(backend="forkshm")`',
    "`forkshm.joblib`",
    """
import forkshm.joblib
from joblib import Parallel, delayed

def square(x):
    seen()
    return x * x

if __name__ == "__main__":
    assert Parallel(n_jobs=2, backend="forkshm")(delayed(square)(x) for x in range(8)) == [x * x for x in range(8)]
    seen.check()
""",
    quick=True,
)
program(
    "scikit-learn",
    "scikit-learn joblib numpy",
    "`GridSearchCV`, `RandomForestClassifier`, `cross_val_score`",
    "`forkshm.joblib`",
    """
import joblib, forkshm.joblib
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.svm import SVC

class Watched(SVC):
    def fit(self, *args, **kwargs):
        seen()
        return super().fit(*args, **kwargs)

if __name__ == "__main__":
    x, y = load_iris(return_X_y=True)
    with joblib.parallel_config("forkshm", n_jobs=2):
        search = GridSearchCV(Watched(), {"C": [0.1, 1]}, cv=2, refit=False).fit(x, y)
        assert search.best_score_ > 0.9
        assert RandomForestClassifier(8, random_state=1).fit(x, y).score(x, y) > 0.9
        assert cross_val_score(Watched(), x, y, cv=2).min() > 0.9
    seen.check()
""",
)
program(
    "pandas apply",
    "pandas numpy",
    "`DataFrame.apply(engine=)`, `Series.map(engine=)`",
    "`forkshm.pandas.Engine`",
    """
import pandas as pd
import forkshm.pandas

def total(row):
    seen()
    return row["a"] + row["b"]

def double(x):
    seen()
    return 2 * x

if __name__ == "__main__":
    frame = pd.DataFrame({"a": range(20), "b": range(20)})
    engine = forkshm.pandas.Engine(workers=2)
    assert frame.apply(total, axis=1, engine=engine).tolist() == [2 * x for x in range(20)]
    assert frame["a"].map(double, engine=engine).tolist() == [2 * x for x in range(20)]
    seen.check()
""",
)
DASK = """
import dask, dask.bag

def square(x):
    seen()
    return x * x

if __name__ == "__main__":
"""
program(
    "dask Executor",
    "dask",
    "`dask.config.set(scheduler=)`",
    "`Executor`",
    DASK
    + """
    with forkshm.Executor(2) as executor, dask.config.set(scheduler=executor):
        assert sorted(dask.bag.from_sequence(range(8), npartitions=4).map(square)) == [x * x for x in range(8)]
    seen.check()
""",
)
program(
    "dask Pool",
    "dask",
    '`scheduler="processes", pool=`',
    "`Pool`",
    DASK
    + """
    with forkshm.Pool(2) as pool, dask.config.set(scheduler="processes", pool=pool):
        assert sorted(dask.bag.from_sequence(range(8), npartitions=4).map(square)) == [x * x for x in range(8)]
    seen.check()
""",
)
program(
    "distributed",
    "distributed numpy",
    "`forkshm.Executor(cluster=client)` on two local nodes",
    "`Executor(cluster=)`",
    """
import numpy as np

def total(array, x):
    seen()
    return float(array.sum()) + x

if __name__ == "__main__":
    import distributed
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster, \\
            distributed.Client(cluster) as client, forkshm.Executor(2, cluster=client) as executor:
        array = np.ones(200_000)
        assert [executor.submit(total, array, x).result() for x in range(4)] == [200_000.0 + x for x in range(4)]
    seen.check()
""",
)

# -- programs with pools of their own -------------------------------------------------------------------

program(
    "tqdm",
    "tqdm",
    "`process_map`",
    "`forkshm.patch()`",
    """
import tqdm.contrib.concurrent

def square(x):
    seen()
    return x * x

if __name__ == "__main__":
    with forkshm.patched():
        got = tqdm.contrib.concurrent.process_map(square, range(8), max_workers=2, chunksize=2, disable=True)
    assert got == [x * x for x in range(8)]
    seen.check()
""",
)
program(
    "schwimmbad",
    "schwimmbad",
    "`MultiPool`",
    "`forkshm.patch()`",
    """
forkshm.patch()
import schwimmbad

def square(x):
    seen()
    import multiprocess
    return x * x, type(multiprocess.current_process()).__module__

if __name__ == "__main__":
    with schwimmbad.MultiPool(2) as pool:
        assert set(pool.map(square, range(8))) == {(x * x, "forkshm.processes") for x in range(8)}
    seen.check()
""",
)
program(
    "pathos",
    "pathos",
    "`ProcessPool.map`",
    "`forkshm.patch()`",
    """
forkshm.patch()
import pathos.pools

def square(x):
    seen()
    import multiprocess
    return x * x, type(multiprocess.current_process()).__module__

if __name__ == "__main__":
    pool = pathos.pools.ProcessPool(2)
    assert set(pool.map(square, range(8))) == {(x * x, "forkshm.processes") for x in range(8)}
    pool.close()
    pool.join()
    pool.clear()
    seen.check()
""",
)
program(
    "SALib",
    "SALib numpy",
    "`ProblemSpec.evaluate(nprocs=)`",
    "`forkshm.patch()`",
    """
import numpy as np
forkshm.patch()
from SALib import ProblemSpec

def model(points):
    seen()
    import multiprocess
    assert type(multiprocess.current_process()).__module__ == "forkshm.processes"
    return points.sum(axis=1)

if __name__ == "__main__":
    spec = ProblemSpec({"names": ["a", "b"], "bounds": [[0, 1], [0, 1]], "outputs": ["y"]})
    spec.sample_latin(16).evaluate(model, nprocs=2)
    assert np.allclose(spec.results, spec.samples.sum(axis=1))
    seen.check()
""",
)
program(
    "datasets",
    "datasets",
    "`Dataset.map(num_proc=)`",
    "`forkshm.patch()`",
    """
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = os.getcwd()
forkshm.patch()
import datasets

def double(row):
    seen()
    import multiprocess
    return {"kind": type(multiprocess.current_process()).__module__, "twice": row["x"] * 2}

if __name__ == "__main__":
    got = datasets.Dataset.from_dict({"x": list(range(20))}).map(double, num_proc=2)
    assert got["twice"][:] == [2 * x for x in range(20)] and set(got["kind"]) == {"forkshm.processes"}
    seen.check()
""",
)
program(
    "qutip",
    "qutip",
    "`parallel_map`",
    "`forkshm.patch()`",
    """
forkshm.patch()
import qutip

def square(x):
    seen()
    return x * x

if __name__ == "__main__":
    assert qutip.parallel_map(square, list(range(8)), map_kw={"num_cpus": 2}) == [x * x for x in range(8)]
    seen.check()
""",
)
program(
    "torch DataLoader",
    "torch numpy",
    "`DataLoader(multiprocessing_context=)`",
    "`get_context()`",
    """
import torch

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        seen()
        return torch.full((1000,), float(index))

if __name__ == "__main__":
    loader = torch.utils.data.DataLoader(Rows(), batch_size=2, num_workers=2,
                                         multiprocessing_context=forkshm.get_context("fork"))
    assert sorted(float(x) for batch in loader for x in batch[:, 0]) == [float(x) for x in range(8)]
    seen.check()
""",
)
program(
    "torch tensors",
    "torch numpy",
    "a tensor after `share_memory_()` as argument",
    "`Pool`",
    """
import torch

def fill(tensor):
    seen()
    tensor += 1

if __name__ == "__main__":
    tensor = torch.zeros(100_000).share_memory_()
    with forkshm.Pool(2) as pool, forkshm.assert_zero_copy():
        pool.apply(fill, (tensor,))
    assert float(tensor.sum()) == 100_000
    seen.check()
""",
)
program(
    "pytest-xdist",
    "pytest-xdist pytest numpy",
    "`@shared_fixture` with three workers",
    "`forkshm.pytest`",
    """
import pathlib, subprocess

CONFTEST = '''
import pathlib
import numpy as np
from forkshm.pytest import shared_fixture

@shared_fixture
def table():
    with pathlib.Path(__file__).with_name("made").open("a") as file:
        file.write("made ")
    yield np.ones(100_000)
    with pathlib.Path(__file__).with_name("made").open("a") as file:
        file.write("done ")
'''
TESTS = '''
import pytest

@pytest.mark.parametrize("number", range(12))
def test_table(table, number):
    assert table.sum() == 100_000
'''

if __name__ == "__main__":
    pathlib.Path("conftest.py").write_text(CONFTEST)
    pathlib.Path("test_it.py").write_text(TESTS)
    pathlib.Path("pytest.ini").write_text("[pytest]\\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "forkshm.pytest", "-n", "3"]
    subprocess.run(command, check=True, timeout=200)
    assert pathlib.Path("made").read_text() == "made done "
""",
)
program(
    "mpi4py",
    "mpi4py mpich",
    "a pool inside each rank",
    "`Pool`",
    """
import pathlib, subprocess

RANK = '''
import os
import forkshm

def square(x):
    return os.getpid(), x * x

if __name__ == "__main__":
    from mpi4py import MPI
    comm = MPI.COMM_WORLD
    with forkshm.get_context("forkserver").Pool(2) as pool:
        got = pool.map(square, range(comm.rank, 8, comm.size))
    assert os.getpid() not in {pid for pid, _ in got}
    every = comm.gather([value for _, value in got])
    if comm.rank == 0:
        assert sorted(sum(every, [])) == [x * x for x in range(8)]
'''

if __name__ == "__main__":
    pathlib.Path("rank.py").write_text(RANK)
    mpiexec = pathlib.Path(sys.executable).with_name("mpiexec")
    subprocess.run([mpiexec, "-n", "2", sys.executable, "rank.py"], check=True, timeout=200)
""",
)
program(
    "ray",
    "ray numpy",
    "a pool inside an actor",
    "`Pool`",
    """
import numpy as np

def total(array, x):
    seen()
    return float(array.sum()) + x

if __name__ == "__main__":
    import ray

    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")

    @ray.remote
    class Node:
        def __init__(self):
            self.array = forkshm.ones(100_000)
            self.pool = forkshm.get_context("forkserver").Pool(2)

        def totals(self, xs):
            return self.pool.starmap(total, [(self.array, x) for x in xs])

    node = Node.remote()
    assert ray.get(node.totals.remote([1, 2])) == [100_001.0, 100_002.0]
    ray.shutdown()
""",
)
program(
    "concurrent.futures",
    "pip",
    "`loop.run_in_executor` of asyncio",
    "`Executor`",
    """
import asyncio

def square(x):
    seen()
    return x * x

async def main():
    loop = asyncio.get_running_loop()
    with forkshm.Executor(2) as executor:
        assert await asyncio.gather(*[loop.run_in_executor(executor, square, x) for x in range(8)]) == \\
            [x * x for x in range(8)]

if __name__ == "__main__":
    asyncio.run(main())
    seen.check()
""",
    quick=True,
)


def missing(found: Program) -> list[str]:
    """Return the distributions that the program needs but that are not installed."""
    absent = []
    for name in found.needs:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            absent.append(name)
    return absent


def run(found: Program) -> str:
    """Return "passed", or the way in which the program failed."""
    # numba and matplotlib keep their caches in the folder.
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "program.py")
        path.write_text(found.source)
        environment = {**os.environ, "MPLCONFIGDIR": folder, "PYTHONWARNINGS": "ignore"}
        try:
            done = subprocess.run(
                [sys.executable, str(path)], cwd=folder, env=environment, capture_output=True, text=True,
                timeout=SECONDS, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"no end after {SECONDS} seconds"
    if done.returncode == 0:
        return "passed"
    said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
    return said[-1].strip()[:200]


def library_of(found: Program) -> str:
    """Return the name of the library in the table."""
    return "CPython" if found.needs[0] == "pip" else found.needs[0]


def row(name: str) -> str:
    """Run a program, and return its row of the table."""
    found = PROGRAMS[name]
    library = library_of(found)
    if library == "CPython":
        version = ".".join(map(str, sys.version_info[:3]))
    else:
        version = importlib.metadata.version(found.needs[0]).partition("+")[0]
    return f"| {library} {version} | {found.job} | {found.takes} | {run(found).replace('|', '/')} |"


def rows_of(text: str) -> dict[tuple[str, ...], str]:
    """Return the rows of a table, keyed by library, job and the object of forkshm."""
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("| \n").split(" | ")]
        if len(cells) == 4 and not cells[0].startswith(("Library", "---")):
            found[(re.sub(r" [\d.]+\w*$", "", cells[0]), cells[1], cells[2])] = line
    return found


def main() -> None:
    arguments = sys.argv[1:]
    write = arguments[:1] == ["--write"]
    chosen = arguments[write:] or list(PROGRAMS)
    before = rows_of(FILE.read_text()) if FILE.exists() else {}
    lines = ["<!-- Generated: python docs/make_compatibility.py --write -->", ""]
    lines += ["| Library | Smallest real job | Through | Result |", "| --- | --- | --- | --- |"]
    for name, found in PROGRAMS.items():
        known = before.get((library_of(found), found.job, found.takes))
        if name in chosen and not missing(found):
            lines.append(row(name))
            print(lines[-1], flush=True)
        elif known is not None:
            lines.append(known)
    if write:
        FILE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
