"""
Live dashboard of a supervised service
======================================

A service of two workers counts its requests in shared memory. A dashboard process samples the counters while one
worker is killed and replaced, then ends the service by SIGTERM.
"""

import os
import signal
import time

import matplotlib.pyplot as plt

import forkshm as mp

WORKERS, SAMPLES = 2, 60
served = mp.zeros(WORKERS, int)  # one counter for each rank, so no lock is needed
pids = mp.zeros(WORKERS, int)
samples = mp.zeros((SAMPLES, WORKERS + 1))


def serve(me):
    pids[me.rank] = os.getpid()
    while not me.wait(timeout=0.004):  # a request every few milliseconds
        served[me.rank] += 1


def watch(service):
    while not pids.all():
        time.sleep(0.01)
    began = time.perf_counter()
    for number in range(SAMPLES):
        time.sleep(0.02)
        samples[number] = time.perf_counter() - began, *served
        if number == SAMPLES // 3:
            os.kill(int(pids[0]), signal.SIGKILL)  # a crash
    os.kill(service, signal.SIGTERM)


dashboard = mp.Process(target=watch, args=(os.getpid(),))
dashboard.start()
mp.supervise(serve, workers=WORKERS)
dashboard.join()

# %%
# The counter of the killed worker's rank continues once its replacement has started.

fig, axis = plt.subplots(figsize=(8, 4), layout="constrained")
for place in range(WORKERS):
    axis.plot(samples[:, 0], samples[:, place + 1], label=f"worker {place}")
axis.axvline(samples[SAMPLES // 3, 0], color="gray", linestyle="--", label="worker 0 is killed")
axis.set(xlabel="seconds", ylabel="requests served")
axis.legend()
plt.show()
