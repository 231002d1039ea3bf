"""Jobs do what the command does, tell how far they are, and stop when they are told to."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time

import pytest

import llmpress


def contents(directory):
    """What every file holds."""
    files = [p for p in sorted(directory.rglob("*")) if p.is_file()]
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_a_plan_is_carried_out_proven_and_taken_back(tinylm, tmp_path):
    plan = llmpress.plan(tinylm, to="dfloat11")
    assert plan["source_bytes"] == sum(info.nbytes for info in llmpress.open(tinylm).values())
    summary = llmpress.convert(tinylm, tmp_path / "out", plan=plan)
    assert summary["source_bytes"] == plan["source_bytes"] and 0.6 < summary["ratio"] < 1
    llmpress.convert(tinylm, tmp_path / "same", to="dfloat11", jobs=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "same")
    report = llmpress.verify(tmp_path / "out", against=tinylm)
    assert report["comparison"]["differences"] == [] and report["digests"]["faults"] == []
    llmpress.restore(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (tinylm / "model.safetensors").read_bytes()
    assert llmpress.inspect(tmp_path / "out")["kind"] == "llmpress"


def test_the_command_and_the_function_make_the_same_files(tinylm, tmp_path):
    llmpress.convert(tinylm, tmp_path / "function", to="fixed12", rules={"model.norm.weight": "raw"}, max_shard_size="4M")
    rule = "--rule=model.norm.weight=raw"
    subprocess.run(
        [sys.executable, "-m", "llmpress", "convert", tinylm, tmp_path / "command", "--to=fixed12", rule, "--max-shard-size=4M", "--quiet"],
        check=True,
    )
    assert contents(tmp_path / "function") == contents(tmp_path / "command")


def test_what_is_wrong_with_options_is_said_in_the_commands_words(tinylm, tmp_path):
    for options, why in [
        ({}, "say what to make"),
        ({"to": "zip"}, "zip"),
        ({"to": "dfloat11", "max_memory": "1 elephant"}, "elephant"),
        ({"to": "dfloat11", "resume": True, "force": True}, "--force"),
    ]:
        with pytest.raises(llmpress.InvalidError, match=why) as error:
            llmpress.convert(tinylm, tmp_path / "out", **options)
        assert isinstance(error.value, ValueError)
    with pytest.raises(llmpress.LimitError):
        llmpress.convert(tinylm, tmp_path / "out", to="dfloat11", max_memory="1M")
    assert not (tmp_path / "out" / "llmpress.json").exists()


def test_faults_are_raised_with_what_was_found(tinylm, tmp_path):
    llmpress.convert(tinylm, tmp_path / "out", to="dfloat11")
    shard = next((tmp_path / "out").glob("*.safetensors"))
    with shard.open("r+b") as file:
        file.seek(-1, 2)
        byte = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(llmpress.FindingsError, match="fault") as found:
        llmpress.verify(tmp_path / "out")
    assert found.value.report["digests"]["faults"]
    assert llmpress.diff(tinylm, tinylm)["different"] == []


def test_progress_begins_at_nothing_and_ends_with_everything(tinylm, tmp_path):
    told = []
    llmpress.convert(tinylm, tmp_path / "out", to="dfloat11", progress=told.append)
    assert all(isinstance(each, llmpress.Progress) and each.done <= each.total for each in told)
    assert told[0] == ("convert", 0, told[0].total, "bytes")
    assert [each.done for each in told] == sorted(each.done for each in told)
    assert told[-1].done == told[-1].total == sum(info.nbytes for info in llmpress.open(tinylm).values())


class Enough(Exception):
    pass


def test_a_callback_that_raises_stops_the_job_which_then_goes_on(tinylm, tmp_path):
    options = {"to": "gptq:w4,g64+dfloat11", "calib": tinylm / "calib.txt", "calib_windows": 4, "calib_window": 64}
    llmpress.convert(tinylm, tmp_path / "whole", **options)
    seen = []

    def stop(progress):
        seen.append(progress)
        if progress.done > progress.total // 3:
            raise Enough

    with pytest.raises(Enough):
        llmpress.convert(tinylm, tmp_path / "out", progress=stop, **options)
    assert not (tmp_path / "out" / "llmpress.json").exists()
    with pytest.raises(llmpress.LlmpressError, match="resume"):
        llmpress.convert(tinylm, tmp_path / "out", **options)
    llmpress.convert(tinylm, tmp_path / "out", resume=True, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_evaluation_and_verification_stop_too(tinylm, tmp_path):
    def stop(progress):
        raise Enough

    for job in [
        lambda: llmpress.eval.ppl(tinylm, text=tinylm / "eval.txt", limit=4, progress=stop),
        lambda: llmpress.verify(tinylm, against=tinylm, progress=stop),
        lambda: llmpress.diff(tinylm, tinylm, progress=stop),
    ]:
        with pytest.raises(Enough):
            job()


INTERRUPTED = """
import sys, llmpress
try:
    llmpress.eval.ppl(sys.argv[1], text=sys.argv[2], window=64, jobs=1, progress=lambda p: print(p.done, flush=True))
except KeyboardInterrupt:
    print("interrupted", flush=True)
    # The interpreter and the package are as they were.
    print(llmpress.eval.ppl(sys.argv[1], text=sys.argv[2], window=64, limit=1)["scored_tokens"], flush=True)
    sys.exit(3)
"""


def test_ctrl_c_raises_keyboard_interrupt_and_leaves_the_interpreter_whole(tinylm):
    command = [sys.executable, "-c", INTERRUPTED, tinylm, tinylm / "eval.txt"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "0\n"
    begun = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 3 and rest.splitlines()[-2:] == ["interrupted", "63"], rest
    assert time.monotonic() - begun < 60


def test_evaluation_says_what_the_command_says(tinylm, converted):
    options = {"text": tinylm / "eval.txt", "window": 64, "limit": 2}
    plain = llmpress.eval.ppl(tinylm, **options)
    compressed = llmpress.eval.ppl(converted("dfloat11"), **options)
    assert plain["perplexity"] == compressed["perplexity"] > 1 and plain["scored_tokens"] == 126
    divergence = llmpress.eval.kld(converted("dfloat11"), base=tinylm, **options)
    assert divergence["kl"]["max"] == 0 and divergence["same_top"] == 1


def test_warnings_are_pythons(tinylm, tmp_path):
    # A ranking that nobody can check.
    import json

    ranking = llmpress.rank(tinylm, by="drop:attn", calib=tinylm / "calib.txt", calib_windows=1, calib_window=16)
    for key in [key for key in ranking if key in ("model", "source")]:
        del ranking[key]
    (tmp_path / "ranking.json").write_text(json.dumps(ranking))
    with pytest.warns(llmpress.LlmpressWarning, match="does not say which model"):
        llmpress.plan(tinylm, to="drop:attn=1", ranking=[tmp_path / "ranking.json"])


def test_a_name_that_cannot_be_had_is_an_error_and_a_directory_is_itself(tinylm, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert llmpress.download(tinylm) == tinylm
    for job in (llmpress.download, llmpress.open, llmpress.inspect):
        with pytest.raises(llmpress.InvalidError, match="HF_HUB_OFFLINE"):
            job("org/name")


def test_instructions_that_are_not_there_are_refused(tinylm):
    environment = {**os.environ, "LLMPRESS_ISA": "abacus"}
    for job in ("open", "inspect"):
        script = f"import llmpress; llmpress.{job}({str(tinylm)!r})"
        run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert run.returncode == 1 and "InvalidError" in run.stderr and "abacus" in run.stderr
    run = subprocess.run([sys.executable, "-m", "llmpress", "inspect", tinylm], env=environment, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("error:") and "abacus" in run.stderr
