"""Texts that come from the environment, passwords perhaps: a run stores what was written, never what it resolved to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def hide_environment(values: Any, config: Any) -> Any:
    """`values`, with every text for which `config` asks the environment, directly or not, as it is written there.

    `config` is an OmegaConf node and `values` the plain data that was built from it. Numbers and switches are no
    secrets, and whoever reads the settings again needs them.
    """
    with _watched_environment() as asked:
        return _hide(values, config, asked)


def _hide(values: Any, config: Any, asked: list[str]) -> Any:
    from omegaconf import OmegaConf

    if isinstance(values, dict) and OmegaConf.is_dict(config):
        return {key: _hide_item(value, config, key, asked) if key in config else value for key, value in values.items()}
    if isinstance(values, list) and OmegaConf.is_list(config):
        return [_hide_item(value, config, index, asked) for index, value in enumerate(values)]
    return values


def _hide_item(value: Any, config: Any, key: Any, asked: list[str]) -> Any:
    from omegaconf import OmegaConf

    asked.clear()
    resolved = config[key]
    if isinstance(value, str):
        written: Any = OmegaConf.to_container(config, resolve=False)
        return written[key] if asked else value
    return _hide(value, resolved, asked)


@contextmanager
def _watched_environment() -> Iterator[list[str]]:
    """A list that gets the name of every variable which a resolution asks for."""
    from omegaconf import OmegaConf
    from omegaconf.resolvers import oc

    asked: list[str] = []

    def env(name: str, *default: Any) -> Any:
        asked.append(name)
        return oc.env(name, *default)

    OmegaConf.register_new_resolver("oc.env", env, replace=True)
    try:
        yield asked
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)
