from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import xxhash

from gptscale.checkpoint.manifest import (
    DamagedError,
    Manifest,
    StoredFile,
    StoredParameter,
    StoredPiece,
    read_manifest,
    render,
)
from gptscale.checkpoint.span import Span
from gptscale.flow import TensorShard
from gptscale.runtime.errors import UserError

FILE = "rank-00000.safetensors"


def example(state: dict[Any, Any] | None = None) -> Manifest:
    left, right = (
        StoredPiece(FILE, f"w:weight@0/1.{start}.2", 80 + 32 * start, Span((6, 4), 0, 12, TensorShard(1, start, 2)))
        for start in (0, 2)
    )
    return Manifest(
        step=12,
        state={"samples": 3, "rate": 1e-4, "name": "é", "nested": {"list": [1, None]}} if state is None else state,
        layout={"ranks": 2},
        parameters={"w": StoredParameter((6, 4), {"weight": (left, right)})},
        files={FILE: StoredFile(400, ("ab" * 16,))},
    )


def write(folder: Path, manifest: Manifest) -> Path:
    path = folder / "manifest.json"
    path.write_bytes(render(manifest))
    return path


def reseal(path: Path, change: dict[str, Any]) -> None:
    """What somebody who forges a manifest, checksum included, would write."""
    content = {**json.loads(path.read_bytes()), **change}
    del content["xxh3_128"]
    body = json.dumps(content)[:-1]
    path.write_text(f'{body},\n"xxh3_128": "{xxhash.xxh3_128_hexdigest((body + chr(10) + "}").encode())}"\n}}')


def test_it_is_json_with_a_line_for_each_parameter_and_file(tmp_path: Path) -> None:
    path = write(tmp_path, example())
    content = json.loads(path.read_bytes())
    assert content["parameters"]["w"]["weight"][1] == {
        "file": FILE,
        "key": "w:weight@0/1.2.2",
        "offset": 144,
        "start": 0,
        "count": 12,
        "shard": [1, 2, 2],
    }
    lines = path.read_text().splitlines()
    assert sum(line.startswith('"w": ') for line in lines) == 1
    assert sum(line.startswith(f'"{FILE}": ') for line in lines) == 1
    unsealed = path.read_bytes().rsplit(b",", 1)[0] + b"\n}"
    assert xxhash.xxh3_128_hexdigest(unsealed) == content["xxh3_128"]


def test_a_manifest_comes_back_as_it_was(tmp_path: Path) -> None:
    write(tmp_path, example())
    assert read_manifest(tmp_path) == example()


def test_a_flipped_bit_in_any_byte_is_damage(tmp_path: Path) -> None:
    path = write(tmp_path, example())
    intact = path.read_bytes()
    for position in range(len(intact)):
        damaged = bytearray(intact)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(DamagedError, match=r"manifest\.json"):
            read_manifest(tmp_path)


def test_every_truncation_is_damage(tmp_path: Path) -> None:
    path = write(tmp_path, example())
    intact = path.read_bytes()
    for length in range(len(intact)):
        path.write_bytes(intact[:length])
        with pytest.raises(DamagedError, match=r"manifest\.json"):
            read_manifest(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b'"x"', b"{}", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_manifest_is_damage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(DamagedError, match="checksum"):
        read_manifest(tmp_path)


def test_a_missing_manifest_is_damage(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match="missing"):
        read_manifest(tmp_path)


def test_a_later_format_is_no_damage_but_refused(tmp_path: Path) -> None:
    path = write(tmp_path, example())
    reseal(path, {"version": 2})
    with pytest.raises(UserError, match="version 2") as raised:
        read_manifest(tmp_path)
    assert not isinstance(raised.value, DamagedError)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"parameters": []},
        {"parameters": {"w": {"shape": [3, 4], "weight": []}}},
        {"files": {"../secret": {"bytes": 400, "chunks": ["ab"]}}},
        {"files": {"/etc/passwd": {"bytes": 400, "chunks": ["ab"]}}},
        {"files": {FILE: {"bytes": 100, "chunks": ["ab"]}}},
        {"files": {FILE: {"bytes": 400, "chunks": []}}},
        {"files": {FILE: {"bytes": 0, "chunks": []}}},
        {"files": {}},
        {"chunk_bytes": 0},
        {"chunk_bytes": 2**50},
        {"step": None},
    ],
)
def test_a_sealed_manifest_that_cannot_be_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = write(tmp_path, example())
    reseal(path, {})
    assert read_manifest(tmp_path) == example()
    reseal(path, change)
    with pytest.raises(DamagedError):
        read_manifest(tmp_path)


def test_keys_of_state_that_are_numbers_become_text(tmp_path: Path) -> None:
    write(tmp_path, example({10: "a", 9: "b"}))
    assert read_manifest(tmp_path).state == {"10": "a", "9": "b"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, Path("x")])
def test_state_that_json_cannot_hold_is_an_error(value: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        render(example({"value": value}))
