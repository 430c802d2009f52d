"""One process: `python -P run.py MODULE ACTION REQUEST ANSWER`, the last two being pickle files.

`pass`, `resume` and `order` measure a reader; any other action is a function of the module.
"""

from __future__ import annotations

import gc
import importlib
import pickle
import sys
import types
from pathlib import Path
from typing import Any


def main() -> None:
    name, action, request_file, answer_file = sys.argv[1:]
    # The environment is the peer's: of ours it sees this package's modules, and nothing that lies beside them.
    package = types.ModuleType("gptscale")
    package.__path__ = [str(Path(__file__).resolve().parents[2])]
    sys.modules["gptscale"] = package

    from gptscale.runtime.malloc import keep_freed_memory

    keep_freed_memory()  # for all, as training ranks do
    request = pickle.loads(Path(request_file).read_bytes())
    answer: object
    if action in ("pass", "resume", "order"):
        answer = measure(name, action, request)
    else:
        answer = getattr(importlib.import_module(f"gptscale.bench.readers.{name}"), action)(**request)
    Path(answer_file).write_bytes(pickle.dumps(answer))


def measure(name: str, action: str, request: dict[str, Any]) -> object:
    import torch

    from gptscale.bench.readers import common

    torch.set_num_threads(1)
    # Or the collector goes through torch's objects, 70 ms, in the middle of whatever is measured.
    gc.collect()
    gc.freeze()

    def module() -> Any:
        return importlib.import_module(f"gptscale.bench.readers.{name}")

    if action == "pass":
        return common.run_pass(lambda: module().Reader, **request)
    if action == "resume":
        return common.run_resume(lambda: module().Reader, **request)
    return common.run_order(module(), **request)


if __name__ == "__main__":
    main()
