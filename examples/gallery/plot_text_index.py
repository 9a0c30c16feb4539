"""
Text index that all workers search
==================================

An index from words to files, built by workers from the sources of the standard library, and kept once in shared
memory for all readers as a `SharedDict`.
"""

import collections
import os
import pathlib
import re

import forkshm as mp

sources = sorted(pathlib.Path(os.__file__).parent.glob("*.py"))[:120]


def words_of(path):
    return path.name, collections.Counter(re.findall(r"[a-z]{4,}", path.read_text(errors="replace").lower()))


found = collections.defaultdict(dict)
with mp.Pool(2) as pool:
    for name, counts in pool.imap_unordered(words_of, sources, chunksize=10):
        for word, count in counts.items():
            found[word][name] = count

index = mp.SharedDict(dict(found))
print(f"{len(index):,} words of {len(sources)} files, {index.nbytes / 1e6:.1f} MB, once for all processes")


# %%
# Searching: each worker looks words up in the same memory. Only the word and the answer are sent.


def best_files(word):
    places = index.get(word, {})
    return word, sorted(places, key=places.get, reverse=True)[:3]


with mp.Pool(2) as pool:
    answers = pool.map(best_files, ["socket", "thread", "unicode", "pickle", "calendar"])

print(f"{'word':10} best files")
for word, files in answers:
    print(f"{word:10} {', '.join(files)}")
