#!/usr/bin/env python3
"""Measures what a conversion on Ray takes beside the same one by `llmpress convert` on the same processors.

    pip install ray==2.60.0
    PYTHONPATH=python/package python docs/bench/ray_overhead.py MODEL --llmpress target/release/llmpress [--nodes 2] [--runs 5]

A cluster of so many node processes with a processor each, on this machine; the other side has as many threads. They take turns, outputs
are compared after every run. OUT lies below --scratch, by default /dev/shm. Prints one JSON object.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import time
from pathlib import Path

import ray
from llmpress.ray import convert
from ray.cluster_utils import Cluster

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--llmpress", default="llmpress")
parser.add_argument("--to", default="dfloat11")
parser.add_argument("--max-shard-size", default="20M")
parser.add_argument("--nodes", type=int, default=2)
parser.add_argument("--runs", type=int, default=5)
parser.add_argument("--scratch", default="/dev/shm/llmpress-ray")
args = parser.parse_args()

command = os.path.realpath(args.llmpress)
nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
for _ in range(args.nodes - 1):
    nodes.add_node(num_cpus=1)
ray.init(address=nodes.address, log_to_driver=False, logging_level="error")
nodes.wait_for_nodes()
scratch = Path(args.scratch)
scratch.mkdir()


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def local(out):
    call = [command, "convert", args.model, str(out), "--to", args.to, "--max-shard-size", args.max_shard_size]
    subprocess.run([*call, "--jobs", str(args.nodes), "--quiet"], check=True)


def on_ray(out):
    return convert(args.model, out, to=args.to, plan_args=["--max-shard-size", args.max_shard_size], command=command)["units"]


try:
    times, units = {"local": [], "ray": []}, 0
    on_ray(scratch / "warm")
    shutil.rmtree(scratch / "warm")
    for _ in range(args.runs):
        for name, run in [("local", local), ("ray", on_ray)]:
            start = time.monotonic()
            units = run(scratch / name) or units
            times[name].append(round(time.monotonic() - start, 3))
        assert files(scratch / "local") == files(scratch / "ray")
        for name in times:
            shutil.rmtree(scratch / name)
finally:
    shutil.rmtree(scratch)
    ray.shutdown()
    nodes.shutdown()
medians = {name: statistics.median(runs) for name, runs in times.items()}
each = (medians["ray"] - medians["local"]) * args.nodes / units
load = os.getloadavg()[0]
print(json.dumps({**times, "medians": medians, "units": units, "seconds_more_a_unit_and_processor": round(each, 3), "load": load}))
