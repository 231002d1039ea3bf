"""The command: `llmpress` and `python -m llmpress`."""

from __future__ import annotations

import os
import signal
import sys
import sysconfig
from typing import NoReturn


def main() -> NoReturn:
    """Runs the command with this process's arguments, and ends the process as it would end."""
    from llmpress import _llmpress

    script = sys.argv[0]
    if not os.access(script, os.X_OK) or os.path.basename(script) == "__main__.py":
        # By `python -m`: the program that it is installed as starts again where a verb needs that.
        script = os.path.join(sysconfig.get_path("scripts"), "llmpress")
    # Ctrl-C ends the command at once, as it does anywhere: there is no Python to tell.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    code = _llmpress.main(["llmpress", *sys.argv[1:]], os.path.abspath(script))
    sys.exit(code)


if __name__ == "__main__":
    main()
