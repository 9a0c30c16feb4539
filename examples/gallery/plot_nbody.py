"""
N-body simulation by a team
===========================

A team runs one block in several processes. Each member moves its share of the bodies; the positions are an array in
shared memory, and a barrier separates the steps.
"""

import matplotlib.pyplot as plt
import numpy as np

import forkshm as mp

BODIES, STEPS, DT = 300, 120, 0.01
rng = np.random.default_rng(7)
position = mp.array(rng.normal(size=(BODIES, 2)))
spin = np.stack([-position[:, 1], position[:, 0]], axis=1)
velocity = mp.array(0.5 * spin)
path = mp.zeros((STEPS, BODIES, 2))


# %%
# Gravity, softened so that close encounters stay finite.


def acceleration(all_positions, mine):
    difference = all_positions[None, :, :] - mine[:, None, :]
    distance = (difference**2).sum(axis=2) + 0.05
    return (difference / distance[:, :, None] ** 1.5).sum(axis=1) / BODIES


with mp.team(2) as t:
    share = t.range(BODIES)
    rows = slice(share.start, share.stop)
    for step in range(STEPS):
        velocity[rows] += DT * acceleration(position, position[rows])
        t.barrier()  # all members have read the old positions
        position[rows] += DT * velocity[rows]
        path[step, rows] = position[rows]
        t.barrier()  # all members have written the new ones

fig, axis = plt.subplots(figsize=(6, 6), layout="constrained")
for body in range(0, BODIES, 3):
    axis.plot(*path[:, body].T, linewidth=0.6, alpha=0.7)
axis.set_aspect("equal")
axis.set_title(f"{BODIES} bodies, {STEPS} steps, two processes")
plt.show()
