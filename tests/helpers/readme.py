"""The README as data: its commands, its blocks, its inline code, and what of gptscale each command would start."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from tests.helpers.processes import REPOSITORY

TEXT = (REPOSITORY / "README.md").read_text()
_FENCES = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language; "" for those without."""
    return [body for name, body in _FENCES.findall(TEXT) if name == language]


def commands() -> list[str]:
    """Every command of the page in order, lines joined that a backslash breaks; each text once."""
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    return list(dict.fromkeys(line for line in lines if line.strip()))


def inline_code() -> list[str]:
    return re.findall(r"`([^`\n]+)`", _FENCES.sub("", TEXT))


@dataclass(frozen=True)
class Started:
    """What a command hands to gptscale: a verb, its arguments, and on how many ranks (0: the settings say it)."""

    verb: str
    arguments: list[str]
    ranks: int


def started(command: str) -> Started | None:
    """None where the command starts nothing of gptscale."""
    if kept := re.fullmatch(r"\w+=\$\((.*)\)", command):  # its output in a variable
        return started(kept[1])
    words = shlex.split(command)
    if words[0] == "gptscale":
        return Started(words[1], words[2:], 0)
    if words[:2] == ["docker", "run"]:
        at = words.index("gptscale")
        return Started(words[at + 1], words[at + 2 :], 0)
    if words[0] == "sbatch":
        script = next(word for word in words[1:] if not word.startswith("--"))
        if script == "launch/prepare.slurm":
            return Started("prepare", words[words.index(script) + 1 :], 0)
        per_node = _option((REPOSITORY / script).read_text().split(), "--ntasks-per-node", 1)
        ranks = _option(words, "--ntasks-per-node", per_node) * _option(words, "--nodes", 1)
        return Started("train", words[words.index(script) + 1 :], ranks)
    if words[0] in ("deepspeed", "launch/train_deepspeed.sh"):
        at = words.index("gptscale.train") if words[0] == "deepspeed" else 0
        return Started("train", words[at + 1 :], _option(words, "--num_gpus", 8))
    if words[0] in ("torchrun", "srun"):
        ranks = _option(words, "--nproc-per-node" if words[0] == "torchrun" else "--ntasks-per-node", 1)
        return Started("train", words[words.index("gptscale.train") + 1 :], ranks)
    return None


def _option(words: list[str], name: str, default: int) -> int:
    """The number after `--name=` or `--name `."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == name:
            return int(following)
        if word.startswith(f"{name}="):
            return int(word.removeprefix(f"{name}="))
    return default
