from __future__ import annotations

from pathlib import Path

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file

from gptscale.checkpoint.tensor_file import lay_out, write_tensor_file

KEYS = ("a:weight@0", "β", 'quote"d', "d")


def test_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    whole = torch.arange(1000, dtype=torch.float32)
    tensors = dict(zip(KEYS, whole.split([1, 7, 492, 500]), strict=True))
    head, offsets = lay_out([(key, values.numel()) for key, values in tensors.items()])
    write_tensor_file(tmp_path / "x.safetensors", head, list(tensors.values()))
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for key, values in tensors.items():
        assert torch.equal(loaded[key], values)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert torch.equal(file.get_slice("d")[10:20], whole[510:520])
    raw = (tmp_path / "x.safetensors").read_bytes()
    for offset, values in zip(offsets, tensors.values(), strict=True):
        assert raw[offset : offset + 4 * values.numel()] == values.numpy().tobytes()


@pytest.mark.parametrize("chunk_bytes", [4, 64, 100, 4096, 2**24])
def test_chunks_are_hashes_of_the_file_from_its_start(tmp_path: Path, chunk_bytes: int) -> None:
    head, _ = lay_out([("a", 300), ("b", 5)])
    path = tmp_path / "x.safetensors"
    stored = write_tensor_file(path, head, [torch.randn(300), torch.randn(5)], chunk_bytes)
    raw = path.read_bytes()
    assert stored.size_bytes == len(raw)
    assert stored.chunks == tuple(
        xxhash.xxh3_128_hexdigest(raw[start : start + chunk_bytes]) for start in range(0, len(raw), chunk_bytes)
    )


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(FileExistsError):
        write_tensor_file(tmp_path / "x", b"", [])
    assert (tmp_path / "x").read_text() == "mine"


def test_one_key_twice_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="key a"):
        lay_out([("a", 1), ("a", 2)])


def test_values_that_are_not_contiguous_fp32_are_a_bug(tmp_path: Path) -> None:
    head, _ = lay_out([("a", 4)])
    for index, values in enumerate([torch.zeros(8)[::2], torch.zeros(4, dtype=torch.float64)]):
        with pytest.raises(AssertionError):
            write_tensor_file(tmp_path / str(index), head, [values])
