"""The joblib backend: joblib.Parallel and scikit-learn with forkshm's workers."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings

import pytest

joblib = pytest.importorskip("joblib")
np = pytest.importorskip("numpy")

from joblib import Parallel, delayed  # noqa: E402

import forkshm  # noqa: E402
import forkshm.joblib  # noqa: E402
from forkshm.errors import WorkerDiedError  # noqa: E402
from forkshm.integrations.joblib import _warm  # noqa: E402

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="starts workers by fork")


def parallel(**options):
    return Parallel(backend="forkshm", **{"n_jobs": 2, **options})


@pytest.fixture(autouse=True)
def no_workers_are_left():
    yield
    forkshm.joblib.shutdown()


def warm_pool():
    return _warm[0][1].pool


def fill_and_sum(array, value):
    array[0] = value
    return float(array.sum())


def fail(x):
    if x == 3:
        raise ValueError(f"bad {x}")
    return x


def use_threads(x):
    return Parallel(n_jobs=2)(delayed(pow)(x, power) for power in (1, 2)) if x else [0, 0]


def test_answers_in_order():
    assert parallel()(delayed(pow)(x, 2) for x in range(500)) == [x * x for x in range(500)]


def test_runs_in_other_processes_that_stay():
    first = set(parallel()(delayed(os.getpid)() for _ in range(20)))
    again = set(parallel()(delayed(os.getpid)() for _ in range(20)))
    assert os.getpid() not in first | again
    assert len(first | again) <= 2


def test_an_initializer_runs_once_while_the_workers_stay(tmp_path):
    path = tmp_path / "started"

    def note(text):
        with path.open("a") as file:
            file.write(text)

    for _ in range(3):
        parallel(initializer=note, initargs=("x",))(delayed(time.sleep)(0.01) for _ in range(4))
    assert path.read_text() == "xx"


@pytest.mark.parametrize("return_as", ["generator", "generator_unordered"])
def test_generators(return_as):
    results = parallel(return_as=return_as)(delayed(pow)(x, 2) for x in range(30))
    assert sorted(results) == [x * x for x in range(30)]


def test_generators_of_one_backend_side_by_side():
    with joblib.parallel_config("forkshm", n_jobs=2):
        first = Parallel(return_as="generator")(delayed(pow)(x, 2) for x in range(20))
        second = Parallel(return_as="generator")(delayed(pow)(x, 3) for x in range(20))
        assert list(zip(first, second, strict=True)) == [(x**2, x**3) for x in range(20)]


@pytest.mark.filterwarnings("ignore:.*tasks")
def test_a_generator_that_is_dropped_ends_its_calls_only():
    with joblib.parallel_config("forkshm", n_jobs=2):
        dropped = Parallel(return_as="generator")(delayed(time.sleep)(60) for _ in range(4))
        began = time.monotonic()
        del dropped
        gc.collect()
        assert Parallel()(delayed(abs)(-x) for x in range(5)) == [0, 1, 2, 3, 4]
        assert time.monotonic() - began < 20


def test_an_exception_is_raised_with_the_workers_traceback():
    with pytest.raises(ValueError, match="bad 3") as raised:
        parallel()(delayed(fail)(x) for x in range(10))
    assert "in fail" in str(raised.value.__cause__)
    assert parallel()(delayed(fail)(x) for x in range(3)) == [0, 1, 2]


def test_an_unpicklable_call_raises():
    lock = threading.Lock()
    with pytest.raises(pickle.PicklingError, match="cannot pickle the task to send to the workers") as raised:
        parallel()(delayed(id)(lock) for _ in range(3))
    assert isinstance(raised.value.__cause__, TypeError)
    assert "(args[0]: _thread.lock)" in str(raised.value)
    with pytest.raises(pickle.PicklingError, match=r"\(call 2 of 2: kwargs\['key'\]: _thread.lock\)"):
        parallel(batch_size=2)(delayed(max)(1, 2, key=lock if x == 1 else None) for x in range(4))
    # Also from a callback, where joblib itself would wait forever.
    with pytest.raises(pickle.PicklingError, match="cannot pickle"):
        parallel(pre_dispatch=2, batch_size=1)(delayed(id)(lock if x > 5 else x) for x in range(10))


def test_a_killed_worker_fails_its_task_and_the_next_call_works():
    with parallel() as workers:
        with pytest.raises(WorkerDiedError, match=r"SIGKILL while running _killed_if\("):
            workers(delayed(_killed_if)(x == 3) for x in range(6))
        assert workers(delayed(abs)(-x) for x in range(5)) == [0, 1, 2, 3, 4]


def _killed_if(condition):
    if condition:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_failed_call_leaves_no_batches_to_the_next(tmp_path):
    with parallel(batch_size=1, pre_dispatch=2) as workers:
        # When call 0 is done, joblib prepares calls 2 and 3 together and submits call 2, for which call 1 waits.
        with pytest.raises(ValueError, match="call 1"):
            workers(delayed(_one_after_the_other)(x, tmp_path) for x in range(4))
        assert workers(delayed(abs)(-x) for x in range(5)) == [0, 1, 2, 3, 4]


def _one_after_the_other(x, folder):
    (folder / f"{x}").touch()
    while x < 3 and not (folder / f"{x + 1}").exists():
        time.sleep(0.001)
    if x == 1:
        raise ValueError("call 1")


def test_a_call_that_is_dropped_while_it_reads_leaves_no_batches_to_the_next(tmp_path):
    reads, go_on = threading.Event(), threading.Event()

    def calls():
        for x in range(12):
            if x == 4:  # read by the callback of call 2 or 3, which prepares calls 4 and 5 together
                reads.set()
                go_on.wait(60)
            yield delayed(_after)(x, tmp_path / "go")

    with warnings.catch_warnings(), parallel(return_as="generator", batch_size=1, pre_dispatch=2) as workers:
        warnings.simplefilter("ignore", UserWarning)
        generator = workers(calls())
        assert next(generator) == 0
        (tmp_path / "go").touch()
        assert reads.wait(60)
        generator.close()
        threading.Timer(0.1, go_on.set).start()
        assert list(workers(delayed(abs)(-x) for x in range(5))) == [0, 1, 2, 3, 4]


def _after(x, path):
    while x > 1 and not path.exists():
        time.sleep(0.001)
    return x


@pytest.mark.parametrize("at", [0, 1, 5])
@pytest.mark.parametrize("return_as", ["list", "generator", "generator_unordered"])
def test_an_exception_of_the_callers_iterator_is_raised(return_as, at):
    def calls():
        for x in range(20):
            if x == at:
                raise ValueError(f"item {x}")
            yield delayed(abs)(x)

    for options in ({}, {"pre_dispatch": "all", "batch_size": 4}):
        with parallel(return_as=return_as, **options) as workers:
            with pytest.raises(ValueError, match=f"item {at}"):
                list(workers(calls()))
            assert sorted(workers(delayed(abs)(x) for x in range(5))) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("return_as", ["list", "generator_unordered"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_exit_of_the_callers_iterator_ends_the_call(kind, return_as):
    def calls():
        for x in range(20):
            if x == 8:
                raise kind(f"item {x}")
            yield delayed(abs)(x)

    with parallel(return_as=return_as, batch_size=1, pre_dispatch=2) as workers:
        with pytest.raises(kind, match="item 8"):
            list(workers(calls()))
        assert sorted(workers(delayed(abs)(x) for x in range(5))) == [0, 1, 2, 3, 4]


def test_a_progress_method_that_raises_ends_the_call():
    class Shown(Parallel):
        def print_progress(self):
            raise RuntimeError("cannot print")

    with pytest.raises(RuntimeError, match="cannot print"):
        Shown(n_jobs=2, backend="forkshm", batch_size=1)(delayed(abs)(x) for x in range(20))


def test_objects_of_one_config_have_their_own_workers(capsys, monkeypatch):
    monkeypatch.setattr(pytest.importorskip("tqdm").tqdm, "monitor_interval", 0)  # otherwise tqdm keeps a thread
    with joblib.parallel_config("forkshm", n_jobs=2, progress=True), Parallel() as first:
        with Parallel(n_jobs=3) as second:
            assert first(delayed(abs)(x) for x in [4, 5]) == [4, 5]
            assert second([delayed(abs)(x) for x in range(6)]) == list(range(6))
        assert Parallel()([delayed(abs)(x) for x in range(7)]) == list(range(7))
        assert first([delayed(abs)(x) for x in range(8)]) == list(range(8))
    shown = capsys.readouterr().err
    assert "6/6" in shown
    assert "7/7" in shown
    assert "8/8" in shown


def test_a_call_after_shutdown_starts_workers():
    with parallel() as workers:
        assert workers(delayed(abs)(x) for x in range(3)) == [0, 1, 2]
        forkshm.joblib.shutdown()
        assert workers(delayed(abs)(x) for x in range(3)) == [0, 1, 2]


def test_timeout_spares_other_calls():
    answers = []
    other = threading.Thread(target=lambda: answers.extend(parallel()(delayed(_slow)(x) for x in range(6))))
    other.start()
    with pytest.raises(joblib.parallel.TimeoutError):
        parallel(timeout=0.2)(delayed(time.sleep)(60) for _ in range(1))
    other.join(60)
    assert answers == [0, 1, 2, 3, 4, 5]


def _slow(x):
    time.sleep(0.1)
    return x


def test_arrays_arrive_writable_and_are_copied_once():
    table = np.ones(500_000)
    parallel()(delayed(abs)(x) for x in range(3))
    before = warm_pool().statistics()
    got = parallel(max_nbytes=1, mmap_mode="r", temp_folder="/nonexistent", batch_size=1)(
        delayed(fill_and_sum)(table, x) for x in range(12)
    )
    assert got == [499_999.0 + x for x in range(12)]
    assert (table == 1).all()
    after = warm_pool().statistics()
    copied = after.bytes_copied - before.bytes_copied
    assert table.nbytes <= copied < 2 * table.nbytes


def test_an_array_inside_objects_is_copied_once():
    class Model:
        def __init__(self, table):
            self.table = table

        def total(self, x):
            return float(self.table.sum()) + x

    models = [Model(np.ones(500_000))]
    models.append(Model(models[0].table))
    parallel()(delayed(abs)(x) for x in range(3))
    before = warm_pool().statistics().bytes_copied
    got = parallel(batch_size=1)(delayed(models[x % 2].total)(x) for x in range(10))
    assert got == [500_000.0 + x for x in range(10)]
    assert warm_pool().statistics().bytes_copied - before < 2 * models[0].table.nbytes


def test_an_array_that_was_written_is_copied_again():
    from forkshm.pickler import RecentCopies, pack

    array, copies = np.zeros(200_000), RecentCopies()
    copied = []
    for write in (False, False, True, False):
        if write:
            array[7] = 1
        payload = pack((array,), repeats=copies)
        copied.append(payload.copied)
        payload.close()
    assert copied == [array.nbytes, 0, array.nbytes, 0]


def test_a_copy_that_is_of_no_more_use_is_dropped():
    from forkshm.pickler import RecentCopies, pack

    copies = RecentCopies(spare=2)
    for _ in range(10):
        copies.next_payload()
        pack((np.zeros(200_000),), repeats=copies).close()
        assert len(copies._copies) <= 3


def test_memory_that_was_freed_between_calls_is_no_stale_copy():
    def calls():
        for x in range(20):
            yield delayed(np.sum)(np.full(200_000, float(x)))

    assert parallel(batch_size=1)(calls()) == [x * 200_000.0 for x in range(20)]


def test_copies_are_gone_with_the_call():
    from forkshm.pickler import RecentCopies

    table = np.ones(500_000)
    parallel()(delayed(np.sum)(table) for _ in range(4))
    gc.collect()
    kept = [copies for copies in gc.get_objects() if isinstance(copies, RecentCopies) and copies._copies]
    assert kept == []


def test_shared_arrays_arrive_as_themselves():
    table = forkshm.zeros(1000)
    parallel()(delayed(fill_and_sum)(table, 5) for _ in range(4))
    assert table[0] == 5


def test_inner_threads():
    def variables():
        return os.environ["OMP_NUM_THREADS"], os.environ["OPENBLAS_NUM_THREADS"]

    with joblib.parallel_config("forkshm", n_jobs=2, inner_max_num_threads=3):
        assert set(Parallel()(delayed(variables)() for _ in range(4))) == {("3", "3")}


def test_blas_is_limited_in_the_workers():
    threadpoolctl = pytest.importorskip("threadpoolctl")

    def threads():
        return max((library["num_threads"] for library in threadpoolctl.threadpool_info()), default=1)

    with joblib.parallel_config("forkshm", n_jobs=2, inner_max_num_threads=1):
        assert set(Parallel()(delayed(threads)() for _ in range(4))) == {1}


def test_nested_calls_run_in_threads_of_the_worker():
    def outer(x):
        return os.getpid(), Parallel(n_jobs=2)(delayed(os.getpid)() for _ in range(2))

    for mine, inner in parallel()(delayed(outer)(x) for x in range(4)):
        assert set(inner) == {mine}


def test_nested_calls_of_other_process_backends_use_one_worker():
    def nested(backend):
        with pytest.warns(UserWarning, match="setting n_jobs=1"):
            return set(Parallel(n_jobs=2, backend=backend)(delayed(os.getpid)() for _ in range(4))) == {os.getpid()}

    calls = [delayed(nested)(backend) for backend in ("loky", "multiprocessing")]
    assert all(Parallel(n_jobs=2, backend="forkshm")(calls))


def test_nested_calls_that_ask_for_processes_get_some():
    def outer(x):
        return os.getpid(), Parallel(n_jobs=2, backend="forkshm")(delayed(os.getpid)() for _ in range(4))

    for mine, inner in parallel()(delayed(outer)(x) for x in range(2)):
        assert mine not in inner


@pytest.mark.parametrize("pre_dispatch", ["1", "all"])
def test_the_input_of_a_call_may_make_calls(pre_dispatch):
    def batches():
        for x in range(6):
            yield delayed(abs)(sum(parallel()(delayed(abs)(-y) for y in range(x))))

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        # The thread that receives results reads the rest of the input, so calls that it makes get no results.
        assert parallel(pre_dispatch=pre_dispatch, batch_size=1)(batches()) == [0, 0, 1, 3, 6, 10]
    assert any("is made by the input of another one" in str(warning.message) for warning in seen) == (
        pre_dispatch == "1"
    )


def test_a_call_in_a_thread_of_another_call_uses_one_job_and_warns():
    def inner():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pids = Parallel(n_jobs=2, backend="forkshm")(delayed(os.getpid)() for _ in range(2))
        return set(pids), [str(warning.message) for warning in caught]

    for pids, said in Parallel(n_jobs=2, backend="threading", batch_size=1)(delayed(inner)() for _ in range(1)):
        assert pids == {os.getpid()}
        assert "n_jobs=2 is ignored" in said[0]


def test_prefer_and_require():
    with joblib.parallel_config("forkshm", n_jobs=2):
        assert os.getpid() not in Parallel(prefer="processes")(delayed(os.getpid)() for _ in range(4))
        assert set(Parallel(require="sharedmem")(delayed(os.getpid)() for _ in range(4))) == {os.getpid()}


def test_one_job_needs_no_worker_and_zero_is_an_error():
    assert parallel(n_jobs=1)(delayed(os.getpid)() for _ in range(2)) == [os.getpid()] * 2
    with pytest.raises(ValueError, match="n_jobs == 0"):
        parallel(n_jobs=0)(delayed(os.getpid)() for _ in range(2))


def test_all_cores_by_default():
    with joblib.parallel_config("forkshm"):
        assert joblib.effective_n_jobs() in (1, joblib.cpu_count())
        assert Parallel()._backend.default_n_jobs == -1


def test_unknown_options_are_ignored_with_one_warning(recwarn):
    with joblib.parallel_config("forkshm", colour="red", n_jobs=2):
        assert Parallel()(delayed(abs)(-x) for x in range(3)) == [0, 1, 2]
    workers = parallel(colour="red")
    assert workers(delayed(abs)(-x) for x in range(3)) == [0, 1, 2]
    assert workers(delayed(use_threads)(x) for x in range(2)) == [[0, 0], [1, 1]]
    # Some Pythons also warn of forks beside threads.
    ours = [warning for warning in recwarn if warning.category is forkshm.ForkshmWarning]
    assert [warning.filename for warning in ours] == [__file__] * 2
    assert "ignores 'colour', which it has no option for: use one of" in str(ours[0].message)


def test_progress(capsys, monkeypatch):
    monkeypatch.setattr(pytest.importorskip("tqdm").tqdm, "monitor_interval", 0)  # otherwise tqdm keeps a thread
    with joblib.parallel_config("forkshm", n_jobs=2, progress=True):
        Parallel()([delayed(abs)(x) for x in range(7)])
    assert "7/7" in capsys.readouterr().err


PROGRAM = """
import os, sys, time
import joblib, forkshm.joblib

def work(path):
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(60)

if __name__ == "__main__":
    try:
        joblib.Parallel(n_jobs=2, backend="forkshm")(joblib.delayed(work)(sys.argv[1]) for _ in range(4))
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        assert joblib.Parallel(n_jobs=2, backend="forkshm")(joblib.delayed(abs)(-x) for x in range(3)) == [0, 1, 2]
        print("again", flush=True)
"""


@pytest.mark.slow
def test_ctrl_c_ends_the_calls(tmp_path):
    program, path = tmp_path / "program.py", tmp_path / "pids"
    program.write_text(PROGRAM)
    with subprocess.Popen([sys.executable, program, path], stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not path.exists() or len(path.read_text().split()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[0].split() == ["interrupted", "again"]
    for pid in path.read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_other_start_methods(tmp_path, method):
    program = tmp_path / "program.py"
    program.write_text(
        "import joblib, forkshm.joblib\n"
        "if __name__ == '__main__':\n"
        f"    with joblib.parallel_config('forkshm', n_jobs=2, start_method={method!r}):\n"
        "        print(joblib.Parallel()(joblib.delayed(pow)(x, 2) for x in range(4)))\n"
    )
    got = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=100, check=False)
    assert (got.stdout.strip(), got.returncode) == ("[0, 1, 4, 9]", 0), got.stderr


@pytest.mark.slow
class TestScikitLearn:
    @pytest.fixture
    def data(self):
        pytest.importorskip("sklearn")
        from sklearn.datasets import make_classification

        return make_classification(3000, 60, random_state=0)  # more than 1 MiB

    def test_grid_search(self, data):
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        def best():
            pipeline = make_pipeline(StandardScaler(), LogisticRegression())
            search = GridSearchCV(pipeline, {"logisticregression__C": [0.01, 0.1, 1.0]}, cv=3).fit(*data)
            return search.cv_results_["mean_test_score"].tolist()

        with joblib.parallel_config("forkshm", n_jobs=2):
            ours = best()
        assert ours == pytest.approx(best())

    def test_cross_validation_of_a_parallel_estimator(self, data):
        from sklearn.ensemble import RandomForestClassifier
        from sklearn.model_selection import cross_val_score

        forest = RandomForestClassifier(5, random_state=0, n_jobs=2)
        with joblib.parallel_config("forkshm", n_jobs=2):
            ours = cross_val_score(forest, *data, cv=3).tolist()
            forest.fit(*data).predict(data[0])
        assert ours == pytest.approx(cross_val_score(forest, *data, cv=3).tolist())

    def test_openmp_that_was_used_before_does_not_hang_the_workers(self, data):
        from sklearn.cluster import KMeans

        def fit(seed):
            return float(KMeans(4, n_init=1, random_state=seed).fit(data[0]).inertia_)

        here = [fit(seed) for seed in range(2)]
        assert parallel(timeout=60)(delayed(fit)(seed) for seed in range(2)) == pytest.approx(here)
