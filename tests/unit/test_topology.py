from __future__ import annotations

from itertools import product

import pytest

from gptscale.topology import Topology, split_batch


@pytest.mark.parametrize("axes", list(product((1, 2, 3), (1, 2), (1, 2), (1, 2))))
def test_ranks_and_coordinates_are_one_to_one(axes: tuple[int, int, int, int]) -> None:
    pipeline, data, sequence, tensor = axes
    topology = Topology(pipeline * data * sequence * tensor, pipeline=pipeline, sequence=sequence, tensor=tensor)
    assert topology.data == data
    seen = [topology.coordinates(rank) for rank in range(topology.world_size)]
    assert len(set(seen)) == topology.world_size
    assert [topology.rank(at) for at in seen] == list(range(topology.world_size))
    if tensor > 1:  # peers that talk most are neighbours
        assert seen[1].tensor == 1


def test_what_does_not_fit_is_refused_with_the_fix() -> None:
    with pytest.raises(ValueError, match=r"launch\.ranks=4"):
        Topology(6, pipeline=2, tensor=2)
    with pytest.raises(ValueError, match=r"parallel\.expert=4"):
        Topology(6, expert=4)
    with pytest.raises(ValueError, match="at least 1"):
        Topology(0)
    with pytest.raises(ValueError, match="rank 4"):
        Topology(4).coordinates(4)


@pytest.mark.parametrize(("micro_batch", "data"), list(product((1, 2, 3), (1, 2, 4))))
def test_a_batch_is_cut_into_every_row_once(micro_batch: int, data: int) -> None:
    split = split_batch(24, micro_batch, data)
    assert split.global_batch == 24
    rows = [row for rank in range(data) for row in split.rows(rank)]
    assert rows == list(range(24))
    assert split.accumulation * micro_batch == len(split.rows(0))


@pytest.mark.parametrize(("batch", "micro_batch", "data"), [(9, 2, 2), (1, 2, 1), (31, 4, 2)])
def test_the_sizes_named_in_the_refusal_work(batch: int, micro_batch: int, data: int) -> None:
    with pytest.raises(ValueError, match=r"train\.global_batch=") as refused:
        split_batch(batch, micro_batch, data)
    named = [
        int(word.strip(","))
        for word in str(refused.value).split("use ")[1].replace("=", " ").split()
        if word.strip(",").isdigit()
    ]
    assert len(named) == 2
    for size in named:
        split_batch(size, micro_batch, data)
