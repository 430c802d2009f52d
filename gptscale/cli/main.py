"""`gptscale VERB [key=value]…`: finds the verb and answers for its exit code. Imports nothing heavy itself."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from gptscale import __version__
from gptscale.runtime.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_USER, UserError

VERBS = {
    "prepare": "text → tokenizer and shards",
    "train": "shards → checkpoints; starts its own ranks, resumes where it stopped",
    "generate": "a run or checkpoint → text",
    "export": "prepared text → Megatron's indexed datasets",
    "inspect": "a run, two runs, a checkpoint or prepared text → what is in it",
    "bench": "measure: bench step, bench layouts, bench data",
}

USAGE = """usage: gptscale VERB [group=option] [key=value]…

{verbs}

gptscale VERB --help   the settings of a verb
gptscale --version"""


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(USAGE.format(verbs="\n".join(f"  {verb:<10} {says}" for verb, says in VERBS.items())))
        return EXIT_DONE if arguments else EXIT_USER
    if arguments[0] == "--version":
        print(f"gptscale {__version__}")
        return EXIT_DONE
    verb, *rest = arguments
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        fix = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(VERBS)}"
        print(f"there is no verb '{verb}'\n{fix}", file=sys.stderr)
        return EXIT_USER
    module = importlib.import_module(f"gptscale.cli.{verb}")
    try:
        if {"--help", "-h"} & set(rest):
            print(module.help_text())
            return EXIT_DONE
        return int(module.run(rest))
    except UserError as error:
        return report_user_error(error)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE


def report_user_error(error: UserError) -> int:
    """Two lines for the user; the traceback too where somebody debugs."""
    if os.environ.get("GPTSCALE_DEBUG") == "1":
        traceback.print_exception(error)
    print(error, file=sys.stderr)
    return EXIT_USER


if __name__ == "__main__":
    sys.exit(main())
