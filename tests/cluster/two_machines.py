"""Run an executor on nodes that share no network with each other but a bridge, as machines do.

``unshare --net --mount python two_machines.py`` prints one line of JSON. Needs root. All interfaces are in network
namespaces that end with their processes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import cloudpickle
import distributed
import numpy as np

import forkshm

NETWORK = "10.123.0"
NODES = (1, 2)


def ip(*words):
    subprocess.run(["ip", *words], check=True)


def start_node(number, scheduler):
    """Start a node in a network namespace of its own; return its process."""
    name, there = f"forkshm{number}", f"there{number}"
    ip("link", "add", name, "type", "veth", "peer", "name", there)
    ip("link", "set", name, "master", "bridge0", "up")
    address = f"{NETWORK}.{number + 1}"
    command = f"""
        read line
        ip link set lo up && ip addr add {address}/24 dev {there} && ip link set {there} up || exit
        exec {sys.executable} -m distributed.cli.dask_worker {scheduler} --host {address} --nthreads 2 --no-nanny \
            --no-dashboard --memory-limit 0 --local-directory {os.getcwd()}/node{number}
    """
    node = subprocess.Popen(["unshare", "--net", "sh", "-c", command], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    while os.readlink(f"/proc/{node.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
        time.sleep(0.01)
    ip("link", "set", there, "netns", str(node.pid))
    node.stdin.write(b"\n")
    node.stdin.close()
    return node


def received(node):
    """Return the bytes that a node's interface has received."""
    with open(f"/proc/{node.pid}/net/dev") as file:
        (line,) = (line for line in file if line.strip().startswith("there"))
    return int(line.split(":")[1].split()[0])


def part_of(array, number):
    time.sleep(0.02)
    return float(array[number::64].sum()), network()


def network():
    return os.readlink("/proc/self/ns/net")


def main():
    cloudpickle.register_pickle_by_value(sys.modules["__main__"])
    ip("link", "set", "lo", "up")
    ip("link", "add", "bridge0", "type", "bridge")
    ip("addr", "add", f"{NETWORK}.1/24", "dev", "bridge0")
    ip("link", "set", "bridge0", "up")
    data = np.random.default_rng(1).integers(0, 1000, 5_000_000)
    expected = [float(data[number::64].sum()) for number in range(64)]
    nodes = []
    with (
        distributed.LocalCluster(n_workers=0, host=f"{NETWORK}.1", dashboard_address=None, silence_logs=50) as cluster,
        distributed.Client(cluster) as client,
    ):
        try:
            nodes += [start_node(number, cluster.scheduler_address) for number in NODES]
            client.wait_for_workers(len(NODES), timeout=60)
            with forkshm.Executor(cluster=client) as executor:
                list(executor.map(abs, range(8)))  # starts the pools
                before = [received(node) for node in nodes]
                parts = list(executor.map(part_of, [data] * 64, range(64), chunksize=1))
                copies = [(received(node) - start) / data.nbytes for node, start in zip(nodes, before, strict=True)]
                rest = executor.map(part_of, [data] * 64, range(64), chunksize=1)
                first = next(rest)
                os.kill(nodes[0].pid, signal.SIGKILL)
                survived = [part for part, _ in (first, *rest)] == expected
        finally:
            for node in nodes:
                node.kill()
                node.wait()
    networks = {where for _, where in parts}
    print(
        json.dumps(
            {
                "networks": len(networks),
                "is here": network() in networks,
                "is right": [part for part, _ in parts] == expected,
                "copies": copies,
                "survived": survived,
            }
        )
    )


if __name__ == "__main__":
    main()
