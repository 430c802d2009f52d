"""Counts of every ready size: the published ones, and those of a real model, without any memory for it."""

from __future__ import annotations

import resource
import time

import pytest
import torch

from gptscale.config.compose import compose, group_options
from gptscale.config.schema import ModelConfig, TrainRoot
from gptscale.model.count import matmul_parameter_count, parameter_count
from gptscale.model.gpt import GPT

VOCAB, LENGTH = 50257, 2048
"""GPT-3's."""

# Brown et al. 2020, arXiv 2005.14165: the names of table 2.1, and millions of parameters in table D.1, which are exact.
PAPER = {
    "gpt3-125m": (125e6, 125),
    "gpt3-350m": (350e6, 356),
    "gpt3-760m": (760e6, 760),
    "gpt3-1.3b": (1.3e9, 1_320),
    "gpt3-2.7b": (2.7e9, 2_650),
    "gpt3-6.7b": (6.7e9, 6_660),
    "gpt3-13b": (13.0e9, 12_850),
    "gpt3-175b": (175.0e9, 174_600),
}


@pytest.fixture(scope="module")
def models() -> dict[str, ModelConfig]:
    return {
        name: compose("train", TrainRoot, [f"model={name}", "train.steps=1"]).settings.model
        for name in group_options("model")
    }


def test_gpt3_has_as_many_parameters_as_published(models: dict[str, ModelConfig]) -> None:
    for name, (named, millions) in PAPER.items():
        counted = parameter_count(models[name], VOCAB, LENGTH)
        assert counted == pytest.approx(named, rel=0.02), name
        # Table D.1 is rounded to three or four digits; 47 rows that pad the vocabulary are ours. 0.4 % covers both.
        assert counted / 1e6 == pytest.approx(millions, rel=0.004), name
        # As printed, the two shapes that do not divide are other models; and no tied head would show too.
        untied = counted + 50304 * models[name].width
        assert untied / 1e6 != pytest.approx(millions, rel=0.003), name


def test_a_mixture_has_as_many_parameters_as_published(models: dict[str, ModelConfig]) -> None:
    """Jiang et al., arXiv 2401.04088, section 1: 47B, of which a token uses 13B; announced as 46.7B and 12.9B.

    What a token uses has its row of the embedding, and so not the table.
    """
    mixtral = models["mixtral-8x7b"]
    assert parameter_count(mixtral, 32_000, LENGTH) / 1e9 == pytest.approx(46.7, abs=0.05)
    table = 32_000 * mixtral.width
    assert (matmul_parameter_count(mixtral, 32_000) + table) / 1e9 == pytest.approx(12.9, abs=0.05)


def test_all_are_counted_at_once_without_memory(models: dict[str, ModelConfig]) -> None:
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began_s = time.process_time()
    total = sum(parameter_count(model, VOCAB, LENGTH) for model in models.values())
    assert time.process_time() - began_s < 2
    assert total > 300e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 1024


@pytest.mark.parametrize("name", group_options("model"))
def test_a_real_model_has_as_many(name: str, models: dict[str, ModelConfig]) -> None:
    with torch.device("meta"):
        model = GPT(models[name], VOCAB, LENGTH, torch.float32)
    real = sum(parameter.numel() for parameter in model.parameters())
    assert real == parameter_count(models[name], VOCAB, LENGTH)
    if models[name].tied_embeddings:
        assert real != parameter_count(models[name], VOCAB + 128, LENGTH)
