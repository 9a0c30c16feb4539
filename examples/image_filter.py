"""A filter over real photographs: workers take strips of them, and write into the resulting pictures.

The photographs come with scikit-image: the portrait of an astronaut, a cup of coffee, a cat, a rocket, the Hubble deep
field and a retina. Photographs and results are in shared memory, so only the numbers of rows are sent, and nothing
comes back.

    pip install 'forkshm[examples]'
    python examples/image_filter.py --save /tmp/filtered
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time

import numpy as np
from skimage import data, io

import forkshm

# All of these are files of the package: nothing is downloaded.
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket", "hubble_deep_field", "retina")
ROWS = 64


def median(photograph: np.ndarray, first: int, last: int) -> np.ndarray:
    """Return the median of each point's 3 x 3 neighborhood, for some rows; it removes specks and keeps edges."""
    rows = np.clip(np.arange(first - 1, last + 1), 0, len(photograph) - 1)
    padded = np.pad(photograph[rows], [(0, 0), (1, 1), (0, 0)], "edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(0, 1))
    return np.median(windows, axis=(3, 4)).astype(photograph.dtype)


@forkshm.parallel(chunksize=1)
def filter_strip(photograph: np.ndarray, result: np.ndarray, first: int, last: int) -> None:
    """Filter some rows of a photograph into its result."""
    result[first:last] = median(photograph, first, last)


def main() -> int:
    """Filter with workers and without, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=pathlib.Path, metavar="DIRECTORY", help="write the results there, as PNG")
    parser.add_argument("--photographs", type=int, default=len(PHOTOGRAPHS), help="how many of them")
    options = parser.parse_args()
    photographs = {name: forkshm.asarray(getattr(data, name)()) for name in PHOTOGRAPHS[: options.photographs]}
    results = {name: forkshm.empty_like(photograph) for name, photograph in photographs.items()}
    strips = [
        (photograph, results[name], first, min(first + ROWS, len(photograph)))
        for name, photograph in photographs.items()
        for first in range(0, len(photograph), ROWS)
    ]
    pixels = sum(photograph.shape[0] * photograph.shape[1] for photograph in photographs.values())
    print(f"{len(photographs)} photographs of {pixels / 1e6:.1f} megapixels, in {len(strips)} strips")

    filter_strip.submit(photographs["astronaut"], results["astronaut"], 0, 1).result()  # starts the workers
    before = forkshm.statistics().bytes_copied
    began = time.perf_counter()
    filter_strip.starmap(strips)
    parallel = time.perf_counter() - began
    copied = forkshm.statistics().bytes_copied - before
    began = time.perf_counter()
    alone = {name: median(photograph, 0, len(photograph)) for name, photograph in photographs.items()}
    serial = time.perf_counter() - began

    print(f"with workers {parallel:.2f} s, without {serial:.2f} s; {copied:,} bytes were copied")
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
        for name, result in results.items():
            io.imsave(options.save / f"{name}.png", np.asarray(result), check_contrast=False)
        print(f"written to {options.save}")
    if copied or any(not np.array_equal(alone[name], result) for name, result in results.items()):
        print("image_filter: the strips do not make up the picture, or were copied", file=sys.stderr)
        return 1
    changed = np.mean([np.mean(alone[name] != photograph) for name, photograph in photographs.items()])
    print(f"proved: strips and whole pictures are equal; the filter changed {changed:.0%} of the values")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
