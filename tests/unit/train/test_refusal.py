"""What a refusal to go on offers, and what a report calls a layout."""

from __future__ import annotations

from gptscale.config.compose import compose
from gptscale.config.rules import check
from gptscale.config.schema import CorpusConfig, TrainRoot
from gptscale.train.facts import layout_name
from gptscale.train.refusal import stage_instead


def test_changed_filters_are_offered_as_a_stage() -> None:
    state = {"settings": {"data": {"path": None}}, "progress": {"tokens": 700}}
    keys = ["data.filters.min_characters", "data identity.corpora[0].manifest"]
    typed = stage_instead(keys, state, {"data": {"stages": []}}, [CorpusConfig("corpora/other")])
    assert typed is not None
    assert "keep the former data.filters and add" in typed
    assert "from_tokens: 700" in typed
    assert stage_instead([*keys, "model.layers"], state, {"data": {"stages": []}}, []) is None


def test_a_layout_names_its_experts() -> None:
    settings = compose("train", TrainRoot, ["experiment=tiny", "parallel.expert=2", "parallel.zero_stage=2"]).settings
    assert layout_name(settings) == "ZeRO-2, expert 2"


def test_selective_recomputation_may_leave_layers_out() -> None:
    asked = ["parallel.activation_checkpointing=selective", "parallel.checkpoint_interval=2"]
    check(compose("train", TrainRoot, ["experiment=tiny", *asked]).settings, 1)
