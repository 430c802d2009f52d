"""Fixtures that several suites share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptscale.config.schema import DataConfig, SourceConfig, TokenizerConfig
from tests.helpers.chromium import Browser, chromium, missing_chromium
from tests.helpers.s3 import S3, Proxy, s3_server
from tests.helpers.slurm import Cluster, missing_programs, slurm_cluster
from tests.helpers.training import write_corpus

MAY_SKIP: frozenset[str] = frozenset()
"""Reasons for which a test may be left out in CI. None: what a test needs there, `.ci/run` installs."""

_skipped: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Failures are told as they come, too: a run that is cut off before its summary has named them."""
    if report.failed and os.environ.get("CI") == "true" and "PYTEST_XDIST_WORKER" not in os.environ:
        print(
            f"\n{report.nodeid} failed in {report.when} after {report.duration:.0f} s:\n{report.longreprtext}",
            flush=True,
        )
    if report.skipped and isinstance(report.longrepr, tuple):
        _skipped.append(f"{report.nodeid}: {report.longrepr[2].removeprefix('Skipped: ')}")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Whole files that leave themselves out."""
    if report.skipped and isinstance(report.longrepr, tuple):
        _skipped.append(f"{report.nodeid}: {report.longrepr[2].removeprefix('Skipped: ')}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    unlisted = [line for line in _skipped if line.partition(": ")[2] not in MAY_SKIP]
    if os.environ.get("CI") == "true" and unlisted and session.exitstatus == 0:
        print("\nskipped, which CI does not accept:", *unlisted, sep="\n  ")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_configure(config: pytest.Config) -> None:
    """Everything but `make test-gpu` runs on the CPU, also on a machine with fewer GPUs than a test has ranks."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder with a vocabulary of 384."""
    from gptscale.data.prepare import prepare

    folder = tmp_path_factory.mktemp("corpus")
    source = SourceConfig(path=str(write_corpus(folder)), licence="made for the test")
    data = DataConfig(sources=(source,), heldout_fraction=0.1, workers=1)
    return prepare(data, TokenizerConfig(vocab_size=384), folder / "prepared").folder


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium; a test process starts one for all its tests."""
    if missing_chromium():
        message = "not installed: chromium (apt-get install chromium)"
        assert os.environ.get("CI") != "true", message
        pytest.skip(message)
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A real SLURM cluster of two nodes, private to a test file."""
    if missing := missing_programs():
        message = f"not installed: {', '.join(missing)} (apt-get install slurm-wlm slurm-client munge)"
        assert os.environ.get("CI") != "true", message
        pytest.skip(message)
    if os.getuid() != 0:
        assert os.environ.get("CI") != "true", "slurmd needs root"
        pytest.skip("slurmd needs root")
    with slurm_cluster() as running:
        yield running


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """An S3 server; a test process starts one for all its tests."""
    with s3_server() as server:
        yield server


@pytest.fixture
def proxy(s3: S3) -> Iterator[Proxy]:
    """Between tests and server; what one test told it, the next does not meet."""
    s3.proxy.forget()
    yield s3.proxy
    s3.proxy.forget()
