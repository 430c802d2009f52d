"""Where a pipeline is cut. Plain arithmetic, and a model without a rank."""

from __future__ import annotations

from itertools import combinations, pairwise
from random import Random

import pytest
import torch

from gptscale.config.schema import ModelConfig
from gptscale.model.gpt import GPT
from gptscale.model.init import initialise
from gptscale.parallel.ranks import Group
from gptscale.parallel.slices import shard_of
from gptscale.parallel.stages import keep, parameter_weights
from gptscale.plan.stages import balanced, cuts


def heaviest(weights: list[float], counts: tuple[int, ...]) -> float:
    embedding, *blocks, head = weights
    loads = [sum(blocks[cut.blocks.start : cut.blocks.stop]) for cut in cuts(counts)]
    loads[0] += embedding
    loads[-1] += head
    return max(loads)


def test_no_other_way_is_lighter() -> None:
    draw = Random(0)
    for _ in range(200):
        blocks, stages = draw.randrange(1, 9), draw.randrange(1, 5)
        if stages > blocks:
            continue
        weights = [float(draw.randrange(20)) for _ in range(blocks + 2)]
        ways = [
            tuple(end - start for start, end in pairwise((0, *inner, blocks)))
            for inner in combinations(range(1, blocks), stages - 1)
        ]
        found = balanced(weights, stages)
        assert tuple(found) in ways
        assert heaviest(weights, tuple(found)) == min(heaviest(weights, way) for way in ways)


def test_ends_are_counted() -> None:
    assert balanced([0, 1, 1, 1, 1, 0], 2) == [2, 2]
    assert balanced([0, 1, 1, 1, 1, 2], 2) == [3, 1]
    assert balanced([2, 1, 1, 1, 1, 0], 2) == [1, 3]


@pytest.mark.parametrize("tied", [False, True])
def test_stages_hold_every_parameter_once_by_its_name(tied: bool) -> None:
    config = ModelConfig(layers=5, width=16, heads=2, tied_embeddings=tied)

    def model() -> GPT:
        made = GPT(config, 100, 8, torch.float32)
        initialise(made, 0)
        return made

    whole = dict(model().named_parameters())
    held: dict[str, list[int]] = {name: [] for name in whole}
    for number, cut in enumerate(cuts(balanced(parameter_weights(model()), 3))):
        part = model()
        keep(part, cut)
        for name, parameter in part.named_parameters():
            assert torch.equal(parameter, whole[name])
            held[name].append(number)
    assert held.pop("embedding.weight") == ([0, 2] if tied else [0])
    assert all(len(numbers) == 1 for numbers in held.values())


ALONE = Group(0, 1, None)


def test_slices_tile_what_is_cut() -> None:
    model = GPT(ModelConfig(layers=1, width=16, heads=4, feedforward="swiglu"), 100, 8, torch.float32)
    cut = []
    for name, parameter in model.named_parameters():
        shapes = [list(parameter.shape) for _ in range(2)]
        _, shard = shard_of(name, parameter.shape, Group(0, 2, None), ALONE)
        if shard is None:
            continue
        cut.append(name)
        for rank, shape in enumerate(shapes):
            shape[shard.dim] //= 2
            whole, own = shard_of(name, torch.Size(shape), Group(rank, 2, None), ALONE)
            assert whole == tuple(parameter.shape)
            assert own is not None
            assert (own.start, own.size) == (rank * shape[shard.dim], shape[shard.dim])
    layers = [f"attention.{name}" for name in "qkvo"] + [f"feedforward.{name}" for name in ("gate", "up", "down")]
    assert cut[0] == "embedding.weight"
    assert {name for name in cut if name.endswith("weight")} == {
        "embedding.weight",
        *(f"blocks.0.{layer}.weight" for layer in layers),
    }
    assert not [name for name in cut if "norm" in name or name.endswith(("o.bias", "down.bias", "positions"))]
