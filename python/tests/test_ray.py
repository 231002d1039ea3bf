"""`llmpress.ray` on clusters of several node processes: the bytes are those of `llmpress convert`, whatever becomes of tasks and nodes.

    pip install ray==2.60.0 pytest
    LLMPRESS_COMMAND=target/debug/llmpress pytest python/tests/test_ray.py

Skipped where Ray or the command is not there.
"""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402

from llmpress.ray import ConversionError, _bytes, convert  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
COMMAND = os.environ.get("LLMPRESS_COMMAND") or shutil.which("llmpress") or str(ROOT / "target/debug/llmpress")
TINYLM = ROOT / "examples/tinylm"
SHARDS = ["--max-shard-size", "1M"]

pytestmark = pytest.mark.skipif(not os.access(COMMAND, os.X_OK), reason="there is no llmpress command")


@pytest.fixture(scope="module")
def cluster():
    """Three nodes, each with processes of its own; one processor each, so that every one of them has to work."""
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    for _ in range(2):
        nodes.add_node(num_cpus=1)
    ray.init(address=nodes.address, log_to_driver=False, logging_level="error")
    nodes.wait_for_nodes()
    yield nodes
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    llmpress("convert", TINYLM, out, "--to", "dfloat11", *SHARDS, "--quiet")
    return out


def llmpress(*args):
    return subprocess.run([COMMAND, *map(str, args)], check=True, capture_output=True, text=True).stdout


def files(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def on_ray(out, **more):
    more = {"to": "dfloat11", "plan_args": SHARDS, "command": COMMAND, **more}
    return convert(TINYLM, out, **more)


def workers():
    """Processes of `llmpress worker`, and the processes that started them."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            args = (entry / "cmdline").read_bytes().split(b"\0")
            if len(args) > 1 and args[0].endswith(b"llmpress") and args[1] == b"worker":
                parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[1]
                found.append((int(entry.name), int(parent)))
        except (OSError, IndexError, ValueError):
            continue
    return found


def kill_when_there(which, count):
    """Kills so many workers (0) or the processes of Ray that started them (1), in a thread."""
    killed = []

    def watch():
        until = time.monotonic() + 60
        while len(killed) < count and time.monotonic() < until:
            for found in workers():
                if found[which] not in killed and len(killed) < count:
                    try:
                        os.kill(found[which], signal.SIGKILL)
                        killed.append(found[which])
                    except OSError:
                        pass
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread, killed


def test_any_number_of_nodes_makes_what_convert_makes(cluster, whole, tmp_path):
    seen = []
    summary = on_ray(tmp_path / "three", progress=seen.append, ray_options={"scheduling_strategy": "SPREAD"})
    assert files(tmp_path / "three") == files(whole)
    assert summary["units"] == seen[-1].units == seen[-1].units_done > 6
    assert seen[-1].bytes_done == seen[-1].bytes and summary["retried"] == 0
    assert [now.units_done for now in seen] == sorted(now.units_done for now in seen)
    assert len(summary["nodes"]) > 1, "more than one node made units"
    assert sum(summary["nodes"].values()) == summary["units"]
    again = on_ray(tmp_path / "grouped", units_per_task=5)
    assert files(tmp_path / "grouped") == files(whole) and again["units"] == summary["units"]
    # Everything is there: it is looked at, and nothing is made.
    assert on_ray(tmp_path / "three")["nodes"] in ({}, {node: 0 for node in on_ray(tmp_path / "three")["nodes"]})
    assert files(tmp_path / "three") == files(whole)


def test_units_whose_workers_are_killed_are_made_again(cluster, whole, tmp_path):
    thread, killed = kill_when_there(0, 3)
    summary = on_ray(tmp_path / "out", retries=4)
    thread.join()
    assert len(killed) == 3 and summary["retried"] > 0, (killed, summary)
    assert files(tmp_path / "out") == files(whole)


def test_units_whose_ray_processes_are_killed_are_made_again(cluster, whole, tmp_path):
    thread, killed = kill_when_there(1, 2)
    on_ray(tmp_path / "out", retries=4)
    thread.join()
    assert len(killed) == 2
    assert files(tmp_path / "out") == files(whole)
    time.sleep(0.5)
    assert not workers(), "what they had started stopped with them"


def test_a_node_that_is_lost_loses_nothing(cluster, whole, tmp_path):
    lost = cluster.add_node(num_cpus=2)

    def lose(progress):
        nonlocal lost
        if progress.units_done == 3 and lost is not None:
            cluster.remove_node(lost, allow_graceful=False)
            lost = None

    on_ray(tmp_path / "out", progress=lose, ray_options={"scheduling_strategy": "SPREAD"})
    assert lost is None
    assert files(tmp_path / "out") == files(whole)


def test_what_is_there_is_gone_on_with_and_what_is_stale_is_made_again(cluster, whole, tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text(llmpress("plan", TINYLM, "--to", "dfloat11", *SHARDS, "--json"))
    out = tmp_path / "out"
    llmpress("worker", "--plan", plan, out, "--unit", "0-3", "--quiet")
    shards = json.loads(plan.read_text())["shards"]
    receipt = lambda unit: out / ".llmpress" / f"{shards[unit]['file']}.json"  # noqa: E731
    receipt(1).write_bytes(receipt(2).read_bytes())
    damaged = out / shards[3]["file"]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    summary = on_ray(out)
    assert files(out) == files(whole)
    assert sum(summary["nodes"].values()) == summary["units"] - 2, "two were whole"


def test_two_conversions_into_the_same_directory_do_not_harm_each_other(cluster, whole, tmp_path):
    errors = []

    def run():
        try:
            on_ray(tmp_path / "out")
        except ConversionError as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # The second to merge may find workers of the other there, and says so.
    assert all(not error.final for error in errors) and len(errors) < 2, errors
    on_ray(tmp_path / "out")
    assert files(tmp_path / "out") == files(whole)


def test_what_a_retry_does_not_mend_stops_at_once(cluster, tmp_path):
    for to, said in [("gptq:w4,g32", "gptq:w4,g32"), ("dfloat12", "dfloat12")]:
        with pytest.raises(ConversionError, match=said) as raised:
            on_ray(tmp_path / "out", to=to)
        assert raised.value.final
    source = tmp_path / "source"
    shutil.copytree(TINYLM, source)
    changed = False

    def change(progress):
        nonlocal changed
        if not changed:
            changed = True
            os.utime(source / "config.json", (0, 0))

    with pytest.raises(ConversionError, match="source") as raised:
        convert(source, tmp_path / "out", to="dfloat11", plan_args=SHARDS, command=COMMAND, progress=change, retries=3)
    assert raised.value.final and raised.value.exit_code == 3


def test_sizes_are_those_of_the_command():
    sizes = {"512": 512, "3B": 3, "4G": 4 << 30, "4GiB": 4 << 30, "4GB": 4 * 10**9, "2 k": 2048, 7: 7}
    assert {size: _bytes(size) for size in sizes} == sizes
    for size in ["", "G", "4X", "-1", "1.5G"]:
        with pytest.raises(ValueError):
            _bytes(size)


def test_what_may_pass_is_tried_so_often_and_then_told(cluster, tmp_path):
    stand_in = tmp_path / "llmpress"
    log = tmp_path / "tries"
    stand_in.write_text(
        f'#!/bin/sh\n[ "$1" = worker ] || exec {COMMAND} "$@"\necho "$4" >> {log}\necho "error: the disk is away" >&2\nexit 1\n'
    )
    stand_in.chmod(0o755)
    with pytest.raises(ConversionError, match="the disk is away") as raised:
        on_ray(tmp_path / "out", command=str(stand_in), retries=1, plan_args=["--max-shard-size", "4G"])
    assert not raised.value.final and len(log.read_text().splitlines()) == 2
