"""DeepSpeed's own settings reach it, and leave the run as it is."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.training import exact_part, read_metrics, run_training, small_run

RAW = "parallel.deepspeed."


def test_what_deepspeed_is_asked_for_it_does(corpus: Path, tmp_path: Path) -> None:
    profile = tmp_path / "flops.txt"
    keys = [
        f"{RAW}dump_state=true",
        f"{RAW}comms_logger.enabled=true",
        f"{RAW}comms_logger.verbose=true",
        f"{RAW}flops_profiler.enabled=true",
        f"{RAW}flops_profiler.profile_step=2",
        f"{RAW}flops_profiler.output_file={profile}",
        f"{RAW}wall_clock_breakdown=true",
        f"{RAW}steps_per_print=1",
        f"{RAW}zero_optimization.reduce_bucket_size=5000",
    ]
    told = {}
    for name, extra in (("silent", []), ("told", keys)):
        arguments = [*small_run(corpus, tmp_path / name), "parallel=zero2", "train.steps=3", "schedule.total_steps=3"]
        told[name] = run_training([*arguments, *extra], 2, tmp_path).text()
    for words in ("DeepSpeedEngine configuration", "comm op: ", "time (ms) | fwd"):
        assert words in told["told"]
        assert words not in told["silent"]
    assert "Flops Profiler" in profile.read_text()
    assert exact_part(read_metrics(tmp_path / "told")) == exact_part(read_metrics(tmp_path / "silent"))
