"""Hydra overrides → typed settings.

`conf/` holds one YAML root a verb and one folder a group. The schemas' defaults are the base that the YAML files and
then the command line override, so a key exists exactly when the schema has it.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from gptscale.config.build import build, defaults, flat_keys, option_keys, plain, unknown_key
from gptscale.config.depth import DERIVED_KEYS, SIZE_KEYS, derive
from gptscale.config.schema import TrainRoot
from gptscale.config.secrets import hide_environment
from gptscale.runtime.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Composed(Generic[T]):
    settings: T
    choices: dict[str, str]
    """Chosen option of each group, e.g. {"model": "tiny", "experiment": "tiny"}."""
    public: dict[str, Any]
    """The settings as plain data to be stored: resolved, but what comes from the environment stays a reference."""

    def to_yaml(self) -> str:
        from omegaconf import OmegaConf

        return OmegaConf.to_yaml(OmegaConf.create(self.public))


def conf_folder() -> Path:
    """Where the YAML files are: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise RuntimeError("the conf folder is missing from this installation")


def group_options(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))


def compose(verb: str, schema: type[T], overrides: Sequence[str]) -> Composed[T]:
    """Compose `conf/<verb>.yaml` with the overrides; raises UserError on anything the user got wrong."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

    _check_overrides(schema, overrides)
    # An option of a user's own part is new to Hydra: `++` adds it, or sets it where a file has it already.
    own = tuple(f"{key}." for key in option_keys(schema))
    overrides = [f"++{text}" if text.startswith(own) else text for text in overrides]
    ConfigStore.instance().store(name="schema", node=_open_defaults(schema))
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_folder()), version_base="1.3", job_name=verb):
            composed = hydra_compose(verb, overrides=list(overrides), return_hydra_config=True)
        choices = {str(k): str(v) for k, v in composed.hydra.runtime.choices.items() if not str(k).startswith("hydra/")}
        OmegaConf.set_readonly(composed, False)
        OmegaConf.set_struct(composed, False)
        del composed["hydra"]
        if OmegaConf.is_dict(composed.get("run")):
            name_run(composed.run, choices)
        unset = _take_defaults(composed, schema)
        settings = _build(schema, composed)
        if isinstance(settings, TrainRoot) and settings.model.depth is not None:
            refuse_two_sizes(settings.model.depth, choices)
            for key, value in derive(settings, unset).items():
                OmegaConf.update(composed, key, value)
            settings = _build(schema, composed)
    except InterpolationResolutionError as error:
        what = _two_lines(error).splitlines()[0].rpartition("resolving interpolation: ")[2].strip('"')
        raise UserError(f"{error.full_key}: {what}\nset it, or write another value") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_two_lines(error)) from error
    return Composed(settings=settings, choices=choices, public=hide_environment(plain(settings), composed))


def name_run(run: Any, choices: dict[str, str]) -> None:
    """A run is called after its experiment unless it is named, and lives under runs/: the same on every start."""
    for key in ("name", "dir"):
        if run[key] == "":  # would be the folder of all runs
            raise UserError(f"run.{key} is empty\ngive it a value, or leave it out for the default")
    if run.name is None:
        chosen = choices.get("experiment", "None")
        run.name = chosen if chosen != "None" else "train"
    if run.dir is None:
        run.dir = "runs/${.name}"


def refuse_two_sizes(depth: int, choices: dict[str, str]) -> None:
    """Refuse `model.depth` beside a model option with a size of its own. Single keys that are set by hand may stay."""
    from omegaconf import OmegaConf

    option = OmegaConf.load(conf_folder() / "model" / f"{choices['model']}.yaml")
    own = [key for key in SIZE_KEYS if key.partition(".")[2] in option]
    if own:
        raise UserError(
            f"model.depth={depth} gives the model its size, but model={choices['model']} has its own ({own[0]})\n"
            f"use model=depth model.depth={depth}, or leave model.depth out"
        )


def _open_defaults(schema: type[Any]) -> dict[str, Any]:
    """The schema's defaults, but a mark where `model.depth` may decide: what keeps it, nobody has set."""
    values = defaults(schema)
    for key in DERIVED_KEYS:
        group, _, name = key.partition(".")
        if group in values and name in values[group]:
            values[group][name] = "???"  # OmegaConf's "missing"
    return values


def _take_defaults(composed: Any, schema: type[Any]) -> set[str]:
    """Put the schema's defaults where nobody set anything; returns the `DERIVED_KEYS` of which that is so."""
    from omegaconf import OmegaConf

    unset = set()
    known = defaults(schema)
    for key in DERIVED_KEYS:
        group, _, name = key.partition(".")
        if OmegaConf.is_dict(composed.get(group)) and OmegaConf.is_missing(composed[group], name):
            composed[group][name] = known[group][name]
            unset.add(key)
    return unset


def _build(schema: type[T], composed: Any) -> T:
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    return build(schema, {str(key): value for key, value in values.items()})


def _check_overrides(schema: type[Any], overrides: Sequence[str]) -> None:
    """Answer typos before Hydra does: its own messages are long and name no near key."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Override
    from hydra.errors import HydraException

    groups = {path.name for path in conf_folder().iterdir() if path.is_dir()}
    keys = flat_keys(schema)
    own = tuple(f"{key}." for key in option_keys(schema))
    parser = OverridesParser.create()
    for text in overrides:
        if text.startswith("-"):
            raise UserError(f"there is no option '{text}'\nsettings are key=value; --help lists them")
        try:
            override: Override = parser.parse_override(text)
        except HydraException as error:
            raise UserError(
                f"'{text}' is not of the form key=value ({_two_lines(error).splitlines()[0]})\n"
                "quote values with spaces or brackets: \"key='a b'\""
            ) from error
        key = override.key_or_group
        value = override.value()
        if text.startswith("~"):
            raise UserError(
                f"'{text}': a setting cannot be taken away\nset it to another value, or to null where it may be"
            )
        if key in groups and isinstance(value, str):
            options = group_options(key)
            if value not in options:
                near = difflib.get_close_matches(value, options, n=1)
                fix = f"did you mean {key}={near[0]}?" if near else f"there are: {', '.join(options)}"
                raise UserError(f"there is no {key}={value}\n{fix}")
        elif key in groups and not isinstance(value, dict):
            raise UserError(f"'{text}' names more than one {key}\ngive one: {key}={group_options(key)[0]}")
        elif key not in keys and key not in groups and not _inside_list(key, keys) and not key.startswith(own):
            raise UserError(unknown_key(key, [*keys, *groups]))


def _inside_list(key: str, keys: Sequence[str]) -> bool:
    """`data.sources.0.path` reaches into a list, whose keys are checked when the settings are built."""
    return any(key.startswith(f"{known}.") and key[len(known) + 1 :].split(".")[0].isdigit() for known in keys)


def _two_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "\n".join(lines[:2])
