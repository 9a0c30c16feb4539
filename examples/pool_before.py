"""Which modules of the standard library resemble each other most? An ordinary program with a pool."""

import argparse
import collections
import multiprocessing as mp
import os
import pathlib
import re
import time

import numpy as np

WORD = re.compile(r"[A-Za-z_]\w+")


def table_of(paths, columns):
    """Return how often each of the most frequent words is in each file, as rows of length 1."""
    counts = [collections.Counter(WORD.findall(path.read_text("utf-8", "replace"))) for path in paths]
    words = collections.Counter()
    for count in counts:
        words.update(count)
    frequent = words.most_common(columns)
    table = np.array([[count[word] for word, _ in frequent] for count in counts], float)
    return table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1)


def closest(table, row):
    """Return the row that is most like this one, and how much."""
    likeness = table @ table[row]
    likeness[row] = -1
    return int(likeness.argmax()), float(likeness.max())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=300)
    parser.add_argument("--words", type=int, default=4000)
    options = parser.parse_args()
    sources = sorted(pathlib.Path(os.__file__).parent.rglob("*.py"))
    paths = [path for path in sources if path.stat().st_size > 10_000][: options.files]
    table = table_of(paths, options.words)

    began = time.perf_counter()
    with mp.Pool(2) as pool:
        found = pool.starmap(closest, [(table, row) for row in range(len(paths))])
    taken = time.perf_counter() - began

    for row in sorted(range(len(paths)), key=lambda row: -found[row][1])[:5]:
        print(f"{paths[row].name} and {paths[found[row][0]].name}: {found[row][1]:.6f}")
    print(f"seconds in the pool: {taken:.3f}")


if __name__ == "__main__":
    main()
