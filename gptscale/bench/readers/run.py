"""One process: `python -P run.py MODULE ACTION REQUEST ANSWER`, the last two being pickle files.

`pass`, `resume` and `order` measure a reader; any other action is a function of the module.
"""

from __future__ import annotations

import importlib
import pickle
import sys
import types
from pathlib import Path


def main() -> None:
    name, action, request_file, answer_file = sys.argv[1:]
    # The environment is the peer's: of ours it sees this package's modules, and nothing that lies beside them.
    package = types.ModuleType("gptscale")
    package.__path__ = [str(Path(__file__).resolve().parents[2])]
    sys.modules["gptscale"] = package

    import torch

    from gptscale.bench.readers import common
    from gptscale.runtime.malloc import keep_freed_memory

    torch.set_num_threads(1)
    keep_freed_memory()  # for all, as training ranks do
    module = f"gptscale.bench.readers.{name}"
    request = pickle.loads(Path(request_file).read_bytes())

    def reader_of() -> type[common.Reader]:
        found: type[common.Reader] = importlib.import_module(module).Reader
        return found

    answer: object
    if action == "pass":
        answer = common.run_pass(reader_of, **request)
    elif action == "resume":
        answer = common.run_resume(reader_of, **request)
    elif action == "order":
        answer = common.run_order(importlib.import_module(module), **request)
    else:
        answer = getattr(importlib.import_module(module), action)(**request)
    Path(answer_file).write_bytes(pickle.dumps(answer))


if __name__ == "__main__":
    main()
