"""Workers as the engine of pandas' apply and map give the same answers as pandas alone."""

from __future__ import annotations

import os
import signal

import pytest

np = pytest.importorskip("numpy")
pd = pytest.importorskip("pandas", minversion="3.0")

import forkshm  # noqa: E402
from forkshm.pandas import Engine  # noqa: E402

FRAME = pd.DataFrame(
    {"a": np.arange(50), "b": np.linspace(0, 1, 50), "k": list("xyzxy") * 10}, index=[f"row {i}" for i in range(50)]
)
NUMBERS = FRAME[["a", "b"]]


@pytest.fixture
def engine():
    with Engine(2) as made:
        yield made


@pytest.mark.parametrize(
    ("func", "options"),
    [
        (lambda row: row["a"] * 2.5, {"axis": 1}),
        (lambda row: row["k"] * int(row["a"] % 3), {"axis": 1}),
        (lambda row: pd.Series({"twice": row["a"] * 2, "key": row["k"]}), {"axis": 1}),
        (lambda row, more, less=0: row["b"] + more - less, {"axis": "columns", "args": (5,), "less": 1}),
        (lambda row: os.getpid() * 0, {"axis": 1}),
    ],
)
def test_rows(engine, func, options):
    got, expected = FRAME.apply(func, engine=engine, **options), FRAME.apply(func, **options)
    assert type(got) is type(expected)
    (pd.testing.assert_series_equal if isinstance(got, pd.Series) else pd.testing.assert_frame_equal)(got, expected)


@pytest.mark.parametrize("func", [lambda column: column.mean(), lambda column: column - column.min()])
def test_columns(engine, func):
    got, expected = NUMBERS.apply(func, engine=engine), NUMBERS.apply(func)
    (pd.testing.assert_series_equal if isinstance(got, pd.Series) else pd.testing.assert_frame_equal)(got, expected)


# What each function returns for the first rows has another type than what it returns for the rest.
MIXED = {
    "none, then integers": lambda n: None if n < 30 else n,
    "none, then text": lambda n: None if n < 30 else str(n),
    "missing, then text": lambda n: np.nan if n < 30 else str(n),
    "none, then times": lambda n: None if n < 30 else pd.Timestamp(2020, 1, 1),
    "integers, then larger ones": lambda n: int(n) if n < 30 else 2**63 + int(n),
    "integers, then floats": lambda n: n if n < 30 else n / 2,
    "truths, then integers": lambda n: True if n < 30 else n,
    "lists, then a series": lambda n: [n] if n < 30 else pd.Series({"x": n}),
}


@pytest.mark.parametrize("func", MIXED.values(), ids=MIXED)
def test_types_depend_on_all_results(engine, func):
    def row_of_two(row):
        return pd.Series({"x": func(row["a"]), "key": row["k"]})

    numbers, column = FRAME["a"], FRAME[["a"]]
    _check(numbers.map(func, engine=engine), numbers.map(func))
    for frame, axis in ((column, 1), (column.T, 0)):
        _check(*(frame.apply(lambda values: func(values.iloc[0]), axis=axis, engine=each) for each in (engine, None)))
    if not isinstance(func(0), list):
        _check(FRAME.apply(row_of_two, axis=1, engine=engine), FRAME.apply(row_of_two, axis=1))


def _check(got, expected):
    compare = pd.testing.assert_frame_equal if isinstance(expected, pd.DataFrame) else pd.testing.assert_series_equal
    compare(got, expected)


def test_a_function_may_return_its_row_and_columns_may_have_one_name(engine):
    frame = NUMBERS.set_axis(["a", "a"], axis=1)
    for func in (lambda row: row, lambda row: row.iloc[0] if row.iloc[0] < 30 else row):
        got, expected = frame.apply(func, axis=1, engine=engine), frame.apply(func, axis=1)
        assert type(got) is type(expected)
        assert got.equals(expected)


@pytest.mark.parametrize("values", [["u", "v", None] * 20, [[1], [2], [1]] * 20], ids=["text", "lists"])
def test_map_to_any_object(engine, values):
    series = pd.Series(values)
    for each in (series, series.astype("category")) if isinstance(values[0], str) else (series,):
        for na_action in (None, "ignore"):
            got = each.map(lambda value: [value], na_action=na_action, engine=engine)
            pd.testing.assert_series_equal(got, each.map(lambda value: [value], na_action=na_action))


def test_raw_text_is_not_cut(engine):
    def text(values):
        return "x" * int(values[0])

    got, expected = NUMBERS.apply(text, raw=True, axis=1, engine=engine), NUMBERS.apply(text, raw=True, axis=1)
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("func", [np.sum, lambda values: values * 2])
def test_raw(engine, func, axis):
    got = NUMBERS.apply(func, raw=True, axis=axis, engine=engine)
    expected = NUMBERS.apply(func, raw=True, axis=axis)
    (pd.testing.assert_series_equal if isinstance(got, pd.Series) else pd.testing.assert_frame_equal)(got, expected)


def test_series(engine):
    series = pd.Series([1.0, np.nan, 3.0] * 10, name="s")
    for options in ({}, {"na_action": "ignore"}):
        got = series.map(lambda x: x + 1 if x == x else -1, engine=engine, **options)
        pd.testing.assert_series_equal(got, series.map(lambda x: x + 1 if x == x else -1, **options))
    categories = pd.Series(["u", None, "v"], dtype="category")
    pd.testing.assert_series_equal(categories.map(lambda x: x, engine=engine), categories.map(lambda x: x))


def test_an_engine_that_is_a_class_is_refused():
    for call in (FRAME.apply, FRAME["a"].map):
        with pytest.raises(TypeError, match=r"the engine is a class: pass an object"):
            call(abs, engine=Engine)


def test_the_repr_has_the_public_path(engine):
    assert repr(engine) == "<forkshm.pandas.Engine of <forkshm.Pool state=RUN pool_size=2>>"


def test_nothing(engine):
    empty = pd.Series([], dtype=float, name="s")
    pd.testing.assert_series_equal(empty.map(abs, engine=engine), empty.map(abs))
    assert FRAME.iloc[:0].apply(lambda row: 1, axis=1, engine=engine).shape[0] == 0


def test_the_function_runs_in_the_workers(engine):
    assert os.getpid() not in set(NUMBERS.apply(lambda row: os.getpid(), axis=1, engine=engine))


GROUPED = pd.DataFrame({"k": ["u", "v", "u", None], "other": [1, 1, 2, 2], "a": [3, 1, 2, 5]})

GROUPS = {
    "by one key": lambda: GROUPED.groupby("k"),
    "by two keys": lambda: GROUPED.groupby(["k", "other"]),
    "without keys in the index": lambda: GROUPED.groupby("k", as_index=False),
    "without group keys": lambda: GROUPED.groupby("k", group_keys=False),
    "unsorted, with missing keys": lambda: GROUPED.groupby("k", sort=False, dropna=False),
    "by a level": lambda: GROUPED.set_index("k").groupby(level=0),
    "by categories": lambda: GROUPED.astype({"k": pd.CategoricalDtype(["v", "u", "w"])}).groupby("k", observed=False),
    "of nothing": lambda: GROUPED.iloc[:0].groupby("k"),
}

ON_GROUPS = {
    "a number": lambda group, factor=1: float(group["a"].sum()) * factor,
    "a frame": lambda group, factor=1: group.assign(rank=group["a"].rank() * factor),
    "rows": lambda group, factor=1: group.head(factor),
    "a row": lambda group, factor=1: group[["a"]].sum(),
    "the key": lambda group, factor=1: str(group.name),
    "none for some": lambda group, factor=1: group if len(group) > 1 else None,
}


@pytest.mark.parametrize("made", GROUPS)
@pytest.mark.parametrize("func", ON_GROUPS)
def test_groups(engine, made, func):
    groups, call = GROUPS[made](), ON_GROUPS[func]
    got = engine.groupby_apply(groups, call, factor=2)
    expected = groups.apply(call, factor=2)
    assert type(got) is type(expected)
    compare = pd.testing.assert_frame_equal if got.ndim == 2 else pd.testing.assert_series_equal
    compare(got, expected)


def test_groups_of_a_series(engine):
    got = engine.groupby_apply(GROUPED.groupby("k")["a"], lambda values: values.name * int(values.sum()))
    pd.testing.assert_series_equal(got, GROUPED.groupby("k")["a"].apply(lambda values: values.name * int(values.sum())))


def test_errors_and_deaths(engine):
    def fail(row):
        raise LookupError(f"no {row['a']}")

    with pytest.raises(LookupError, match="no "):
        FRAME.apply(fail, axis=1, engine=engine)
    with pytest.raises(forkshm.WorkerDiedError):
        FRAME.apply(lambda row: os.kill(os.getpid(), signal.SIGKILL) if row["a"] == 7 else 0, axis=1, engine=engine)
    assert NUMBERS.apply(lambda row: 1, axis=1, engine=engine).sum() == 50
    with pytest.raises(TypeError, match="omit engine="):
        NUMBERS.apply("sum", axis=1, engine=engine)


def test_a_pool_of_ones_own_stays_open():
    with forkshm.Pool(2) as pool:
        with Engine(pool) as engine:
            assert NUMBERS.apply(lambda row: 1, axis=1, engine=engine).sum() == 50
        assert pool.apply(abs, (-1,)) == 1
        with pytest.raises(TypeError, match="takes no options"):
            Engine(pool, retries=1)
