"""Text statistics over the Python sources: the words of the standard library, counted by workers.

The names of the files are sent to the workers, and counters come back and are merged in the order of their arrival. The
result must equal a count without workers.

    pip install 'forkshm[progress]'
    python examples/text_statistics.py --progress
"""

from __future__ import annotations

import argparse
import collections
import os
import pathlib
import re
import sys
import time

import forkshm

WORD = re.compile(r"[A-Za-z_]\w+")


@forkshm.parallel(chunksize=8)
def words_of(path: pathlib.Path) -> tuple[int, collections.Counter[str]]:
    """Return the number of lines of a file, and how often each word is in it."""
    text = path.read_text("utf-8", "replace")
    return text.count("\n"), collections.Counter(WORD.findall(text))


def merged(parts: object) -> tuple[int, collections.Counter[str]]:
    """Add up the counts of the files."""
    lines, words = 0, collections.Counter[str]()
    for more_lines, more_words in parts:  # type: ignore[attr-defined]
        lines += more_lines
        words.update(more_words)
    return lines, words


def main() -> int:
    """Count with workers and without."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2000, help="how many at the most (default: 2000)")
    parser.add_argument("--progress", action="store_true", help="show a bar")
    options = parser.parse_args()
    library = pathlib.Path(os.__file__).parent
    sources = sorted(path for path in library.rglob("*.py") if "site-packages" not in path.parts)[: options.files]

    began = time.perf_counter()
    lines, words = merged(words_of.imap_unordered(sources, progress=options.progress))
    parallel = time.perf_counter() - began
    began = time.perf_counter()
    alone = merged(map(words_of, sources))
    serial = time.perf_counter() - began

    print(f"{len(sources):,} files, {lines:,} lines, {words.total():,} words, {len(words):,} different ones")
    print("most frequent:", ", ".join(f"{word} ({count:,})" for word, count in words.most_common(5)))
    print(f"with workers {parallel:.2f} s, without {serial:.2f} s")
    if (lines, words) != alone:
        print("text_statistics: the workers counted something else", file=sys.stderr)
        return 1
    print("proved: the workers' counts are equal to the serial ones")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
