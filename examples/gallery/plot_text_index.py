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

import matplotlib.pyplot as plt

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
    best = sorted(places, key=places.get, reverse=True)[:3]
    return word, {name: places[name] for name in best}


with mp.Pool(2) as pool:
    answers = pool.map(best_files, ["socket", "thread", "unicode", "pickle", "calendar"])

fig, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
labels = []
for word, files in answers:
    bars = axis.barh(range(len(labels), len(labels) + len(files)), files.values(), label=word)
    axis.bar_label(bars, padding=3)
    labels += files
axis.set_yticks(range(len(labels)), labels)
axis.invert_yaxis()
axis.margins(x=0.1)  # room for the labels
axis.legend(title="word")
axis.set_xlabel("occurrences in the file")
plt.show()
