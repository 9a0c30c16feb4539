"""Write the report and the trace of a real pool, which the page on debugging shows."""

from __future__ import annotations

import pathlib
import time

import numpy as np

import forkshm

FOLDER = pathlib.Path(__file__).parent / "_static" / "reports"


def resize(image: np.ndarray, seconds: float) -> np.ndarray:
    """Sleep for a while, as if it worked on the image."""
    time.sleep(seconds)
    return image[::2, ::2]


def main() -> None:
    """Run a pool with one task that is much longer than the others."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    image = forkshm.ones((2000, 2000))
    plain = np.ones((500, 500))
    with forkshm.Pool(3) as pool:
        with pool.trace(FOLDER / "trace.html"):
            pool.starmap(resize, [(image, 0.8 if n == 2 else 0.01 + 0.002 * (n % 7)) for n in range(24)], chunksize=1)
            pool.starmap(resize, [(plain, 0.005) for _ in range(12)], chunksize=1)
        pool.report().save(FOLDER / "report.html")


if __name__ == "__main__":
    main()
