"""The settings of a verb, as text."""

from __future__ import annotations

from typing import Any

from gptscale.config.build import defaults
from gptscale.config.compose import conf_folder, group_options


def settings_help(verb: str, says: str, schema: type[Any], example: str) -> str:
    """Groups with their options, then every key with its default."""
    groups = sorted(path.name for path in conf_folder().iterdir() if path.is_dir())
    values = defaults(schema)
    lines = [f"gptscale {verb}: {says}", "", f"  {example}", ""]
    chosen = [group for group in groups if group in values or (group == "experiment" and "run" in values)]
    if chosen:
        lines += ["groups", *(f"  {group}={'|'.join(group_options(group))}" for group in chosen), ""]
    lines += ["settings and their defaults (an option or experiment may set others)"]
    for name, value in values.items():
        lines += _lines(name, value)
    return "\n".join(lines)


def _lines(key: str, value: Any) -> list[str]:
    if value == {}:
        return [f"  {key}.…=  (of your own part)"]
    if isinstance(value, dict):
        return [line for name, item in value.items() for line in _lines(f"{key}.{name}", item)]
    return [f"  {key}={'null' if value is None else str(value).lower() if isinstance(value, bool) else value}"]
