"""Conversions on a Ray cluster.

    import ray
    from llmpress.ray import convert

    ray.init(address="auto")
    summary = convert("/shared/MODEL", "/shared/OUT", to="dfloat11", cpus_per_task=8, memory="4G")

Every node needs the `llmpress` command and the same storage, under the same paths; the driver needs neither. A task makes one unit of the
plan, which is a shard (`llmpress worker`); a last one merges. The result is what `llmpress convert` makes on one machine, to the byte,
whatever nodes there are, and however many tasks were killed, tried again or run twice.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike, fspath

__all__ = ["ConversionError", "Progress", "convert"]

#: Exit codes of `llmpress worker` and `merge` that a retry does not mend: wrong usage; a source, plan or output that will not do.
FINAL_EXIT_CODES = frozenset({2, 3})
#: The longest wait before a unit is tried again, in seconds.
LONGEST_WAIT = 30.0


class ConversionError(RuntimeError):
    """A conversion failed.

    `exit_code` is that of `llmpress`, negative for a signal; `final` whether the same will fail again.
    """

    def __init__(self, message: str, exit_code: int | None = None, final: bool = False):
        super().__init__(message)
        self.exit_code = exit_code
        self.final = final


@dataclass(frozen=True)
class Progress:
    """How far a conversion is."""

    #: Units that are done, and all of them.
    units_done: int
    units: int
    #: Source bytes of the units that are done, and of all of them.
    bytes_done: int
    bytes: int
    #: Units that had to be tried again so far.
    retried: int
    #: Since the first unit was given out.
    seconds: float


def convert(
    src: str | PathLike[str],
    out: str | PathLike[str],
    *,
    to: str | None = None,
    plan_args: Sequence[str] = (),
    cpus_per_task: int = 1,
    memory: int | str | None = None,
    retries: int = 3,
    units_per_task: int = 1,
    command: str | None = None,
    progress: Callable[[Progress], None] | None = None,
    ray_options: dict | None = None,
) -> dict:
    """Converts `src` into the directory `out` on the Ray cluster that the driver is connected to.

    Args:
        src: A checkpoint's directory, or a name on the hub, which each node downloads then.
        out: The directory to make. One that holds units of the same plan is gone on with.
        to: The method or chain, as `--to` says it. What goes by the whole model (calibrated passes) cannot be spread and is refused.
        plan_args: More arguments of `llmpress plan`, such as `["--max-shard-size", "1GB"]` or `["--recipe", "recipe.toml"]`.
        cpus_per_task: Processors that Ray reserves for a unit, and threads that make it.
        memory: Bytes that Ray reserves for a unit and that it keeps to (`--max-memory`), as a number or as `"4G"`.
        retries: How often a unit is tried again after a fault that may pass, and after the loss of its node or process.
        units_per_task: How many units a task makes, one after the other. Larger for small shards.
        command: The program; by default the `llmpress` beside each node's Python, else the one on its PATH.
        progress: Is told after each unit that is done.
        ray_options: More options of the tasks, such as `{"scheduling_strategy": "SPREAD", "resources": {"disk": 1}}`.

    Returns:
        The summary of `llmpress merge --json`, with `units`, `retried` (units that were tried again), `nodes` (node id: units made there)
        and `seconds` of the whole.

    Raises:
        ConversionError: A fault that a retry does not mend, at once; or one that came once too often. Units that are done stay, and the
            same call goes on after them.
    """
    import ray

    if units_per_task < 1 or cpus_per_task < 1 or retries < 0:
        raise ValueError("units_per_task and cpus_per_task begin at 1, retries at 0")
    src, out = fspath(src), fspath(out)
    start = time.monotonic()
    options = {**(ray_options or {}), "num_cpus": cpus_per_task, "max_retries": retries}
    worker_args = ["--jobs", str(cpus_per_task)]
    if memory is not None:
        options["memory"] = _bytes(memory)
        worker_args += ["--max-memory", str(_bytes(memory))]
    run = ray.remote(_runner(command))
    one = run.options(**{**(ray_options or {}), "num_cpus": 1, "max_retries": retries})
    target = ["--to", to] if to is not None else []
    planned = _checked(ray.get(one.remote(["plan", src, *target, "--json", *plan_args], None, 0)))
    plan_text = planned["stdout"]
    plan = json.loads(plan_text)
    shards = {shard["number"]: shard["source_bytes"] for shard in plan["shards"]}
    plan_ref = ray.put(plan_text)

    def give_out(units: list[int], attempt: int):
        wait = min(LONGEST_WAIT, 2.0**attempt) if attempt else 0.0
        args = ["worker", out, "--unit", ",".join(map(str, units)), "--json", *worker_args]
        return run.options(**options).remote(args, plan_ref, wait)

    # The largest first, so that nodes end together.
    order = sorted(shards, key=lambda number: (-shards[number], number))
    groups = [order[at : at + units_per_task] for at in range(0, len(order), units_per_task)]
    running = {give_out(units, 0): (units, 0) for units in groups}
    begun, done, retried, nodes = time.monotonic(), set(), 0, {}
    try:
        while running:
            ready, _ = ray.wait(list(running), num_returns=1)
            for ref in ready:
                units, attempt = running.pop(ref)
                try:
                    result = ray.get(ref)
                except ray.exceptions.RayError as error:
                    raise ConversionError(f"units {units}: {error}") from error
                if result["exit_code"] != 0:
                    if result["exit_code"] in FINAL_EXIT_CODES or attempt >= retries:
                        _checked(result)
                    running[give_out(units, attempt + 1)] = (units, attempt + 1)
                    retried += len(units)
                    continue
                made = len(json.loads(result["stdout"])["made"])
                nodes[result["node"]] = nodes.get(result["node"], 0) + made
                done.update(units)
                if progress is not None:
                    bytes_done = sum(shards[number] for number in done)
                    seconds = time.monotonic() - begun
                    progress(Progress(len(done), len(shards), bytes_done, sum(shards.values()), retried, seconds))
    except BaseException:
        for ref in running:
            ray.cancel(ref)
        raise
    merged = _checked(ray.get(one.remote(["merge", out, "--json"], plan_ref, 0)))
    summary = json.loads(merged["stdout"])
    return {
        **summary,
        "units": len(shards),
        "retried": retried,
        "nodes": nodes,
        "seconds": time.monotonic() - start,
    }


def _checked(result: dict) -> dict:
    """The result of a command that went well."""
    code = result["exit_code"]
    if code == 0:
        return result
    said = result["stderr"].strip().splitlines()
    message = next((line for line in said if line.startswith("error:")), said[-1] if said else f"llmpress ended with exit code {code}")
    if message.startswith('{"error"'):
        message = json.loads(message)["error"]["message"]
    raise ConversionError(f"{message} (on {result['host']})", code, code in FINAL_EXIT_CODES)


def _bytes(size: int | str) -> int:
    """Bytes of a size as `llmpress` reads it: 4G, 512M."""
    if isinstance(size, int):
        return size
    number = size.rstrip("BbIiKkMmGgTt ")
    unit = size[len(number) :].strip().upper()
    # As `llmpress` has them: K and KiB are 1024, KB is 1000.
    base = 1000 if len(unit) == 2 else 1024
    power = "BKMGT".find(unit[:1] or "B")
    if not number.isdecimal() or unit not in ("", "B", *(f"{p}{end}" for p in "KMGT" for end in ("", "B", "IB"))):
        raise ValueError(f"{size!r} is no size such as 4G")
    return int(number) * base**power


def _runner(command: str | None) -> Callable[[list[str], str | None, float], dict]:
    """A function that runs `llmpress` on whatever node it is sent to. It goes there by value: the node needs the command alone."""

    def run(args: list[str], plan: str | None, wait: float) -> dict:
        import ctypes
        import os
        import shutil
        import signal
        import socket
        import subprocess
        import sys
        import tempfile
        import time

        import ray

        time.sleep(wait)
        beside = os.path.join(os.path.dirname(sys.executable), "llmpress")
        program = command or (beside if os.access(beside, os.X_OK) else shutil.which("llmpress"))
        host, node = socket.gethostname(), ray.get_runtime_context().get_node_id()
        if program is None:
            said = "error: there is no llmpress command on this node: install it, or say where it is with command="
            return {"exit_code": 2, "stdout": "", "stderr": said, "host": host, "node": node}
        libc = ctypes.CDLL(None)

        def end_with_parent() -> None:
            # PR_SET_PDEATHSIG: where this process is killed, the command stops as well, and leaves no litter.
            libc.prctl(1, signal.SIGTERM)

        with tempfile.TemporaryDirectory(prefix="llmpress-") as scratch:
            if plan is not None:
                path = os.path.join(scratch, "plan.json")
                with open(path, "w", encoding="utf-8") as file:
                    file.write(plan)
                args = [*args, "--plan", path]
            child = subprocess.Popen(
                [program, *args],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=end_with_parent if sys.platform == "linux" else None,
            )
            try:
                stdout, stderr = child.communicate()
            except BaseException:
                # Cancelled.
                child.terminate()
                child.wait()
                raise
        return {"exit_code": child.returncode, "stdout": stdout, "stderr": stderr, "host": host, "node": node}

    return run


def _main() -> int:
    """`python -m llmpress.ray SRC OUT --to METHOD`: the same from a shell."""
    import argparse

    import ray

    parser = argparse.ArgumentParser(prog="python -m llmpress.ray", description="Converts a checkpoint on a Ray cluster.")
    parser.add_argument("src")
    parser.add_argument("out")
    parser.add_argument("--to", help="the method or chain, as llmpress convert takes it")
    parser.add_argument("--address", default="auto", help="of the cluster [default: auto]")
    parser.add_argument("--cpus-per-task", type=int, default=1)
    parser.add_argument("--memory", help="of a task, such as 4G")
    parser.add_argument("--retries", type=int, default=3)
    parser.add_argument("--units-per-task", type=int, default=1)
    parser.add_argument("--command", help="the llmpress program on the nodes")
    parser.add_argument("plan_args", nargs="*", help="after --: more arguments of llmpress plan")
    args = parser.parse_args()

    def show(progress: Progress) -> None:
        rate = progress.bytes_done / 1e9 / max(progress.seconds, 1e-9)
        print(f"{progress.units_done} of {progress.units} units, {rate:.2f} GB/s, {progress.retried} tried again", file=sys.stderr)

    ray.init(address=args.address, logging_level="warning")
    try:
        summary = convert(
            args.src,
            args.out,
            to=args.to,
            plan_args=args.plan_args,
            cpus_per_task=args.cpus_per_task,
            memory=args.memory,
            retries=args.retries,
            units_per_task=args.units_per_task,
            command=args.command,
            progress=show,
        )
    except ConversionError as error:
        print(error, file=sys.stderr)
        return error.exit_code if error.exit_code in FINAL_EXIT_CODES else 1
    print(json.dumps(summary, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(_main())
