#!/usr/bin/env python3
"""Makes small sets of questions for `llmpress eval tasks` from plain texts.

    python make_tasks.py TEXT [TEXT ...] --choices 200 --cloze 200 > questions.jsonl

Choices: the first words of a passage, and how it goes on as one of four endings of as many words; the other three follow other
passages of the same texts. Cloze: a passage up to a word that stands earlier in it, so that it can be known. The same texts, numbers and
seed make the same sets. Needs Python alone.
"""

import argparse
import json
import random
import re
import sys
from pathlib import Path

CONTEXT_WORDS = 60
ENDING_WORDS = 8
CHOICES = 4
# A word that can be guessed: no name of a function word, no number.
TARGET = re.compile(r"[A-Za-z]{5,}")


def passages(paths):
    """Paragraphs that are long enough, as words."""
    found = []
    for path in paths:
        for paragraph in re.split(r"\n\s*\n", Path(path).read_text(encoding="utf-8")):
            words = paragraph.split()
            if len(words) >= CONTEXT_WORDS + ENDING_WORDS:
                found.append(words)
    return found


def choice(rng, all_passages, words):
    """Where the passage goes on, among endings of other passages."""
    right = words[CONTEXT_WORDS : CONTEXT_WORDS + ENDING_WORDS]
    endings = [right]
    while len(endings) < CHOICES:
        other = rng.choice(all_passages)
        start = rng.randrange(len(other) - ENDING_WORDS + 1)
        ending = other[start : start + ENDING_WORDS]
        if other is not words and ending not in endings:
            endings.append(ending)
    rng.shuffle(endings)
    return {
        "context": " ".join(words[:CONTEXT_WORDS]),
        "choices": [" ".join(ending) for ending in endings],
        "answer": endings.index(right),
    }


def cloze(words):
    """The passage up to the last word that was said before in it; none where there is no such word."""
    for at in range(min(len(words), 2 * CONTEXT_WORDS) - 1, CONTEXT_WORDS // 2, -1):
        bare = TARGET.match(words[at])
        if bare and bare.group() == words[at] and words[at] in words[:at]:
            return {"text": " ".join(words[:at]), "target": words[at]}
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--choices", type=int, default=200)
    parser.add_argument("--cloze", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    found = passages(args.texts)
    if len(found) < CHOICES:
        sys.exit(f"{len(found)} paragraphs of {CONTEXT_WORDS + ENDING_WORDS} words are too few")
    rng.shuffle(found)
    for words in found[: args.choices]:
        print(json.dumps(choice(rng, found, words), ensure_ascii=False))
    questions = [question for question in map(cloze, reversed(found)) if question]
    for question in questions[: args.cloze]:
        print(json.dumps(question, ensure_ascii=False))


if __name__ == "__main__":
    main()
