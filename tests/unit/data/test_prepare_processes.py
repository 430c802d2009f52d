"""Preparing in processes: killed at any moment, interrupted, out of disk, begun again, shared out among jobs."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from gptscale.config.schema import DataConfig, FilterConfig, PrepareConfig, SourceConfig, TokenizerConfig
from gptscale.data import workers
from gptscale.data.corpus import open_split
from gptscale.data.prepare import ProgressEvent, corpus_folder, ensure_prepared, prepare, prepare_task
from gptscale.runtime.errors import UserError
from gptscale.tokenizer.train import train_tokenizer
from tests.helpers.text import contents, documents, write_jsonl

ROOT = Path(__file__).parents[3]
GPTSCALE = str(Path(sys.executable).parent / "gptscale")


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


PREPARE = """
    import sys
    from gptscale.config.schema import DataConfig, FilterConfig, SourceConfig, TokenizerConfig
    from gptscale.data.prepare import ensure_prepared
    text, corpora = sys.argv[1:]
    filters = FilterConfig(exact_duplicates=True, near_duplicates=0.8)
    source = SourceConfig(path=text)
    data = DataConfig(
        (source,), corpora_dir=corpora, workers=2, filters=filters, shuffle_documents=True, shard_tokens=20_000
    )
    tokenizer = TokenizerConfig(vocab_size=600, training_bytes=300_000)
    print(ensure_prepared(data, tokenizer, lambda event: print(event.stage, event.parts_done, flush=True)))
    assert "torch" not in sys.modules
"""


def settings(text: Path, corpora: Path) -> tuple[DataConfig, TokenizerConfig]:
    filters = FilterConfig(exact_duplicates=True, near_duplicates=0.8)
    source = SourceConfig(path=str(text))
    return (
        DataConfig(
            (source,),
            corpora_dir=str(corpora),
            workers=2,
            filters=filters,
            shuffle_documents=True,
            shard_tokens=20_000,
        ),
        TokenizerConfig(vocab_size=600, training_bytes=300_000),
    )


def assert_gone(family: list[psutil.Process]) -> None:
    """All have ended within 2 s. One that nobody has reaped yet has ended, too."""
    _, left = psutil.wait_procs(family, timeout=2)
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in left if process.is_running()), left


@pytest.fixture(scope="module")
def undisturbed(big_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_prepared(*settings(big_text, tmp_path_factory.mktemp("undisturbed")))


@pytest.mark.parametrize("moment", ["tokenizer 0", "tokenise 2", "merge 5"])
def test_a_killed_prepare_leaves_nothing_that_counts_and_runs_again(
    big_text: Path, undisturbed: Path, tmp_path: Path, moment: str
) -> None:
    corpora = tmp_path / "corpora"
    process = start(PREPARE, big_text, corpora)
    assert process.stdout is not None
    while (line := process.stdout.readline().strip()) != moment:
        assert line, process.communicate()[1]
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert_gone(family)
    folder = corpus_folder(*settings(big_text, corpora))
    assert not folder.exists()
    with pytest.raises(UserError, match="no such folder"):
        open_split(folder, "train")
    first: dict[str, int] = {}
    progress = lambda event: first.setdefault(event.stage, event.parts_done)  # noqa: E731
    assert ensure_prepared(*settings(big_text, corpora), progress) == folder
    parts, shards = {"tokenizer 0": (0, 0), "tokenise 2": (2, 0), "merge 5": (8, 5)}[moment]
    assert first["tokenise"] >= parts, "what was finished is not done again"
    assert first["merge"] >= shards
    open_split(folder, "train", verify=True)
    open_split(folder, "heldout", verify=True)
    assert sorted(path.name for path in corpora.iterdir()) == sorted([folder.name, f".{folder.name}.lock"])
    assert contents(folder) == contents(undisturbed)


def test_a_keyboard_interrupt_stops_at_once_and_keeps_what_is_finished(big_text: Path, tmp_path: Path) -> None:
    # Slowed down, or on a busy machine it may be done before the signal comes; and a shell's `&` has signals ignored.
    listening = "import sys, time, signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    slow = PREPARE.replace("flush=True)", "flush=True) or time.sleep(0.3)").replace("import sys", listening)
    process = start(slow, big_text, tmp_path / "corpora")
    assert process.stdout is not None
    while (line := process.stdout.readline().strip()) != "tokenise 1":
        assert line, process.communicate()[1]
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode != 0
    assert_gone(family)
    (partial,) = (tmp_path / "corpora").glob(".*.partial")
    records = list((partial / "parts").glob("*.json"))
    assert records
    named = {name for record in records for name in json.loads(record.read_text())["files"]}
    assert {path.name for path in (partial / "parts").iterdir()} - {path.name for path in records} == named


def test_processes_that_prepare_at_once_share_one_result(big_text: Path, tmp_path: Path) -> None:
    processes = [start(PREPARE, big_text, tmp_path / "corpora") for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    folder = corpus_folder(*settings(big_text, tmp_path / "corpora"))
    for stdout, _ in outputs:
        assert stdout.splitlines()[-1] == str(folder)
    assert sum("merge" in stdout for stdout, _ in outputs) == 1
    open_split(folder, "train", verify=True)


def test_workers_import_no_torch_even_from_a_script_that_does(big_text: Path, tmp_path: Path) -> None:
    """A script without a guard, with torch imported: workers neither run it again nor import torch."""
    script = tmp_path / "script.py"
    script.write_text(
        "print('script runs', flush=True)\nimport torch, psutil\n"
        "from pathlib import Path\n"
        "from gptscale.config.schema import DataConfig, SourceConfig, TokenizerConfig\n"
        "from gptscale.data.prepare import prepare\n"
        f"text = {str(big_text)!r}\n"
        "sources = (SourceConfig(path=text), SourceConfig(path=text, format='huggingface'))\n"
        "data = DataConfig(sources=sources, workers=2)\n"
        "def look(event):\n"
        "    if event.stage == 'tokenise':\n"
        "        for child in psutil.Process().children():\n"
        "            maps = Path(f'/proc/{child.pid}/maps').read_text()\n"
        "            print('worker', 'libtorch' in maps, 'sentencepiece' in maps, flush=True)\n"
        "tokenizer = TokenizerConfig(vocab_size=500, training_bytes=50_000)\n"
        f"prepare(data, tokenizer, Path({str(tmp_path / 'out')!r}), look)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines.count("script runs") == 1
    assert "worker False True" in lines
    assert (tmp_path / "out/train/manifest.json").read_text().count('"huggingface"') > 1
    assert not any(line.startswith("worker True") for line in lines)


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize(("small_disk", "workers"), [("600k", 1), ("600k", 2), ("100k", 1)], indirect=["small_disk"])
def test_a_full_disk_is_the_users_to_know(big_text: Path, small_disk: Path, workers: int) -> None:
    data, tokenizer = settings(big_text, small_disk)
    with pytest.raises(UserError) as caught:
        ensure_prepared(replace(data, workers=workers), tokenizer)
    message = str(caught.value)
    assert message.startswith(f"{small_disk}: no space left")
    assert "data.corpora_dir" in message
    assert len(message.splitlines()) == 2
    assert not corpus_folder(data, tokenizer).exists()
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    folder = ensure_prepared(replace(data, workers=workers), tokenizer)  # there is space now: it goes on
    open_split(folder, "train", verify=True)
    assert [path for path in small_disk.iterdir() if not path.name.endswith(".lock")] == [folder]


@pytest.mark.parametrize("settings", ["", "filters=FilterConfig(exact_duplicates=True), shuffle_documents=True"])
def test_memory_does_not_grow_with_the_text(tmp_path: Path, settings: str) -> None:
    """Peak memory of preparing 7 MB in one process, against 1 MB: the whole text in memory would show.

    What is done in pieces is done in small ones here, or all of this text would be one.
    """
    texts = documents(600, words=300)
    peaks = []
    script = f"""
        import re, sys
        from pathlib import Path
        from gptscale.config.schema import DataConfig, FilterConfig, SourceConfig, TokenizerConfig
        from gptscale.data import duplicates, merge, shuffle
        from gptscale.data.prepare import prepare
        duplicates._BUCKET_ENTRIES, merge._TOKENS_AT_ONCE, shuffle._BUCKET_BYTES = 100, 1 << 16, 1 << 18
        data = DataConfig(sources=(SourceConfig(path=sys.argv[1]),), workers=1, {settings})
        prepare(data, TokenizerConfig(vocab_size=500, training_bytes=200_000), Path(sys.argv[2]))
        # Not ru_maxrss, which a process inherits from the one that started it.
        print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
    """
    for copies in (1, 6):
        varied = [f"{number} {text}" for number in range(copies) for text in texts]
        path = write_jsonl(tmp_path / f"{copies}.jsonl", varied)
        stdout, stderr = start(script, path, tmp_path / f"out-{copies}").communicate()
        assert stdout, stderr
        peaks.append(int(stdout) * 1024)
    text_growth = (tmp_path / "6.jsonl").stat().st_size - (tmp_path / "1.jsonl").stat().st_size
    assert peaks[1] - peaks[0] < text_growth / 2, peaks


@pytest.mark.parametrize("files", [1, 2])
def test_a_large_part_tells_how_far_it_is_and_can_be_stopped(
    tmp_path: Path, vocabulary: TokenizerConfig, monkeypatch: pytest.MonkeyPatch, files: int
) -> None:
    """A compressed file is one part, whatever its size: hours of work, here seconds. One is read in this process."""
    monkeypatch.setattr(workers, "_WATCH_EVERY_S", 0.01)
    data = "".join(json.dumps({"text": text}) + "\n" for text in documents(1500, words=600)).encode()
    for number in range(files):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / f"text/{number}.jsonl.gz").write_bytes(gzip.compress(data, 1))
    size = sum(path.stat().st_size for path in (tmp_path / "text").iterdir())
    assert len(data) > 4 << 20, "enough to be told of several times"
    assert size > 1 << 20, "enough for processes"
    settings = DataConfig((SourceConfig(path=str(tmp_path / "text")),), workers=2)
    seen: list[ProgressEvent] = []

    class EnoughError(Exception):
        pass

    def stop_within(event: ProgressEvent) -> None:
        if event.stage == "tokenise" and event.bytes_done and not event.parts_done:
            raise EnoughError

    with pytest.raises(EnoughError):
        prepare(settings, vocabulary, tmp_path / "out", stop_within)
    # On a busy machine one of two processes may be done with its file before the other has begun.
    assert len(finished_parts(tmp_path / "out")) < files, "it ended within a part"
    shutil.rmtree(tmp_path / ".out.partial", ignore_errors=True)
    prepare(settings, vocabulary, tmp_path / "out", seen.append)
    within = [event.bytes_done for event in seen if event.stage == "tokenise" and not event.parts_done]
    assert len(set(within)) > 3
    assert within == sorted(within)
    assert within[0] == 0
    assert within[-1] <= size
    last = [event for event in seen if event.stage == "tokenise"][-1]
    assert (last.parts_done, last.bytes_done) == (files, size)


# Begun again


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> TokenizerConfig:
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    train_tokenizer(documents(100), 400, path)
    return TokenizerConfig(path=str(path))


def finished_parts(target: Path) -> dict[str, int]:
    """The records beside a target, and when each was written."""
    return {
        path.name: path.stat().st_mtime_ns for path in (target.parent / f".{target.name}.partial/parts").glob("*.json")
    }


def test_after_a_bad_line_is_mended_only_its_part_is_read_again(
    big_text: Path, tmp_path: Path, vocabulary: TokenizerConfig
) -> None:
    text = tmp_path / "text"
    shutil.copytree(big_text, text)
    good = (text / "7.jsonl").read_bytes()
    (text / "7.jsonl").write_bytes(good + b"{}\n")
    data = DataConfig((SourceConfig(path=str(text)),), workers=1)
    with pytest.raises(UserError, match=r"7\.jsonl:91"):
        prepare(data, vocabulary, tmp_path / "out")
    before = finished_parts(tmp_path / "out")
    assert len(before) == 7
    (text / "7.jsonl").write_bytes(good)
    counted: list[ProgressEvent] = []

    def look(event: ProgressEvent) -> None:
        if event.stage == "merge" and event.parts_done == 1:
            after = finished_parts(tmp_path / "out")
            assert {name: after[name] for name in before} == before
            assert len(after) == 8
        counted.append(event)

    prepare(data, vocabulary, tmp_path / "out", look)
    assert list(dict.fromkeys(event.parts_done for event in counted if event.stage == "tokenise")) == [7, 8]
    prepare(data, vocabulary, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    assert not (tmp_path / ".out.partial").exists()


def stopped(data: DataConfig, tokenizer: TokenizerConfig, target: Path, after_shards: int = 0) -> dict[str, int]:
    """Prepare up to so many shards, and stop there; the parts that are finished."""

    class EnoughError(Exception):
        pass

    def stop(event: ProgressEvent) -> None:
        if event.stage == "merge" and event.parts_done >= after_shards:
            raise EnoughError

    with pytest.raises(EnoughError):
        prepare(data, tokenizer, target, stop)
    return finished_parts(target)


def test_other_settings_or_text_take_nothing_from_what_was_done(
    big_text: Path, tmp_path: Path, vocabulary: TokenizerConfig
) -> None:
    text = tmp_path / "text"
    shutil.copytree(big_text, text)
    target = tmp_path / "out"
    base = DataConfig((SourceConfig(path=str(text)),), workers=1)
    before = stopped(base, vocabulary, target)
    assert len(before) == 8
    assert stopped(replace(base, shard_tokens=1000, workers=2), vocabulary, target) == before
    different = [
        (replace(base, heldout_fraction=0.3), vocabulary),
        (replace(base, filters=FilterConfig(min_characters=1200)), vocabulary),
        (replace(base, filters=FilterConfig(exact_duplicates=True)), vocabulary),
        (base, TokenizerConfig(vocab_size=500, training_bytes=50_000)),
    ]
    for data, tokenizer in different:
        after = stopped(data, tokenizer, target)
        assert len(after) == len(before) + 8
        before = after
    changed = text / "3.jsonl"
    changed.write_bytes(changed.read_bytes().replace(b"a", b"b"))  # as long as before
    assert len(stopped(base, vocabulary, target)) == len(before) + 1
    result = prepare(different[1][0], vocabulary, target)
    assert contents(target) == contents(prepare(different[1][0], vocabulary, tmp_path / "fresh").folder)
    assert sum(removed.documents for part in result.train.parts for removed in part.removed) > 0


@pytest.mark.parametrize("kind", ["tok", "end", "doc", "near"])
def test_a_part_that_was_damaged_meanwhile_is_named(
    big_text: Path, tmp_path: Path, vocabulary: TokenizerConfig, kind: str
) -> None:
    data = DataConfig((SourceConfig(path=str(big_text)),), workers=1, filters=FilterConfig(near_duplicates=0.8))
    stopped(data, vocabulary, tmp_path / "out")
    (merge,) = (tmp_path / ".out.partial").glob("merge-*")
    shutil.rmtree(merge)  # once the marks are there, nobody looks at a part's documents any more
    victim = max((tmp_path / ".out.partial/parts").glob(f"*.train.{kind}"))
    healthy = victim.read_bytes()
    victim.write_bytes(healthy[:-1] + bytes([healthy[-1] ^ 1]))
    with pytest.raises(UserError, match=f"{re.escape(str(victim))}: damaged since it was written"):
        prepare(data, vocabulary, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    victim.unlink()  # as it says
    prepare(data, vocabulary, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(prepare(data, vocabulary, tmp_path / "fresh").folder)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"filters": FilterConfig(exact_duplicates=True)},
        {"filters": FilterConfig(exact_duplicates=True), "shuffle_documents": True},
    ],
)
def test_shards_that_are_written_stay_when_the_merge_goes_on(
    big_text: Path, tmp_path: Path, vocabulary: TokenizerConfig, settings: dict[str, Any]
) -> None:
    data = DataConfig((SourceConfig(path=str(big_text)),), workers=1, shard_tokens=20_000, **settings)

    def shards() -> dict[str, tuple[int, int]]:
        (merge,) = (tmp_path / ".out.partial").glob("merge-*")
        found = {path: path.stat() for kind in ("out/*/*.npy", "marks", "shuffle/*") for path in merge.glob(kind)}
        return {str(path.relative_to(merge)): (stat.st_ino, stat.st_mtime_ns) for path, stat in found.items()}

    stopped(data, vocabulary, tmp_path / "out", after_shards=4)
    before = shards()
    assert len(before) == 8 + bool(settings) + 3 * ("shuffle_documents" in settings)
    # A shard that was cut short, and one whose record did not reach the disk, are written again.
    (merge,) = (tmp_path / ".out.partial").glob("merge-*")
    written = sorted((merge / "shards").glob("*.json"))
    assert len(written) == 4
    written[0].unlink()
    cut = merge / "out" / json.loads(written[1].read_text())["name"]
    short = merge / "out" / written[1].stem.partition("-")[0] / f"{cut.name}.tok.npy"
    os.truncate(short, short.stat().st_size - 2)
    again = {path.stem.replace("-", "/", 1) for path in written[:2]}
    stopped(data, vocabulary, tmp_path / "out", after_shards=6)
    after = shards()
    for name, found in before.items():
        assert (after[name] == found) is not any(one in name for one in again), name
    prepare(data, vocabulary, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(prepare(data, vocabulary, tmp_path / "fresh").folder)


def test_a_shard_of_what_was_damaged_is_not_written(
    big_text: Path, tmp_path: Path, vocabulary: TokenizerConfig
) -> None:
    """Whatever of a part is in it: the damage is at the end of the part, and the first shard takes its beginning."""
    data = DataConfig((SourceConfig(path=str(big_text)),), workers=1, shard_tokens=2_000)
    stopped(data, vocabulary, tmp_path / "out")
    for victim in (tmp_path / ".out.partial/parts").glob("*.train.tok"):
        content = victim.read_bytes()
        victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match="damaged since it was written"):
        prepare(data, vocabulary, tmp_path / "out")
    (merge,) = (tmp_path / ".out.partial").glob("merge-*")
    assert not [*merge.glob("shards/train-*"), *merge.glob("out/train/*")]


def test_killed_again_and_again_at_any_moment_it_comes_out_the_same(
    big_text: Path, undisturbed: Path, tmp_path: Path
) -> None:
    began_s = time.monotonic()
    start(PREPARE, big_text, tmp_path / "whole").communicate()
    whole_s, chance = time.monotonic() - began_s, random.Random(0)
    for attempt in range(6):  # what has been prepared stays, so that the next takes less: how much, the machine decides
        corpora = tmp_path / f"corpora-{attempt}"
        kills = killed_until_done(big_text, corpora, chance, whole_s * 0.75**attempt)
        assert contents(ensure_prepared(*settings(big_text, corpora))) == contents(undisturbed)
        if kills >= 3:
            return
    pytest.fail("it was never killed three times before it was done")


def killed_until_done(text: Path, corpora: Path, chance: random.Random, within_s: float) -> int:
    """How often it was killed, at moments that come later and later."""
    folder = corpus_folder(*settings(text, corpora))
    kills = 0
    while not folder.exists():
        process = start(PREPARE, text, corpora)
        time.sleep(within_s * (0.3 + 0.7 * chance.random() + 0.1 * kills))
        family = psutil.Process(process.pid).children(recursive=True)
        kills += process.poll() is None
        process.kill()
        process.communicate()
        assert_gone(family)
        assert kills < 60
    return kills


# Shared out among jobs


def test_tasks_and_a_merge_give_what_one_job_gives(big_text: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Three jobs at the same time, which train one tokenizer; one of them killed and run again."""
    common = [
        f"data.sources=[{{path: {big_text}}}]",
        "data.filters.exact_duplicates=true",
        "data.filters.near_duplicates=0.8",
        "data.shuffle_documents=true",
        "data.shard_tokens=20000",
        "tokenizer.vocab_size=600",
        "tokenizer.training_bytes=300000",
        "data.workers=1",
        f"target={tmp_path / 'out'}",
    ]

    def job(*more: str) -> subprocess.Popen[str]:
        return subprocess.Popen([GPTSCALE, "prepare", *common, *more], stderr=subprocess.PIPE, text=True)

    merge = job("prepare.merge=true")
    assert "8 of 8 parts are not tokenised yet" in merge.communicate()[1]
    assert merge.returncode == 2
    jobs = [job("prepare.tasks=3", f"prepare.task={task}") for task in range(3)]
    jobs[1].kill()
    said = [one.communicate(timeout=120)[1].strip().splitlines()[-1] for one in jobs if one is not jobs[1]]
    assert said == ["task 0 of 3: 3 parts are tokenised", "task 2 of 3: 2 parts are tokenised"]
    assert not (tmp_path / "out").exists()
    merge = job("prepare.merge=true")
    assert "3 of 8 parts are not tokenised yet, 1.jsonl for one" in merge.communicate()[1]
    assert job("prepare.tasks=3", "prepare.task=1").wait() == 0
    assert job("prepare.merge=true").wait() == 0
    assert contents(tmp_path / "out") == contents(undisturbed)
    late = job("prepare.tasks=3", "prepare.task=1")
    assert late.wait() == 0, "a task of what is finished has nothing to do"
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == ["out"]


def test_tasks_that_contradict_themselves_are_refused(tmp_path: Path) -> None:
    for wrong in (["prepare.task=3", "prepare.tasks=3"], ["prepare.task=-1"], ["prepare.task=0", "prepare.merge=true"]):
        done = subprocess.run([GPTSCALE, "prepare", *wrong, f"target={tmp_path}/out"], capture_output=True, text=True)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 2, done.stderr
        assert "contradict each other" in done.stderr


def test_a_task_leaves_a_finished_folder_alone(big_text: Path, tmp_path: Path, vocabulary: TokenizerConfig) -> None:
    data = DataConfig((SourceConfig(path=str(big_text)),), workers=1)
    prepare(data, vocabulary, tmp_path / "out")
    before = contents(tmp_path / "out")
    assert prepare_task(data, vocabulary, tmp_path / "out", PrepareConfig(tasks=2, task=1)) == 0
    assert contents(tmp_path / "out") == before
