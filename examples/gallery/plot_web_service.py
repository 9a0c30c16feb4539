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
# A client, in the same process so that this page can be built without a port: 100 requests at once, and a slow one.


async def main():
    transport = httpx.ASGITransport(app)
    async with lifespan(app), httpx.AsyncClient(transport=transport, base_url="http://service") as client:
        began = time.perf_counter()
        answers = await asyncio.gather(*(client.get(f"/nearest/{row}") for row in range(100)))
        taken = time.perf_counter() - began
        late = await client.get("/slow")
        return taken, [answer.json() for answer in answers], late.status_code, await client.get("/nearest/0")


taken, answers, late, again = asyncio.run(main())
print(f"{'requests':>9} {'all right':>10} {'slow request':>13} {'after it':>9}")
print(f"{len(answers):9} {all(len(a) == 3 for a in answers)!s:>10} {late:13} {again.json() == answers[0]!s:>9}")
