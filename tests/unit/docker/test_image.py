"""The image's recipe: pinned by the one list of versions, not root, nothing secret; and its entry, really run."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
DOCKER = REPOSITORY / "docker"
ENTRYPOINT = DOCKER / "entrypoint.sh"


def instructions() -> list[tuple[str, str]]:
    """(KEYWORD, rest) of the Dockerfile, comments out and continued lines joined."""
    lines = [line for line in (DOCKER / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split()[0], line.partition(" ")[2]) for line in joined.splitlines() if line.strip()]


def stages() -> list[list[tuple[str, str]]]:
    found: list[list[tuple[str, str]]] = [[]]
    for keyword, rest in instructions():
        if keyword == "FROM":
            found.append([])
        found[-1].append((keyword, rest))
    return found[1:]


def pinned() -> dict[str, str]:
    lines = (DOCKER / "constraints.txt").read_text().splitlines()
    pins = [line.partition("==") for line in lines if line and not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, _, version in pins}


def test_every_package_comes_with_its_version_from_the_one_list() -> None:
    installs = [rest for keyword, rest in instructions() if keyword == "RUN" and "pip install" in rest]
    assert installs
    for install in installs:
        options = install.partition("pip install ")[2]
        assert options.startswith(("-c docker/constraints.txt ", "--no-deps ."))
        assert "==" not in install, "a version that is not in the list"
    assert all(pinned().values())
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for wanted in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        name = re.match(r"[\w.-]+", wanted)
        assert name is not None
        assert re.sub(r"[-_.]+", "-", name[0]).lower() in pinned(), f"{wanted} has no version in the list"


def test_the_compiler_and_ninja_are_there_at_run_time() -> None:
    installed = " ".join(rest for keyword, rest in stages()[-1] if keyword == "RUN")
    assert {"gcc", "g++"} <= set(installed.split())
    assert "ninja" in pinned()


def test_it_does_not_run_as_root() -> None:
    last = stages()[-1]
    users = [number for number, (keyword, _) in enumerate(last) if keyword == "USER"]
    assert [last[number][1] for number in users] == ["10001:10001"], "a number: Kubernetes cannot judge a name"
    assert {keyword for keyword, _ in last[users[0] :]} <= {"USER", "WORKDIR", "VOLUME", "ENTRYPOINT", "CMD"}


def test_both_stages_start_from_the_base_that_the_builder_may_choose() -> None:
    keyword, argument = instructions()[0]
    assert keyword == "ARG"
    name, _, image = argument.partition("=")
    assert name == "BASE_IMAGE"
    assert re.fullmatch(r"\S+:\S+", image), "a tag that is not `latest`"
    assert not image.endswith(":latest")
    assert [stage[0][1].split()[0] for stage in stages()] == ["${BASE_IMAGE}"] * 2


SECRET = re.compile(r"token|secret|passw|api_?key|credential|://[^/\s]*@", re.IGNORECASE)


def test_no_secret_can_stay_in_a_layer() -> None:
    kept = [rest for keyword, rest in instructions() if keyword in ("ARG", "ENV", "LABEL", "COPY", "ADD")]
    assert [rest for rest in kept if SECRET.search(rest)] == []
    for keyword, rest in instructions():
        if keyword == "RUN":
            # A mount is there while its command runs, and in no layer.
            assert not SECRET.search(re.sub(r"--mount=type=secret,\S+", "", rest)), rest


def sent(path: str) -> bool:
    """Whether .dockerignore lets a file through (its last matching line decides; a folder speaks for what is in it)."""
    decision = True
    for line in (REPOSITORY / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        allowed, pattern = line.startswith("!"), line.removeprefix("!").removeprefix("**/")
        parts = path.split("/")
        places = ["/".join(parts[: end + 1]) for end in range(len(parts))]
        names = parts if "**/" in line else places
        if any(fnmatch.fnmatchcase(name, pattern) for name in names):
            decision = allowed
    return decision


def test_all_that_is_copied_is_sent_and_nothing_else() -> None:
    copied = [rest.split() for keyword, rest in instructions() if keyword == "COPY" and "--from=" not in rest]
    for source in {word for words in copied for word in words[:-1] if not word.startswith("--")}:
        assert source not in (".", "*"), "a copy of everything takes along whatever lies about"
        assert (REPOSITORY / source).exists(), source
        assert sent(source), f".dockerignore keeps {source} back"
    for kept_back in (
        ".git/config",
        ".env",
        ".venv/bin/python",
        "runs/tiny/config.yaml",
        "corpora/mine/manifest.json",
        "wandb/settings",
        "pip.conf",
        "docker/pip.conf",
        "tests/conftest.py",
        "gptscale/cli/__pycache__/main.pyc",
    ):
        assert not sent(kept_back), f".dockerignore sends {kept_back}"


def test_the_entrypoint_is_where_the_image_looks_for_it() -> None:
    (entry,) = [rest for keyword, rest in stages()[-1] if keyword == "ENTRYPOINT"]
    (path,) = json.loads(entry)
    assert ("COPY", f"--chmod=755 docker/entrypoint.sh {path}") in stages()[-1]
    assert os.access(ENTRYPOINT, os.X_OK)


@pytest.mark.parametrize(
    ("arguments", "stdout"),
    [
        (["--version"], "gptscale "),
        (["gptscale", "--version"], "gptscale "),
        (["train", "--help"], "gptscale train: "),
        (["python", "-c", "import sys; print(sys.argv[1:])", "a b", "[c, 'd']"], "['a b', \"[c, 'd']\"]"),
        (["/bin/echo", "a  b"], "a  b"),
        (["sh", "-c", "echo $$ $PPID"], ""),
    ],
)
def test_the_entrypoint_runs_verbs_and_commands(arguments: list[str], stdout: str) -> None:
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    started = subprocess.Popen([ENTRYPOINT, *arguments], env=environ, stdout=subprocess.PIPE, text=True)
    out, _ = started.communicate(timeout=60)
    assert started.returncode == 0
    assert out.startswith(stdout)
    if not stdout:
        # The command took the shell's place: a signal to the container's first process is one to the command.
        assert out.split() == [str(started.pid), str(os.getpid())]


def test_launchers_are_commands_to_the_entrypoint() -> None:
    raw = re.search(r"^    (.*)\) exec \"\$@\"", ENTRYPOINT.read_text(), re.MULTILINE)
    assert raw is not None
    assert {"deepspeed", "torchrun", "python", "*/*"} <= set(raw[1].split(" | "))
