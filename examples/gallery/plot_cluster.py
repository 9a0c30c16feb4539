"""
Cluster of two nodes
====================

``forkshm.Executor(cluster=...)`` runs calls on the nodes of a Dask cluster. Here both nodes are process trees of this
machine. Each has a pool of its own and one copy of the table, which all workers of the node read.
"""

import os

import matplotlib.pyplot as plt
import numpy as np
from distributed import LocalCluster

import forkshm as mp


def correlate(table, column):
    return os.getppid(), table.T @ table[:, column] / len(table)


# %%
# The table is moved to each node once, not with each call. The processes of a cluster import the program, so it
# needs the guard.

if __name__ == "__main__":
    table = np.random.default_rng(0).normal(size=(1000, 500))  # an ordinary array of this process
    with (
        LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=None, silence_logs=50) as cluster,
        mp.Executor(cluster=cluster) as executor,
    ):
        futures = [executor.submit(correlate, table, column) for column in range(100)]
        answers = [future.result() for future in futures]

    assert np.allclose([row for _, row in answers], (table.T @ table[:, :100] / len(table)).T)
    nodes = sorted({node for node, _ in answers})
    counts = [sum(node == each for each, _ in answers) for node in nodes]
    fig, axis = plt.subplots(figsize=(7, 3), layout="constrained")
    axis.bar_label(axis.barh([f"node {number}" for number in range(len(nodes))], counts), padding=3)
    axis.margins(x=0.1)  # room for the labels
    axis.set_xlabel("calls")
    plt.show()
