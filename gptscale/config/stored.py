"""The settings that a run was stored with, for whoever asks what it did with its text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gptscale.config.build import build
from gptscale.config.schema import TrainRoot
from gptscale.runtime.errors import UserError

_GROUPS = ("run", "data", "tokenizer", "train", "parallel", "launch")
"""What decides which samples a step takes, and which rank. The rest may hold secrets that are not there any more."""


def stored_data_settings(path: Path) -> TrainRoot:
    """A run's config.yaml, as far as it decides samples; other groups are the defaults.

    Raises UserError where the file is missing or damaged, or asks for a variable of the environment that is not set.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    fix = "name a run that has its config.yaml, or copy the file there again"
    try:
        config = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing, so nobody knows the run's settings\n{fix}") from error
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__})\n{fix}") from error
    values: dict[str, Any] = {}
    if not isinstance(config, DictConfig):
        raise UserError(f"{path}: damaged (no settings in it)\n{fix}")
    for group in _GROUPS:
        if OmegaConf.is_dict(config.get(group)):
            try:
                values[group] = OmegaConf.to_container(config[group], resolve=True)
            except OmegaConfBaseException as error:
                what = str(error).splitlines()[0]
                raise UserError(f"{path}: {error.full_key}: {what}\nset what it asks for, as in the run") from error
    try:
        return build(TrainRoot, values)
    except UserError as error:
        what = str(error).splitlines()[0]
        raise UserError(f"{path}: {what}\nuse the version of gptscale that the run was trained with") from error
