"""Slightly wrong bytes, and the number of examples."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# Number of examples in a default run, and in a nightly one.
EXAMPLES = [150, pytest.param(10_000, marks=pytest.mark.nightly)]

NUMBERS = st.one_of(
    st.integers(0, 2**64 - 1),
    st.sampled_from([0, 1, 4095, 4096, 4097, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]),
)


def try_all(examples, strategy, check):
    """Call *check* with many values of *strategy*: the same ones in every run, except in the nightly run."""

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=examples < 1000,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(strategy)
    def run(value):
        check(value)

    run()


@st.composite
def changed(draw, originals):
    """Return one of *originals*: truncated, extended, with changed bits, numbers or parts; or arbitrary bytes."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.sampled_from(["flip", "byte", "number", "cut", "insert", "move", "random"])):
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "byte" if data:
                data[at] = draw(st.integers(0, 255))
            case "number":
                width = draw(st.sampled_from([2, 4, 8]))
                data[at : at + width] = (draw(NUMBERS) % 2 ** (8 * width)).to_bytes(width, "little")
            case "cut":
                del data[at:]
            case "insert":
                data[at:at] = draw(st.binary(max_size=40))
            case "move":
                length = draw(st.integers(0, 40))
                data[at:at] = data[at : at + length]
            case "random":
                data = bytearray(draw(st.binary(max_size=200)))
    return bytes(data)
