"""The wheel's command is the command."""

from __future__ import annotations

import ast
import inspect
import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import llmpress
from llmpress import _llmpress

SCRIPT = Path(sysconfig.get_path("scripts"), "llmpress")
WAYS = [[sys.executable, "-m", "llmpress"], [SCRIPT]]


@pytest.mark.parametrize("way", WAYS, ids=["module", "script"])
def test_exit_codes_and_streams_are_the_commands(way, tinylm):
    def run(*arguments):
        return subprocess.run([*way, *arguments], capture_output=True, text=True)

    version = run("--version")
    assert version.returncode == 0 and llmpress.__version__ in version.stdout and "kernels:" in version.stdout
    done = run("inspect", tinylm, "--json")
    assert done.returncode == 0 and '"kind": "huggingface"' in done.stdout and done.stderr == ""
    failed = run("inspect", tinylm / "nothing")
    assert failed.returncode == 1 and failed.stderr.startswith("error:") and "nothing" in failed.stderr
    usage = run("inspect", "--nonsense")
    assert usage.returncode == 2 and "--nonsense" in usage.stderr


@pytest.mark.parametrize("way", WAYS, ids=["module", "script"])
def test_a_chat_template_is_rendered_by_the_command_started_again(way, tinylm, tmp_path):
    for file in tinylm.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    command = [*way, "generate", tmp_path, "--chat", "--prompt", "It is a truth", "-n", "4"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr


def test_ctrl_c_ends_the_command_at_once(tinylm):
    command = [SCRIPT, "eval", "ppl", tinylm, "--text", tinylm / "eval.txt", "--window", "64", "--jobs", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=2)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=20) == -signal.SIGINT


def test_a_verb_that_prints_is_no_function():
    with pytest.raises(llmpress.InvalidError, match="process of its own"):
        llmpress._jobs._call(["completions"], ["bash"], {}, None)


def test_stubs_say_what_is_there():
    stub = ast.parse(Path(_llmpress.__file__).with_name("_llmpress.pyi").read_text())
    said = {}
    for node in stub.body:
        if isinstance(node, ast.ClassDef):
            said[node.name] = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
        elif isinstance(node, ast.FunctionDef):
            said[node.name] = None
    for name, members in said.items():
        assert hasattr(_llmpress, name), name
        for member in members or ():
            assert hasattr(getattr(_llmpress, name), member), (name, member)
    there = {name for name, value in vars(_llmpress).items() if inspect.isclass(value) or inspect.isbuiltin(value)}
    assert there <= said.keys(), there - said.keys()
    for name, members in said.items():
        if members is not None:
            public = {each for each in vars(getattr(_llmpress, name)) if not each.startswith("_")}
            assert public <= members, (name, public - members)


def test_everything_that_is_public_says_what_it_is():
    for name in llmpress.__all__:
        value = getattr(llmpress, name)
        if not isinstance(value, str):
            assert inspect.getdoc(value), name
    for module in (llmpress._jobs, llmpress.eval):
        for name, value in vars(module).items():
            if inspect.isfunction(value) and not name.startswith("_"):
                assert inspect.getdoc(value), name
    assert Path(llmpress.__file__).with_name("py.typed").exists()


def test_every_option_of_the_functions_is_one_of_the_command():
    verbs = {"convert": "convert", "plan": "plan", "restore": "restore", "verify": "verify", "export": "export", "rank": "rank", "diff": "diff"}
    functions = {verb: getattr(llmpress, name) for name, verb in verbs.items()}
    functions |= {"eval ppl": llmpress.eval.ppl, "eval kld": llmpress.eval.kld, "eval tasks": llmpress.eval.tasks}
    plural = {"rules": "rule", "reports": "report"}
    for verb, function in functions.items():
        options = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY and p.name != "progress"]
        help = subprocess.run([SCRIPT, *verb.split(), "--help"], capture_output=True, text=True, check=True).stdout
        for option in options:
            flag = "--" + plural.get(option, option).rstrip("_").replace("_", "-")
            assert f"{flag} " in help or f"{flag}\n" in help, (verb, flag)
