"""A save and a load need one chunk beside the state, however large the state is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = """
import json, sys
from pathlib import Path
import torch
from gptscale.checkpoint.agreement import Alone
from gptscale.checkpoint.read import open_checkpoint
from gptscale.checkpoint.write import save_checkpoint
from gptscale.flow import Piece, TensorShard
from tests.helpers.checkpoints import random_state, whole_pieces

torch.set_num_threads(1)
folder, rows = Path(sys.argv[1]), int(sys.argv[2])

def resident_bytes(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024

def extra_bytes(work):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident_bytes("VmRSS:")
    result = work()
    return resident_bytes("VmHWM:") - before

def save(step, pieces):
    return save_checkpoint(
        folder, step, pieces, state={}, layout={}, comm=Alone(), keep=2, report=print)

warm = whole_pieces(random_state({"small": (10, 10)}, 0))
open_checkpoint(save(1, warm)).fill(warm)
state = random_state({"large": (rows, 2048)}, 0, ["weight", "exp_avg"])
pieces = whole_pieces(state)
bands = [Piece("large", "weight", (rows, 2048), 0, torch.zeros(rows * 1024), TensorShard(1, 500, 1024))]
found = {"save": extra_bytes(lambda: save(2, pieces))}
checkpoint = open_checkpoint(folder / "step-00000002")
found["fill"] = extra_bytes(lambda: checkpoint.fill(pieces))
found["fill bands"] = extra_bytes(lambda: checkpoint.fill(bands))
found["verify"] = extra_bytes(checkpoint.verify)
found["read_parameter"] = extra_bytes(lambda: checkpoint.read_parameter("large"))
print(json.dumps(found))
"""

MIB = 2**20
CHUNK_BYTES = 16 * MIB
SLACK_BYTES = 6 * MIB


@pytest.mark.parametrize("parameter_bytes", [24 * MIB, 72 * MIB])
def test_extra_memory_is_one_chunk(tmp_path: Path, parameter_bytes: int) -> None:
    rows = parameter_bytes // (2048 * 4)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path, str(rows)], capture_output=True, text=True, timeout=300, check=True
    )
    found = json.loads(done.stdout)
    assert found["save"] < SLACK_BYTES
    for work in ("fill", "fill bands", "verify"):
        assert found[work] < CHUNK_BYTES + SLACK_BYTES, work
    # That copies would have been seen: this one makes one, of the parameter.
    assert parameter_bytes <= found["read_parameter"] < parameter_bytes + CHUNK_BYTES + SLACK_BYTES
