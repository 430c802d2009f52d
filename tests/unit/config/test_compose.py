from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gptscale.config.build import plain
from gptscale.config.compose import compose, conf_folder, group_options
from gptscale.config.rules import check
from gptscale.config.schema import PrepareRoot, TrainRoot
from gptscale.config.step_plan import run_steps, tokens_per_step
from gptscale.runtime.errors import UserError
from tests.unit.config.accept_golden import agreed_experiments

GOLDEN = Path(__file__).parents[2] / "golden"


def composed(*overrides: str) -> TrainRoot:
    return compose("train", TrainRoot, overrides).settings


@pytest.mark.parametrize("experiment", agreed_experiments())
def test_every_experiment_composes_to_what_was_agreed(experiment: str) -> None:
    """A changed default changes what people's commands do: it has to show in a diff of these files.

    To accept a change: python -m tests.unit.config.accept_golden
    """
    settings = composed(f"experiment={experiment}")
    check(settings, settings.launch.ranks)
    golden = json.loads((GOLDEN / f"{experiment}.json").read_text())
    assert json.loads(json.dumps(plain(settings))) == golden


@pytest.mark.parametrize(
    "option",
    [
        f"{group}={name}"
        for group in ("model", "data", "parallel", "precision", "launch", "logging")
        for name in group_options(group)
    ],
)
def test_every_option_of_every_group_composes(option: str) -> None:
    composed(option, "train.steps=1")


def test_a_run_is_called_after_its_experiment() -> None:
    assert composed("experiment=tiny").run.name == "tiny"
    assert composed("experiment=tiny").run.dir == "runs/tiny"
    named = composed("experiment=tiny", "run.name='a b'")
    assert (named.run.name, named.run.dir) == ("a b", "runs/a b")
    assert composed("train.steps=1").run.dir == "runs/train"


def test_lists_quotes_and_spaces() -> None:
    settings = composed("data.sources=[{path: 'a b/*.txt', format: text, weight: 2}]", 'run.name="it\'s"')
    assert settings.data.sources[0].path == "a b/*.txt"
    assert settings.run.name == "it's"


def test_secrets_stay_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY", "sk-canary")
    made = compose("train", TrainRoot, ["experiment=tiny", "logging.project='${oc.env:CANARY}'"])
    assert made.settings.logging.project == "sk-canary"
    assert "sk-canary" not in made.to_yaml()
    assert "${oc.env:CANARY}" in made.to_yaml()
    assert made.public["run"]["dir"] == made.settings.run.dir == "runs/tiny", "all else is stored as it is"
    monkeypatch.setenv("LAYERS", "3")
    made = compose("train", TrainRoot, ["experiment=tiny", "model.layers='${oc.decode:${oc.env:LAYERS}}'"])
    assert made.public["model"]["layers"] == made.settings.model.layers == 3, "a number has to be read again"


@pytest.mark.parametrize(
    "overrides",
    [
        ["logging.project='${oc.env:CANARY}'", "data.corpora_dir='${logging.project}/corpora'"],
        ["run.name='${oc.env:CANARY,none}'"],
        ["data.sources=[{path: x, licence: '${oc.env:CANARY}'}]", "logging.project='${data.sources.0.licence}'"],
        ["logging.project='${oc.decode:\"${oc.env:CANARY}\"}'"],
    ],
)
def test_secrets_stay_references_however_they_travel(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY", "sk-canary")
    made = compose("train", TrainRoot, ["experiment=tiny", *overrides])
    assert "sk-canary" in repr(made.settings)
    assert "sk-canary" not in made.to_yaml()
    assert compose("train", TrainRoot, ["experiment=tiny", *overrides]).settings == made.settings


def test_prepare_reads_the_settings_of_train() -> None:
    settings = compose("prepare", PrepareRoot, ["experiment=tiny", "target=x"]).settings
    assert settings.target == "x"
    assert settings.data == composed("experiment=tiny").data


def test_length_in_tokens_is_rounded_up_to_whole_steps() -> None:
    settings = composed("experiment=tiny", "train.steps=null", "train.tokens=1000")
    assert tokens_per_step(settings) == 512
    assert run_steps(settings) == 2
    ramped = composed(
        "experiment=tiny", "train.steps=null", "train.tokens=2048", "train.ramp_from=2", "train.ramp_tokens=512"
    )
    assert run_steps(ramped) == 6, "32 samples are 2+2+4+8+8+8"


def test_checking_settings_imports_no_torch() -> None:
    code = (
        "import sys; from gptscale.config.compose import compose; from gptscale.config.schema import TrainRoot;"
        "from gptscale.config.rules import check; import gptscale.cli.train;"
        "check(compose('train', TrainRoot, ['experiment=tiny']).settings, 1); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_folder_of_settings_is_found_and_complete() -> None:
    assert (conf_folder() / "train.yaml").is_file()
    with pytest.raises(UserError, match="experiment=tiny"):
        composed("experiment=tny")
