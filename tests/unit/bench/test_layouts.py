"""Which layouts take part, and what is made of what they tell. No processes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gptscale.bench.compare_layouts import _bubble, check_sent
from gptscale.bench.contender import Contender
from gptscale.bench.group import BenchError
from gptscale.bench.layouts import build_layouts, expected, is_one_pipeline
from gptscale.bench.turns import Watched
from gptscale.cli.main import main
from gptscale.config.compose import compose
from gptscale.config.schema import BenchLayoutsRoot


def layouts(*overrides: str) -> tuple[list[Contender], dict[str, str]]:
    return build_layouts(compose("bench_layouts", BenchLayoutsRoot, overrides).settings)


def test_every_layout_of_two_and_of_four_ranks() -> None:
    two, left_out = layouts()
    anywhere = ["ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3"]
    cut = ["tensor2", "tensor2-norms", "sequence2", "sequence2-zero3", "pipeline2"]
    assert [contender.name for contender in two] == [*anywhere, *cut, "matmul"]
    assert left_out == {}
    four, left_out = layouts("bench.ranks=4")
    assert left_out == {}
    assert len({contender.name for contender in four}) == 19
    for contender in four:
        parallel = contender.settings.parallel
        axes = [f"{axis}{getattr(parallel, axis)}" for axis in ("pipeline", "tensor", "sequence")]
        real = [axis for axis in axes if not axis.endswith("1")]
        stage = parallel.zero_stage
        if contender.kind == "engine":
            zero = [f"zero{stage}"] if not real or stage != 1 else []
            assert contender.name == "-".join([*real, *(["norms"] if parallel.shard_norms else []), *zero])
        else:
            assert real == []
        assert contender.split.global_batch == 8
    assert [contender.name for contender in four if is_one_pipeline(contender)] == ["pipeline4"]


def test_what_a_model_does_not_allow_is_left_out_unless_it_is_named() -> None:
    contenders, left_out = layouts("bench.ranks=4", "model.heads=2", "model.layers=2")
    assert {"tensor4", "tensor4-norms", "sequence4", "pipeline4", "tensor2-sequence2"} == set(left_out)
    assert left_out["tensor4"] == "parallel.tensor=4 does not divide model.heads=2"
    assert "tensor2" in [contender.name for contender in contenders]


def test_settings_of_axes_belong_to_the_contenders() -> None:
    contenders, _ = layouts("parallel.tensor=4", "parallel.pipeline=2", "parallel.pipeline_layers=[5,3]")
    by_name = {contender.name: contender.settings.parallel for contender in contenders}
    assert (by_name["zero1"].tensor, by_name["zero1"].pipeline_layers) == (1, None)
    assert (by_name["pipeline2"].tensor, by_name["pipeline2"].pipeline_layers) == (1, (5, 3))


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (["bench.ranks=3"], "bench.ranks=3: there are layouts for 2 and for 4 ranks\nset bench.ranks=2 or 4"),
        (["bench.contenders=[tensor3]"], "bench.contenders: there is no 'tensor3'\ndid you mean tensor2?"),
        (["bench.contenders=[tensor2]", "model.heads=1"], "parallel.tensor=2 does not divide model.heads=1\n"),
        (["bench.together=0"], "bench.together=0 is below 1\nset bench.together=1"),
        (["bench.warmup_steps=1"], "bench.warmup_steps=1: first steps send more than others"),
        (["bench.micro_batches=[2,0]"], "bench.micro_batches=[2, 0] has one below 1\n"),
        (["bench.micro_batches=[16]"], "bench.micro_batches=[16]: a step of pipeline2 has 8\nuse at most as many"),
        (["model.dropout=0.1"], "model.dropout=0.1: layouts drop other elements"),
        (
            ["optimizer=muon"],
            "optimizer.name=muon: what a step sends has a formula for optimizer.name=adamw\nuse that",
        ),
        (["bench.rounds=0"], "bench.rounds=0 is below 1\n"),
        (["bench.output=/nowhere/at/all.json"], "bench.output=/nowhere/at/all.json cannot be written\n"),
    ],
)
def test_mistakes_are_answered_in_two_lines(
    overrides: list[str], lines: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "layouts", *overrides]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(lines)
    assert len(captured.err.splitlines()) == 2


def test_any_other_byte_operation_or_rank_is_refused() -> None:
    contenders, _ = layouts("bench.contenders=[pipeline2]")
    pipeline = contenders[1]
    honest = [dict(of_rank) for of_rank in expected(pipeline)]
    check_sent(pipeline, honest)
    wrong: list[dict[Any, int]] = [
        honest[1] | {("send", 2): honest[1]["send", 2] + 1},
        honest[1] | {("broadcast", 2): 0},
        honest[1] | {("all-gather", 2): 8},
        {operation: count for operation, count in honest[1].items() if operation != ("send", 2)},
    ]
    for of_rank in wrong:
        with pytest.raises(BenchError, match=r"pipeline2: rank 1 hands .* and by formula .*\nno figures are reported"):
            check_sent(pipeline, [honest[0], of_rank])


def test_ddp_and_fsdp2_on_paper() -> None:
    model = ["model.layers=1", "model.width=6", "model.heads=1", "model.vocab_multiple=1", "tokenizer.vocab_size=301"]
    contenders, _ = layouts(*model, "data.sequence_length=5", "bench.ranks=4", "bench.contenders=[fsdp2]")
    ddp, fsdp2, _ = contenders
    norms, linears = 4 * 6, 4 * 6 * 6 + 4 * 6 + 2 * 6 * 24 + 24 + 6
    outside = 301 * 6 + 5 * 6 + 2 * 6
    assert expected(ddp) == [{("all-reduce", 4): 4 * (norms + linears + outside) + 4}] * 4
    # Six rows become eight, 24 stay, 301 become 304, and 5 become 8: of biases and norms too.
    norms, linears = 4 * 8, 4 * 8 * 6 + 4 * 8 + 24 * 6 + 8 * 24 + 24 + 8
    outside = 304 * 6 + 8 * 6 + 2 * 8
    assert expected(fsdp2)[0] == {
        ("reduce-scatter", 4): 2 * 4 * (norms + linears + outside),
        ("all-gather", 4): 2 * 4 * (2 * (norms + linears) + outside),
        ("all-reduce", 4): 4 * (1 + 20),
    }


def test_a_bubble_is_what_is_not_computed_between_the_first_pass_and_the_last() -> None:
    """Two stages and two micro-batches, of one second each way on the first and of two on the second."""
    first = ((0.0, 1.0), (1.0, 2.0), (5.0, 6.0), (9.0, 10.0))
    second = ((1.0, 3.0), (3.0, 5.0), (5.0, 7.0), (7.0, 9.0))
    found = _bubble("pipeline2", 2, [[Watched((first, first)), Watched((second, second))]])
    assert found.stage_s == (2.0, 4.0)
    assert found.measured == pytest.approx(1 - (4 + 8) / (2 * 10))
    assert found.expected == pytest.approx(1 / 3)
    assert found.expected_of_these_stages == pytest.approx(found.measured)
    equal = replace(found, stage_s=(3.0, 3.0))
    assert equal.expected_of_these_stages == pytest.approx(equal.expected)
