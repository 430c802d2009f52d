"""What the README says is what there is: commands run or compose, keys and files exist, lists are the code's.

A start with torch and DeepSpeed takes some ten seconds, so each command runs once and serves several checks.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gptscale.cli.inspect import settings_of
from gptscale.config import compose as compose_module
from gptscale.config.build import build, flat_keys
from gptscale.config.compose import compose, group_options
from gptscale.config.rules import check
from gptscale.config.schema import ExportRoot, GenerateRoot, PrepareRoot, TrainRoot
from gptscale.model.count import parameter_count
from gptscale.runtime import errors
from gptscale.tokenizer.tokenizer import FILES as TOKENIZER_FILES
from gptscale.train.resume import MAY_CHANGE
from tests.helpers import readme
from tests.helpers.processes import REPOSITORY
from tests.helpers.training import read_metrics

SCHEMAS: dict[str, type[object]] = {"prepare": PrepareRoot, "train": TrainRoot, "generate": GenerateRoot}
LAUNCHERS = ("deepspeed", "torchrun")


def can_run(command: str) -> bool:
    """On any machine: what is tiny, or does not train at all."""
    words = shlex.split(command)
    if words[0] == "mkdir" or words[-1] == "--help":
        return True
    if words[:2] == ["gptscale", "inspect"]:
        return all(word.startswith("runs/tiny") or "=" in word for word in words[2:])
    return words[0] in ("gptscale", *LAUNCHERS) and bool({"experiment=tiny", "source=runs/tiny"} & set(words))


@dataclass(frozen=True)
class Outcome:
    folder: Path
    stdout: str
    stderr: str


def run(command: str, folder: Path) -> Outcome:
    """Run a command as typed, in a shell where the environment that runs this test is active."""
    places = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    environ = {name: value for name, value in os.environ.items() if name not in places}
    environ["PATH"] = f"{Path(sys.executable).parent}:{environ['PATH']}"
    began_s = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    print(f"{time.monotonic() - began_s:5.1f} s  {command}")
    assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    return Outcome(folder, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Every command that can run, in the page's order, in one folder."""
    folder = tmp_path_factory.mktemp("readme")
    return {command: run(command, folder) for command in readme.commands() if can_run(command)}


def outcome(outcomes: dict[str, Outcome], *words: str) -> Outcome:
    """Of the one command that has all these words."""
    (found,) = [ran for command, ran in outcomes.items() if set(words) <= set(shlex.split(command))]
    return found


def test_text_becomes_shards_a_model_and_text(outcomes: dict[str, Outcome]) -> None:
    prepared = outcome(outcomes, "gptscale", "prepare")
    (corpus,) = prepared.stdout.splitlines()
    text_files = [line.split()[0] for line in tree("corpora/mine/")]
    assert len(text_files) == 5
    for name in text_files:
        path = name.replace("corpora/mine", corpus).rstrip("…")
        assert (prepared.folder / path).exists(), f"{name} is not what `prepare` writes"

    generated = outcome(outcomes, "gptscale", "generate")
    assert generated.stdout.strip("\n"), "no completion on stdout"
    run_files = [line.split()[0] for line in tree("runs/tiny/")]
    assert len(run_files) == 7
    for name in run_files:
        assert (prepared.folder / name).exists(), f"{name} is not what `train` leaves"


def tree(start: str) -> list[str]:
    """The lines of the page's pictures of folders."""
    return [line for block in readme.blocks("") for line in block.splitlines() if line.startswith(start)]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_another_launcher_finds_the_run_finished(outcomes: dict[str, Outcome], launcher: str) -> None:
    assert "runs/tiny is done: 60 of 60 steps" in outcome(outcomes, launcher).stderr


def test_a_run_goes_on_longer_and_on_another_layout(outcomes: dict[str, Outcome]) -> None:
    longer = outcome(outcomes, "gptscale", "train", "parallel=plain", "train.steps=80")
    assert "from step 60" in longer.stderr
    steps = [line["step"] for line in read_metrics(longer.folder / "runs/tiny") if "train/loss" in line]
    assert steps == list(range(1, 81))


def test_a_run_goes_on_with_another_stage(outcomes: dict[str, Outcome]) -> None:
    staged = [ran for command, ran in outcomes.items() if "run.name=staged" in command]
    assert len(staged) == 2
    lines = [line for line in read_metrics(staged[1].folder / "runs/staged") if "train/loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert lines[-1]["tokens"] == 60 * lines[0]["tokens"], "steps keep their tokens"


def test_a_run_changes_its_parallel_layout(outcomes: dict[str, Outcome]) -> None:
    grid = [ran for command, ran in outcomes.items() if "run.name=grid" in command]
    assert len(grid) == 2
    assert "from step 20" in grid[1].stderr
    steps = [line["step"] for line in read_metrics(grid[1].folder / "runs/grid") if "train/loss" in line]
    assert steps == list(range(1, 41))


def test_help_lists_every_key(outcomes: dict[str, Outcome]) -> None:
    shown = outcome(outcomes, "gptscale", "train", "--help").stdout
    listed = {line.strip().split("=")[0].removesuffix(".…") for line in shown.splitlines() if "=" in line}
    keys = flat_keys(TrainRoot)
    leaves = {key for key in keys if not any(other.startswith(f"{key}.") for other in keys)}
    assert leaves <= listed


@pytest.fixture(scope="module", autouse=True)
def conf_with_the_pages_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """`conf/` as it is once somebody has written down the files that the page shows."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(REPOSITORY / "conf", folder / "conf")
    for shown in readme.blocks("yaml"):
        path = re.match(r"(?:# @package _global_\n)?# (conf/\w+/\w+\.yaml)\n", shown)
        assert path, "the first line names the file, or the second after the package"
        (folder / path[1]).write_text(shown)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compose_module, "conf_folder", lambda: folder / "conf")
        yield


def test_the_pages_model_composes() -> None:
    settings = compose("train", TrainRoot, ["model=mine", "train.steps=1"]).settings
    check(settings, 1)
    assert settings.model.attention_pattern == ("full", "window")


@pytest.mark.parametrize("command", [command for command in readme.commands() if readme.started(command)])
def test_every_command_composes(command: str) -> None:
    started = readme.started(command)
    assert started is not None
    if started.arguments == ["--help"]:
        return
    if started.verb == "inspect":  # composes nothing: subjects, and keys of its own
        settings_of(dict(word.split("=", 1) for word in started.arguments if "=" in word))
        return
    if started.verb == "export":
        build(ExportRoot, dict(word.split("=", 1) for word in started.arguments))
        return
    settings: object = compose(started.verb, SCHEMAS[started.verb], started.arguments).settings
    if started.verb == "train":
        assert isinstance(settings, TrainRoot)
        check(settings, started.ranks or settings.launch.ranks)


@pytest.mark.parametrize("command", [command for command in readme.commands() if not readme.started(command)])
def test_every_other_command_has_what_it_names(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "make":
        assert set(words[1:]) <= make_targets()
    elif words[:2] == ["docker", "build"]:
        dockerfile = REPOSITORY / words[words.index("-f") + 1]
        for argument in words[words.index("--build-arg") + 1 :: 2]:
            assert f"ARG {argument.partition('=')[0]}" in dockerfile.read_text() or argument == "."
    else:
        assert words[0] == "mkdir", f"this test does not know what to do with: {command}"


def test_scripts_and_volumes_of_commands_exist() -> None:
    words = [word for command in readme.commands() for word in shlex.split(command)]
    scripts = [word for word in words if word.startswith(("launch/", "docker/"))]
    assert len(scripts) >= 3
    assert [word for word in scripts if not (REPOSITORY / word).is_file()] == []
    volumes = re.findall(r"^VOLUME (.*)$", (REPOSITORY / "docker/Dockerfile").read_text(), re.MULTILINE)
    mounts = {word.partition(":")[2] for word in words if word.startswith("$PWD/")}
    assert mounts == set(re.findall(r'"(.*?)"', volumes[0]))


def test_inline_keys_options_and_files_exist() -> None:
    keys, groups = flat_keys(TrainRoot), {path.name for path in (REPOSITORY / "conf").iterdir() if path.is_dir()}
    seen = {"key": 0, "setting": 0, "file": 0, "target": 0}
    for code in readme.inline_code():
        if code in TOKENIZER_FILES:
            continue
        if re.fullmatch(r"\w+\.\w+", code) and code.partition(".")[0] in keys:
            assert code in keys, f"no key {code}"
            seen["key"] += 1
        elif re.fullmatch(r"\"?[a-z_.]+=[^…]+", code) and re.split(r"[.=]", code.strip('"'))[0] in groups | set(keys):
            name, _, value = code.strip('"').partition("=")
            assert value in group_options(name) if name in groups else name in keys, f"no {code}"
            seen["setting"] += 1
        elif re.fullmatch(r"(gptscale|conf|docker|launch|tests)/\S*|LICENSE|pyproject\.toml", code):
            assert (REPOSITORY / code).exists(), f"no file {code}"
            seen["file"] += 1
        elif code.startswith("make "):
            assert code.split()[1] in make_targets()
            seen["target"] += 1
    assert min(seen.values()) >= 5, seen


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))


def test_the_tour_names_ten_files() -> None:
    tour = re.findall(r"^(\d+)\. `(\S+)`: \S", readme.TEXT, re.MULTILINE)
    assert [int(number) for number, _ in tour] == list(range(1, 11))
    assert len({path for _, path in tour if (REPOSITORY / path).is_file()}) == 10


def test_lists_are_those_of_the_code() -> None:
    codes = {int(code) for code in re.findall(r"^\| (\d+)\b", readme.TEXT, re.MULTILINE)}
    assert codes == {
        errors.EXIT_DONE,
        errors.EXIT_FAILED,
        errors.EXIT_USER,
        errors.EXIT_DIVERGED,
        errors.EXIT_STOPPED,
        errors.EXIT_INTERRUPTED,
    }
    assert named("What may change:", "Any other difference") == set(MAY_CHANGE)
    in_tables = {row[0] for row in size_rows()}
    assert in_tables | named("Beside them are", ":") == {path.stem for path in (REPOSITORY / "conf/model").iterdir()}


def size_rows() -> list[list[str]]:
    """The rows of the two tables of sizes: cells as text, the name first."""
    rows = re.findall(r"^\| `((?:gpt3|modern)-\S+)` \| (.+) \|$", readme.TEXT, re.MULTILINE)
    assert len(rows) == 19
    return [[name, *(cell.strip().replace(",", "") for cell in cells.split("|"))] for name, cells in rows]


@pytest.mark.parametrize("row", size_rows(), ids=lambda row: row[0])
def test_tables_of_sizes_are_counted(row: list[str]) -> None:
    name, layers, width, heads, *rest = row
    model = compose("train", TrainRoot, [f"model={name}", "train.steps=1"]).settings.model
    assert (model.layers, model.width) == (int(layers), int(width))
    if name.startswith("gpt3-"):
        parameters, _, batch, rate = rest
        assert heads == str(model.heads)
        vocab_size, tokens = 50257, "300000M"
    else:
        pieces, parameters, batch, rate, tokens = rest
        assert heads == f"{model.heads} / {model.kv_heads or model.heads}"
        vocab_size = int(pieces)
    millions = parameter_count(model, vocab_size, 2048) / 1e6
    assert parameters == (f"{millions:.1f}M" if millions < 100 else f"{millions:.0f}M")
    assert bool(batch) == (name in group_options("experiment"))
    if batch:
        run = compose("train", TrainRoot, [f"experiment={name}"]).settings
        assert run.tokenizer.vocab_size == vocab_size
        sequences, _, length = batch.partition(" × ")
        assert (run.train.global_batch, run.data.sequence_length) == (int(sequences), int(length or 2048))
        assert run.optimizer.learning_rate == float(rate)
        assert run.train.tokens == float(tokens.rstrip("M")) * 1e6


def named(start: str, end: str) -> set[str]:
    """Inline code between two texts."""
    return set(re.findall(r"`(\S+?)`", readme.TEXT.partition(start)[2].partition(end)[0]))
