"""Writes expected.json: what Jinja2, set up as in transformers, makes of the templates here.

    pip install jinja2==3.1.6 && python3 expected.py
"""

import json
import pathlib

import jinja2.ext
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

HERE = pathlib.Path(__file__).parent
CONVERSATIONS = {
    "system": (
        [
            ("system", "  Be brief. "),
            ("user", "Hi there! "),
            ("assistant", " Hello\n"),
            ("user", "Sum: 2 + 2\n* The brown fox?"),
        ],
        True,
    ),
    "user": ([("user", "Hi <b>\u00fc\u4e16</b>?")], False),
    "twice": ([("user", "a"), ("user", "b")], True),
}


def raise_exception(message):
    raise TemplateError(message)


def tojson(value, ensure_ascii=False, indent=None):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
)
environment.filters["tojson"] = tojson
environment.globals["raise_exception"] = raise_exception

expected = {}
for path in sorted(HERE.glob("*.jinja")):
    template = environment.from_string(path.read_text())
    cases = expected[path.stem] = {}
    for name, (messages, add_generation_prompt) in CONVERSATIONS.items():
        try:
            cases[name] = template.render(
                messages=[{"role": role, "content": content} for role, content in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                bos_token="<s>",
                eos_token="</s>",
                unk_token="<unk>",
                pad_token="<pad>",
            )
        except TemplateError as error:
            cases[name] = {"error": str(error)}
(HERE / "expected.json").write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n")
