"""Every ready size has the parameters of a class of transformers', and GPT-3's biases find a place in GPTNeo's."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from gptscale.config.compose import compose, group_options
from gptscale.config.schema import ModelConfig, TrainRoot
from gptscale.model.gpt import GPT
from tests.helpers.plain_gpt import large_weights, random_batch
from tests.helpers.references import GPT2, GPT_NEO, QWEN3, Named, Reference

VOCAB, LENGTH = 1024, 256
GPT3 = [name for name in group_options("model") if name.startswith("gpt3-")]
MODERN = [name for name in group_options("model") if name.startswith("modern-")]


def preset(name: str) -> ModelConfig:
    return compose("train", TrainRoot, [f"model={name}", "train.steps=1"]).settings.model


def shapes(named: Named) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in named.items()}


def same_parameters(config: ModelConfig, reference: Reference) -> bool:
    """Whether the map gives the reference's parameters, all of them and of its shapes. Nothing is allocated."""
    with torch.device("meta"):
        ours = dict(GPT(config, VOCAB, LENGTH, torch.float32).named_parameters())
        theirs = dict(reference.build(config, VOCAB, LENGTH).named_parameters())
        return shapes(reference.parameters(ours, config)) == shapes(theirs)


@pytest.mark.parametrize(
    ("name", "reference"),
    [*product(GPT3, [GPT2, GPT_NEO]), *product(MODERN, [QWEN3])],
    ids=lambda value: value if isinstance(value, str) else {GPT2: "GPT2", GPT_NEO: "GPTNeo", QWEN3: "Qwen3"}[value],
)
def test_a_ready_size_has_the_parameters_of_its_class(name: str, reference: Reference) -> None:
    # Layers are alike: four of them, so that transformers builds the largest in a moment.
    config = replace(preset(name), layers=4)
    if reference is GPT2:
        config = replace(config, attention_pattern=("full",), window=None)
    if reference is GPT_NEO:
        config = replace(config, qkv_bias=False)
    assert same_parameters(config, reference)
    if reference is QWEN3:
        assert not same_parameters(replace(config, qk_norm=False), reference)
        # What its config cannot say is as it has it.
        assert (config.embedding_scale, config.logit_softcap, config.z_loss, config.rope_scaling) == (1, 0, 0, "none")
        assert set(config.attention_pattern) == {"full"}


def in_gpt_neo(p: Named, config: ModelConfig, fold_queries: bool = True) -> dict[str, Tensor]:
    """GPT-3's parameters as GPTNeo's, which has no biases on queries, keys and values. fp64.

    Queries W·x + b are W·(x + δ) where W·δ = b, so δ joins the bias of the norm before. Keys then move by a constant,
    which softmax does not see, as it does not see their own bias. Values move by one too; that and their bias are the
    same for every token, and attention's weights sum to 1, so the output projection's bias takes them.
    """
    p = {name: parameter.double() for name, parameter in p.items()}
    for i in range(config.layers):
        attention, norm = f"blocks.{i}.attention.", f"blocks.{i}.attention_norm.bias"
        delta = torch.linalg.solve(p[f"{attention}q.weight"], p[f"{attention}q.bias"])
        if not fold_queries:
            delta = torch.zeros_like(delta)
        constant = p[f"{attention}v.bias"] - p[f"{attention}v.weight"] @ delta
        p[f"{attention}o.bias"] = p[f"{attention}o.bias"] + p[f"{attention}o.weight"] @ constant
        p[norm] = p[norm] + delta
    return GPT_NEO.parameters(p, config)


def difference(config: ModelConfig, fold_queries: bool) -> float:
    """Largest difference of fp32 logits, as a share of the largest logit."""
    model = large_weights(GPT(config, 75, 40, torch.float32))
    ids_BT, _ = random_batch(75, 2, 40)
    reference = GPT_NEO.build(config, 75, 40).float().eval()
    with torch.no_grad():
        mapped = in_gpt_neo(dict(model.named_parameters()), config, fold_queries)
        for name, parameter in reference.named_parameters():
            parameter.copy_(mapped[name])
        ours_BTV, theirs_BTV = model.logits(ids_BT), reference(input_ids=ids_BT, use_cache=False).logits
    return float((theirs_BTV - ours_BTV).abs().max() / ours_BTV.abs().max())


def test_gpt3_with_its_biases_is_a_gpt_neo() -> None:
    config = replace(preset("gpt3-125m"), layers=4, width=48, heads=3, window=7, vocab_multiple=1)
    assert config.bias
    assert config.qkv_bias is None
    # Measured: 3e-6. The norm's new bias is as large as W is close to singular, and is rounded to fp32.
    found = difference(config, fold_queries=True)
    print(f"logits differ by {found:.1e}")
    assert found < 1e-4
    assert difference(config, fold_queries=False) > 1e-2
