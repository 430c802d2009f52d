from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from gptscale.config.build import build, defaults, flat_keys, plain, unknown_key
from gptscale.config.schema import GenerateRoot, PrepareRoot, TrainRoot
from gptscale.runtime.errors import UserError


@dataclass(frozen=True)
class Inner:
    size: int = 1
    share: float = 0.5


@dataclass(frozen=True)
class Outer:
    name: str | None = None
    kind: Literal["a", "b"] = "a"
    on: bool = False
    inner: Inner = field(default_factory=Inner)
    many: tuple[Inner, ...] = ()
    either: str | tuple[str, ...] = ""


def test_plain_data_becomes_typed_and_back() -> None:
    values = {"name": "x", "inner": {"size": 3, "share": 1}, "many": [{"size": 4}], "either": ["p", "q"]}
    made = build(Outer, values)
    assert made == Outer("x", inner=Inner(3, 1.0), many=(Inner(4),), either=("p", "q"))
    assert build(Outer, plain(made)) == made
    assert isinstance(made.inner.share, float)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"inner": {"sise": 1}}, ["inner.sise", "inner.size"]),
        ({"inner": {"size": 1.5}}, ["inner.size", "whole number", "1.5"]),
        ({"inner": {"size": "two"}}, ["inner.size", "whole number"]),
        ({"inner": {"size": True}}, ["inner.size", "whole number"]),
        ({"inner": 3}, ["inner", "group"]),
        ({"kind": "c"}, ["kind=c", "a, b"]),
        ({"on": 1}, ["on", "true or false"]),
        ({"many": "x"}, ["many", "list"]),
        ({"many": [{"size": 1}, {"siz": 2}]}, ["many[1].siz", "many[1].size"]),
    ],
)
def test_mistakes_name_the_key_and_the_fix(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        build(Outer, values)
    assert len(str(refused.value).splitlines()) == 2
    for word in words:
        assert word in str(refused.value)


def test_numbers_as_people_write_them() -> None:
    assert build(Inner, {"size": 1e6}) == Inner(1_000_000)
    assert build(Outer, {"name": 7}) == Outer("7")


def test_a_right_name_in_the_wrong_group_is_found() -> None:
    known = flat_keys(TrainRoot)
    assert "model.layers" in unknown_key("train.layers", known)
    assert "there are" in unknown_key("zzz", known)


@pytest.mark.parametrize("schema", [TrainRoot, PrepareRoot, GenerateRoot])
def test_defaults_build_their_own_schema(schema: type[Any]) -> None:
    assert build(schema, defaults(schema)) == schema()
