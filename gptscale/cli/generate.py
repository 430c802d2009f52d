"""`gptscale generate`: a run or checkpoint → text. The completion alone goes to stdout."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from gptscale.config.compose import compose
from gptscale.config.schema import GenerateRoot
from gptscale.runtime.errors import EXIT_DONE, UserError
from gptscale.runtime.registry import load_plugins


def help_text() -> str:
    from gptscale.cli.help import settings_help

    return settings_help(
        "generate",
        "a run or checkpoint → text; several prompts give a JSON line each",
        GenerateRoot,
        "gptscale generate source=runs/tiny prompt='def main' generate.max_new_tokens=100 generate.temperature=0",
    )


def run(arguments: Sequence[str]) -> int:
    settings = compose("generate", GenerateRoot, arguments).settings
    if not settings.source:
        raise UserError("source is not set\nname a run folder or a checkpoint, e.g. source=runs/tiny")
    load_plugins(settings.plugins)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from gptscale.checkpoint.trained import load_trained
    from gptscale.generate.complete import generate

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = load_trained(Path(settings.source), device, lambda message: print(message, file=sys.stderr))
    prompts = (settings.prompt,) if isinstance(settings.prompt, str) else settings.prompt
    stream = settings.generate.stream and len(prompts) == 1
    texts = generate(trained.model, trained.tokenizer, prompts, settings.generate, _show if stream else None)
    if stream:
        print()
    elif len(prompts) == 1:
        print(texts[0])
    else:
        for prompt, text in zip(prompts, texts, strict=True):
            print(json.dumps({"prompt": prompt, "completion": text}, ensure_ascii=False))
    return EXIT_DONE


def _show(_: int, piece: str) -> None:
    print(piece, end="", flush=True)
