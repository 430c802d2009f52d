from __future__ import annotations

import random
from itertools import pairwise
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptscale.checkpoint.span import Span, find_fault_in_cover, make_span, shared_by
from gptscale.flow import TensorShard

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@st.composite
def ranges(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int, int, TensorShard | None]:
    shard = None
    if draw(st.booleans()):
        dim = draw(st.integers(0, len(shape) - 1))
        start = draw(st.integers(0, shape[dim] - 1))
        shard = TensorShard(dim, start, draw(st.integers(1, shape[dim] - start)))
    elements = prod(shape) if shard is None else prod(shape) // shape[shard.dim] * shard.size
    start = draw(st.integers(0, elements))
    return start, draw(st.integers(0, elements - start)), shard


def elements_of(shape: tuple[int, ...], start: int, count: int, shard: TensorShard | None) -> np.ndarray:
    """Flat index within the whole parameter of each element of a range, by brute force."""
    index = np.arange(prod(shape)).reshape(shape)
    if shard is not None:
        index = np.take(index, range(shard.start, shard.start + shard.size), axis=shard.dim)
    return index.reshape(-1)[start : start + count]


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_overlap_is_the_intersection_element_for_element(data: st.DataObject) -> None:
    shape = data.draw(SHAPES)
    source, target = data.draw(ranges(shape)), data.draw(ranges(shape))
    source_elements, target_elements = elements_of(shape, *source), elements_of(shape, *target)
    pairs = []
    for overlap in shared_by(make_span(shape, *source), make_span(shape, *target)):
        for row in range(overlap.rows):
            for column in range(overlap.columns):
                a = overlap.source + row * overlap.source_stride + column
                b = overlap.target + row * overlap.target_stride + column
                assert source_elements[a] == target_elements[b]
                pairs.append(int(source_elements[a]))
    assert sorted(pairs) == sorted(set(source_elements.tolist()) & set(target_elements.tolist()))


def test_a_shard_along_the_first_dim_is_a_plain_range() -> None:
    assert make_span((8, 3), 2, 4, TensorShard(0, 4, 2)) == Span((8, 3), 14, 4)
    assert make_span((1, 8, 3), 2, 4, TensorShard(1, 4, 2)) == Span((1, 8, 3), 14, 4)


def test_a_shard_that_is_everything_is_none() -> None:
    assert make_span((8, 3), 2, 4, TensorShard(1, 0, 3)) == Span((8, 3), 2, 4)


@pytest.mark.parametrize(
    ("start", "count", "shard"),
    [
        (0, 25, None),
        (-1, 2, None),
        (20, 5, None),
        (0, 9, TensorShard(1, 0, 1)),
        (0, 1, TensorShard(1, 2, 2)),
        (0, 1, TensorShard(2, 0, 1)),
        (0, 0, TensorShard(1, 1, 0)),
    ],
)
def test_a_range_beyond_its_parameter_is_refused(start: int, count: int, shard: TensorShard | None) -> None:
    with pytest.raises(ValueError, match="shape"):
        make_span((8, 3), start, count, shard)


@settings(max_examples=100, deadline=None)
@given(SHAPES, st.integers(0, 2**32))
def test_a_cover_has_no_fault_and_any_change_to_it_has_one(shape: tuple[int, ...], seed: int) -> None:
    draw = random.Random(seed)
    dim = draw.randrange(len(shape))
    cuts = sorted({0, shape[dim], draw.randrange(shape[dim] + 1)})
    spans = []
    for start, end in pairwise(cuts):
        shard = TensorShard(dim, start, end - start)
        elements = prod(shape) // shape[dim] * shard.size
        middle = draw.randrange(elements + 1)
        spans += [make_span(shape, 0, middle, shard), make_span(shape, middle, elements - middle, shard)]
    spans = [span for span in spans if span.count]
    draw.shuffle(spans)
    assert find_fault_in_cover(shape, spans) is None
    assert "missing" in str(find_fault_in_cover(shape, spans[1:]))
    assert "twice" in str(find_fault_in_cover(shape, [*spans, draw.choice(spans)]))


def test_a_fault_names_the_elements() -> None:
    band = TensorShard(1, 1, 2)
    assert find_fault_in_cover((4, 3), [Span((4, 3), 0, 5), Span((4, 3), 6, 6)]) == (
        "elements of the parameter: [5, 6) is missing"
    )
    assert find_fault_in_cover((4, 3), [Span((4, 3), 0, 8, band)]) == "indices of dim 1: [0, 1) is missing"
    rest = Span((4, 3), 0, 4, TensorShard(1, 0, 1))
    assert find_fault_in_cover((4, 3), [rest, Span((4, 3), 0, 7, band)]) == f"elements of {band}: [7, 8) is missing"
    assert find_fault_in_cover((4, 3), []) == "elements of the parameter: [0, 12) is missing"
    assert "more than one way" in str(find_fault_in_cover((4, 3), [rest, Span((4, 3), 0, 12)]))
