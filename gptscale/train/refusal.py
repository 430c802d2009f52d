"""Refuse to go on with a run under other settings or data, and say what to type instead. No torch."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from gptscale.config.build import defaults
from gptscale.config.schema import CorpusConfig, TrainRoot
from gptscale.runtime.errors import UserError
from gptscale.train.resume import differences, filled, shown

TEXT_KEYS = ("data.sources", "data.heldout_fraction", "data.shard_tokens", "data.filters", "data.shuffle_documents")
"""What the text that `data.sources` are prepared into follows from, with the tokenizer."""


def reached(identity: Mapping[str, Any], samples: int) -> dict[str, Any]:
    """What decided the first `samples` samples of a data identity: not the stages that begin with a later one. Lists
    become numbered keys, so that differences name what differs in them."""
    stages = [stage for stage in identity.get("stages", []) if stage["start"] < samples]
    numbered = {f"stages[{number}]": _numbered(stage) for number, stage in enumerate(stages)}
    return _numbered({key: value for key, value in identity.items() if key != "stages"}) | numbered


def _numbered(stage: Mapping[str, Any]) -> dict[str, Any]:
    corpora = {f"corpora[{number}]": corpus for number, corpus in enumerate(stage["corpora"])}
    return {key: value for key, value in stage.items() if key != "corpora"} | corpora


def refuse_differences(
    run_dir: str,
    state: Mapping[str, Any],
    wanted: Mapping[str, Any],
    wanted_data: Mapping[str, Any],
    tokenizer_sha256: str,
    corpora: Sequence[CorpusConfig],
) -> None:
    """Raises UserError naming all differences in settings and data identity that a resumption may not have.

    `state` is a checkpoint's, the rest what the run is started with now; `corpora` are the folders it begins with. A
    setting that a run's version did not have yet counts as its default, which is what changes nothing.
    """
    samples = state["progress"]["position"]["samples"]
    found = differences(filled(state["settings"], defaults(TrainRoot)), wanted)
    if state["tokenizer_sha256"] != tokenizer_sha256:
        found.append(f"tokenizer: {shown(state['tokenizer_sha256'])} → {shown(tokenizer_sha256)}")
    found += differences(reached(state["data"], samples), reached(wanted_data, samples), "data identity")
    if found:
        keys = [line.partition(": ")[0] for line in found]
        way_out = stage_instead(keys, state, wanted, corpora) or set_back(run_dir, keys, state["progress"]["tokens"])
        raise UserError(f"{run_dir} was trained with other settings: {'; '.join(found)}\n{way_out}")


def set_back(run_dir: str, keys: Sequence[str], tokens: int) -> str:
    """What to do about differences that a run cannot go on with."""
    more = ""
    if "tokenizer" in keys:
        more = f" (text for it is prepared with tokenizer.path={run_dir}/tokenizer.model)"
    elif any(key.startswith("data identity") and key.endswith("mixture") for key in keys):
        more = " (data.mixture=stride is the order of runs that began before there was a choice)"
    elif any(key.startswith("data identity.stages") for key in keys):
        more = f" (stages that it has begun stay as they were; later ones have from_tokens={tokens} or more)"
    return f"set them back to go on with this run{more}, or choose another run.name to start a new one"


def stage_instead(
    keys: Sequence[str], state: Mapping[str, Any], wanted: Mapping[str, Any], corpora: Sequence[CorpusConfig]
) -> str | None:
    """What to type to go on with other data from here on; None where no stage can have these differences."""
    of_path = [key for key in keys if key.startswith(("data identity.corpora", *TEXT_KEYS))]
    of_length = [key for key in keys if key in ("data.sequence_length", "data identity.sequence_length")]
    of_seed = [key for key in keys if key in ("run.seed", "data identity.seed")]
    if len(of_path) + len(of_length) + len(of_seed) < len(keys):
        return None
    saved, stages = state["settings"], wanted["data"]["stages"]
    keep, stage = [], [f"name: stage-{len(stages) + 1}", f"from_tokens: {state['progress']['tokens']}"]
    if of_path:
        before = saved["data"]["path"]
        former = [text for text in TEXT_KEYS if any(key.startswith(text) for key in keys)] or ["data.sources"]
        path = None if before is None else shlex.quote(f"data.path={_path_text(before)}")
        keep.append(f"the former {', '.join(former)}" if path is None else path)
        stage.append(f"path: {_path_text([{'path': corpus.path, 'weight': corpus.weight} for corpus in corpora])}")
    if of_length:
        keep.append(f"data.sequence_length={saved['data']['sequence_length']}")
        stage.append(f"sequence_length: {wanted['data']['sequence_length']}")
    if of_seed:
        keep.append(f"run.seed={saved['run']['seed']}")
        stage.append(f"seed: {wanted['run']['seed']}")
    entry = "{" + ", ".join(stage) + "}"
    add = f"add {entry} to data.stages" if stages else "add " + shlex.quote(f"data.stages=[{entry}]")
    return (
        f"to change data from here on, keep {' '.join(keep)} and {add}; "
        "or set them back; or choose another run.name to start a new one"
    )


def _path_text(path: Any) -> str:
    """A `path` of settings as it is typed."""
    if isinstance(path, str):
        return path if re.fullmatch(r"[\w./+-]+", path) else json.dumps(path, ensure_ascii=False)
    if len(path) == 1:
        return _path_text(path[0]["path"])
    return "[" + ", ".join(f"{{path: {_path_text(one['path'])}, weight: {one['weight']}}}" for one in path) + "]"
