"""
Web service: FastAPI and aio.Pool
=================================

Worker processes compute the requests while the event loop stays responsive. The table that all requests read is in
shared memory. A request that takes too long is cancelled: its worker is killed and replaced.
"""

import asyncio
import contextlib
import time

import httpx
import matplotlib.pyplot as plt
import numpy as np
from fastapi import FastAPI, HTTPException

import forkshm as mp

table = mp.array(np.random.default_rng(0).random((2000, 200)))


def nearest(row):
    """Return the rows that are most like one row."""
    distance = ((table - table[row]) ** 2).sum(axis=1)
    return [int(each) for each in np.argsort(distance)[1:4]]


@contextlib.asynccontextmanager
async def lifespan(app):
    async with mp.aio.Pool(2) as app.state.pool:  # ends with the service
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/nearest/{row}")
async def get_nearest(row: int):
    return await app.state.pool.call(nearest, row)


@app.get("/slow")
async def slow():
    try:
        return await asyncio.wait_for(app.state.pool.call(time.sleep, 3600), 0.2)
    except TimeoutError:
        raise HTTPException(504, "took too long") from None


# %%
# A client sends 100 requests at once, and one that takes too long. It runs in the same process, so that the program
# needs no port.


async def timed(client, path):
    began = time.perf_counter()
    answer = await client.get(path)
    return answer, time.perf_counter() - began


async def main():
    transport = httpx.ASGITransport(app)
    async with lifespan(app), httpx.AsyncClient(transport=transport, base_url="http://service") as client:
        slow = asyncio.create_task(timed(client, "/slow"))
        fast = await asyncio.gather(*(timed(client, f"/nearest/{row}") for row in range(100)))
        return fast, await slow, await client.get("/nearest/0")


fast, (late, taken), again = asyncio.run(main())
assert all(answer.status_code == 200 for answer, _ in fast)
assert again.json() == fast[0][0].json()  # the service continues
print(f"/slow: status {late.status_code}, {late.json()['detail']}")

fig, axis = plt.subplots(figsize=(8, 4), layout="constrained")
axis.plot(sorted(1000 * seconds for _, seconds in fast), label="100 requests to /nearest at once")
axis.axhline(1000 * taken, color="gray", linestyle="--", label="/slow, cancelled")
axis.set(xlabel="request, the fastest first", ylabel="milliseconds until the answer", ylim=0)
axis.legend()
plt.show()
