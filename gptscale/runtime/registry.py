"""Parts that are chosen by name, and the three places that a name may come from.

Ours are registered where they are defined. A user's own are registered by a module that the `plugins` setting names, or
by an installed package through an entry point, `[project.entry-points."gptscale.optimizers"]  lion = "pkg.lion:build"`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Generic, TypeVar, cast

from gptscale.runtime.errors import UserError

T = TypeVar("T")


class Registry(Generic[T]):
    """The parts of one kind, by name."""

    def __init__(self, key: str, entry_point_group: str) -> None:
        """`key` is the setting that chooses among them; installed packages offer more in `entry_point_group`."""
        self._key = key
        self._group = entry_point_group
        self._parts: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator. Raises ValueError where the name is taken: nothing of ours is replaced unnoticed."""

        def add(part: T) -> T:
            if name in self._parts:
                raise ValueError(f"{self._key}={name} is registered already: choose another name")
            self._parts[name] = part
            return part

        return add

    def names(self) -> list[str]:
        """All that can be chosen."""
        return sorted({*self._parts, *(point.name for point in entry_points(group=self._group))})

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def get(self, name: str, key: str | None = None) -> T:
        """The part of this name; raises UserError with the near name. `key` is what the error calls the setting."""
        if name not in self._parts:
            for point in entry_points(group=self._group):
                if point.name == name:
                    self._parts[name] = cast(T, point.load())
                    return self._parts[name]
            near = difflib.get_close_matches(name, self.names(), n=1)
            there = f"there are: {', '.join(self.names())}; one of your own needs its module in plugins=[…]"
            raise UserError(f"{key or self._key}={name} is not known\n{f'did you mean {near[0]}?' if near else there}")
        return self._parts[name]


_LOADED: list[str] = []


def loaded_plugins() -> tuple[str, ...]:
    """For processes that this one starts."""
    return tuple(_LOADED)


def load_plugins(plugins: Sequence[str]) -> None:
    """Import the modules (`package.module`, or `path/to/file.py`) that register a user's parts, once each.

    They come from the command line or its settings only, never from a checkpoint: to load somebody's weights must not
    run their code. Raises UserError where there is no such module; an error inside it is the user's to see whole.
    """
    for plugin in plugins:
        if plugin in _LOADED:
            continue
        if plugin.endswith(".py"):
            _load_file(Path(plugin))
        else:
            _load_module(plugin)
        _LOADED.append(plugin)


def _load_module(name: str) -> None:
    try:
        found = importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of a parent package
        found = False
    if not found:
        raise UserError(f"plugins: there is no module {name}\ninstall it, set PYTHONPATH, or name a file: [./x.py]")
    importlib.import_module(name)


def _load_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"plugins: there is no file {path}\ncorrect the path; it starts from the working directory")
    name = f"gptscale_plugin_{path.stem}"
    if name in sys.modules:
        raise UserError(f"plugins: two files are called {path.name}\nrename one of them")
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
