"""Promise 4: killed at any moment, a run resumes bit for bit. Tensor 2 × data 2, ZeRO-3.

Part of the slow tests: `make test-slow`.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from chaos import MOMENTS, NEVER, Victim, chaos_settings, reference
from run_support import make_corpora, read_rows, timeless, write_run_file

LAYOUT = (4, 2, 3)
KILLS = 25


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_survives_many_kills_bit_for_bit(tmp_path: Path) -> None:
    settings = chaos_settings(make_corpora(tmp_path / "corpora"), LAYOUT)
    expected = reference(tmp_path / "undisturbed", settings, LAYOUT)
    random, kills, number = Random(20260), 0, 0
    while kills < KILLS:
        victim = Victim(write_run_file(tmp_path / f"run-{number}", settings), random)
        moments = MOMENTS * 3
        random.shuffle(moments)
        while moments and victim.live(LAYOUT, moments.pop()):
            pass
        assert not victim.live(LAYOUT, NEVER)
        assert timeless(read_rows(victim.folder)) == expected, dict(victim.counts)
        assert not list((victim.folder / "checkpoints").glob(".*"))
        kills += victim.kills
        number += 1
