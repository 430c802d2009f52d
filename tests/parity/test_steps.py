"""Every layout waits as little, skips as exactly, scales its fp16 loss alike, and measures the same gradient noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import ranks
from tests.parity.cells import PLAIN, Layout
from tests.parity.steps import POISONED, SAVED, record_steps

LAYOUTS = [
    *((Layout("deepspeed", stage), ranks) for stage, ranks in ((3, 1), (0, 2), (1, 2), (2, 2), (3, 2))),
    *((Layout("deepspeed", stage, tensor=2), ranks) for stage, ranks in ((0, 2), (1, 4), (3, 4))),
    (Layout("deepspeed", 1, sequence=2), 2),
    (Layout("deepspeed", 1, pipeline=2), 2),
    (Layout("deepspeed", 1, pipeline=2, tensor=2), 4),
]


def record(folder: Path, layout: Layout, size: int, elsewhere: Path | None, full: bool = False) -> dict[str, Any]:
    folder.mkdir()
    saved = str(folder / "saved")
    source = None if elsewhere is None else str(elsewhere / "saved")
    ranks.run(record_steps, [layout, saved, source, full], size, folder)
    found = [json.loads((folder / f"steps-{rank}.json").read_text()) for rank in range(size)]
    for other in found[1:]:
        for part in ("noise", "fp16"):
            assert json.dumps(other[part]) == json.dumps(found[0][part]), "ranks report the same"
    first: dict[str, Any] = found[0]
    return first


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("steps") / "plain"


@pytest.fixture(scope="module")
def plain(plain_folder: Path) -> dict[str, Any]:
    return record(plain_folder, PLAIN, 1, None, full=True)


def check_waits_and_skips(found: dict[str, Any], waits: int) -> None:
    assert sum(found["waits"].values()) == waits, found["waits"]
    assert sum(found["waits_of_a_skip"].values()) == waits, found["waits_of_a_skip"]
    assert found["changed_by_a_skip"] == []
    assert np.isfinite(found["norms"]).tolist() == [True, False, True]
    assert min(found["seconds"]) > 0


def check_fp16(found: dict[str, Any]) -> None:
    """The scale starts too high on purpose, falls until gradients fit, and rises after three good steps."""
    losses, norms, scales = (np.array(column) for column in list(zip(*found["steps"], strict=True))[:3])
    overflowed = ~np.isfinite(norms)
    assert overflowed[0]
    assert overflowed[POISONED]
    assert not overflowed.all()
    assert scales[0] == 2.0**21
    assert scales.min() < scales[0]
    assert (np.diff(np.log2(scales)) == 1).any(), "it rises again"
    assert found["updates"] == len(norms) - overflowed.sum() + 1, "and the step after the last"
    assert np.isfinite(losses[~overflowed]).all()
    assert sum(found["waits"].values()) == 1, found["waits"]
    assert json.dumps(found["resumed"]) == json.dumps(found["rest"]), "bit for bit"


def test_the_plain_engine(plain: dict[str, Any]) -> None:
    check_waits_and_skips(plain["fused"], waits=0)
    assert plain["fused"]["updates"] == [2, 3], "a skipped step is no update, the one after it is"
    check_waits_and_skips(plain["unfused"], waits=1)
    check_fp16(plain["fp16"])


@pytest.mark.parametrize(("layout", "size"), LAYOUTS)
def test_a_layout(layout: Layout, size: int, plain: dict[str, Any], plain_folder: Path, tmp_path: Path) -> None:
    full = size == 2
    found = record(tmp_path / "found", layout, size, plain_folder, full)
    check_waits_and_skips(found["fused"], waits=0)
    assert found["fused"]["updates"] == [2, 3], "a skipped step is no update, the one after it is"
    if full:
        check_waits_and_skips(found["unfused"], waits=1)
    check_fp16(found["fp16"])
    assert found["rules"] == 200 * 60, "our rule for the scale is DeepSpeed's"
    # The signal is what is left of a squared norm of about 9 when most of it is noise: 1e-5 of the norm, no better.
    measures_noise = found["noise"] is not None
    assert measures_noise == (layout.sequence == layout.pipeline == 1)
    if measures_noise:
        np.testing.assert_allclose(found["noise"], plain["noise"], rtol=1e-5, atol=1e-4)
    expected = np.array(plain["fp16"]["steps"], dtype=float)
    for made, reference in ((found["fp16"]["steps"], expected), (found["fp16"]["moved"], expected[SAVED:])):
        made = np.array(made, dtype=float)
        reference = reference[:, : made.shape[1]]
        assert (np.isfinite(made) == np.isfinite(reference)).all()
        finite = np.isfinite(reference).all(axis=1)
        print("fp16, largest differences:", np.abs(made[finite] - reference[finite]).max(axis=0))
        assert made[:, 2].tolist() == reference[:, 2].tolist(), "the loss scale"
        # A weight that lands on the other side of a rounding boundary moves an fp16 product by 2⁻¹¹.
        np.testing.assert_allclose(made[finite, :2], reference[finite, :2], rtol=1e-3)
        if measures_noise:
            np.testing.assert_allclose(made[finite, 3:], reference[finite, 3:], rtol=1e-3, atol=5e-3)
