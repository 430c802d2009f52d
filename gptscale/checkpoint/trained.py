"""A trained model from a run folder or a checkpoint, for whoever uses it: generation, evaluation, export."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gptscale.checkpoint.folder import CHECKPOINTS, MANIFEST, list_checkpoints
from gptscale.checkpoint.manifest import DamagedError
from gptscale.checkpoint.read import Checkpoint, open_checkpoint
from gptscale.config.build import build
from gptscale.config.schema import ModelConfig, PrecisionConfig
from gptscale.flow import Piece
from gptscale.model.gpt import GPT
from gptscale.runtime.errors import UserError
from gptscale.tokenizer import Tokenizer, find_tokenizer
from gptscale.tokenizer.tokenizer import FILES

COMPUTE_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Trained:
    model: GPT
    tokenizer: Tokenizer
    checkpoint: Checkpoint


def load_trained(source: Path, device: torch.device, report: Callable[[str], None]) -> Trained:
    """The model of a checkpoint, or of the newest checkpoint of a run that is whole, in evaluation mode on `device`.

    Every byte that is used is compared with its checksum. A damaged checkpoint of a run is reported and the next older
    one taken; raises UserError where there is none.
    """
    if (source / MANIFEST).exists():
        return _load(source, device)
    candidates = list_checkpoints(source / CHECKPOINTS)
    if not candidates:
        raise UserError(f"{source} holds no checkpoint\nname a run folder (runs/NAME) or a checkpoint in it")
    for path in candidates:
        try:
            return _load(path, device)
        except DamagedError as error:
            report(f"damaged checkpoint, taking the next older one: {error.path}: {error.problem}")
    raise UserError(f"{source}: none of its {len(candidates)} checkpoints is whole\nrestore one from a copy")


def _load(path: Path, device: torch.device) -> Trained:
    checkpoint = open_checkpoint(path)
    settings = checkpoint.state["settings"]
    compute = build(PrecisionConfig, settings["precision"], "precision").compute
    if compute == "fp16" and device.type == "cpu":
        compute = "fp32"  # what a CPU is fast in; fp16 is a GPU's
    model = GPT(
        build(ModelConfig, settings["model"], "model"),
        checkpoint.state["vocab_size"],
        _longest_trained_on(checkpoint.state),
        COMPUTE_TYPES[compute],
    )
    checkpoint.require_shapes({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
    checkpoint.fill(
        [
            Piece(name, "weight", tuple(parameter.shape), 0, parameter.data.view(-1))
            for name, parameter in model.named_parameters()
        ]
    )
    return Trained(model.to(device).eval(), _tokenizer(checkpoint), checkpoint)


def _longest_trained_on(state: Mapping[str, Any]) -> int:
    """Tokens of the longest sequences that the model has seen. Stages that its run has yet to begin do not count."""
    samples, stages = state["progress"]["position"]["samples"], state["data"].get("stages", [])
    begun = [stage["sequence_length"] for stage in stages if stage["start"] < samples]
    longest: int = max([state["settings"]["data"]["sequence_length"], *begun])
    return longest


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The copy in the run folder; for a checkpoint that was copied elsewhere, one that was put beside it."""
    for folder in (checkpoint.path, checkpoint.path.parent.parent):
        if (path := find_tokenizer(folder)) is not None:
            tokenizer = Tokenizer.load(path)
            if tokenizer.sha256 != checkpoint.state["tokenizer_sha256"]:
                raise UserError(
                    f"{path} is not the tokenizer that this model was trained with\n"
                    f"put the run's own {path.name} beside the checkpoint"
                )
            return tokenizer
    raise UserError(
        f"{checkpoint.path} has no {' or '.join(FILES)} with it\ncopy the run's into the checkpoint's folder"
    )
