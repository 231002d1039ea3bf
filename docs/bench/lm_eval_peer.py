#!/usr/bin/env python3
"""Scores a checkpoint on questions of `make_tasks.py` with lm-evaluation-harness, for a comparison with `llmpress eval tasks`.

    pip install "lm_eval[hf]"
    python lm_eval_peer.py MODEL questions.jsonl

Prints the same figures: acc and acc_norm of the questions with choices, acc of those that are to be gone on with, each with its
standard error; in single precision on the processor.
"""

import json
import sys
import tempfile
from pathlib import Path

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.api.task import ConfigurableTask


def mean(metric):
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def task(name, questions, directory, config):
    """A task over some questions; none where there are none."""
    if not questions:
        return None
    path = Path(directory) / f"{name}.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
    files = {"test": str(path)}
    common = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
    return ConfigurableTask(config={**common, **config})


def main():
    model, data = sys.argv[1:3]
    lines = Path(data).read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line) for line in lines if line.strip()]
    with tempfile.TemporaryDirectory() as directory:
        choices = {
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [mean("acc"), mean("acc_norm")],
        }
        cloze = {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{' ' + target}}",
            "metric_list": [mean("acc")],
        }
        tasks = [
            task("choices", [q for q in questions if "choices" in q], directory, choices),
            task("cloze", [q for q in questions if "target" in q], directory, cloze),
        ]
        lm = HFLM(pretrained=model, dtype="float32", device="cpu", batch_size=1)
        found = lm_eval.simple_evaluate(model=lm, tasks=[t for t in tasks if t], bootstrap_iters=2)
    for name, results in found["results"].items():
        for metric in ("acc", "acc_norm"):
            if f"{metric},none" in results:
                error = results.get(f"{metric}_stderr,none")
                print(name, metric, results[f"{metric},none"], "+-", error)


if __name__ == "__main__":
    main()
