"""Which points and error bars the figure of trade-off fronts leaves out."""

import numpy as np
import pytest

from megaphase.sweep.arms.setting import Mixture, TriedSetting
from megaphase.sweep.pareto.statistics import Estimate
from megaphase.sweep.pareto.trade_off import (
    Mark,
    Panel,
    bars_note,
    limits_of,
    outside_marks,
    trade_off_plot,
)
from megaphase.utils.plot_style import WIDE

STYLES = {"static": ("#0072b2", "o"), "other": ("#d55e00", "s")}


def mark(arm, x, y, errors=(None, None)):
    values = (("rate", 0.1),)
    setting = TriedSetting(arm, None, values, Mixture(rate=0.1), None, (0.004,), "10%", "10%")
    x, y = (Estimate(value, error, 3) for value, error in zip((x, y), errors, strict=True))
    return Mark(setting, "10%", x, y, is_core=arm == "static", on_front=True)


CORE = [mark("static", 3.0, 5.2), mark("static", 3.2, 5.0)]


@pytest.mark.parametrize(
    ("x", "y", "is_outside"),
    [
        (3.1, 4.0, False),  # far better in one, and between the others in the other
        (2.0, 5.1, False),
        (2.0, 4.0, False),
        (3.3, 5.1, False),  # little worse
        (3.4, 4.0, True),  # much worse in one
        (2.0, 5.4, True),
    ],
)
@pytest.mark.parametrize("higher_is_better", [False, True])
def test_only_what_is_much_worse_is_outside(x, y, is_outside, higher_is_better):
    sign = -1 if higher_is_better else 1
    marks = [*CORE, mark("other", x, y)]
    turned = [mark(m.arm, sign * m.x.mean, sign * m.y.mean) for m in marks]
    panel = Panel("", turned, frozenset({"static"}), higher_is_better)
    assert [each.arm for each in outside_marks(panel)] == ["other"] * is_outside


def test_a_bar_across_the_whole_picture_is_said_and_not_drawn():
    most = 1.0  # wider than the picture
    (first, second) = CORE
    marks = [
        mark("static", first.x.mean, first.y.mean, (most, 0.001)),
        mark("static", second.x.mean, second.y.mean, (0.02, most)),
    ]
    panel = Panel("", marks, frozenset({"static"}))
    (left, right), _ = limits_of(panel)
    half = marks[1].x.half_width
    assert left < 3.2 - half < right < 3.2 + half
    assert bars_note(panel) == "1 bar cut off; 2 bars longer than the picture not drawn"
    (axes,) = trade_off_plot([panel], STYLES, ("x", "y"), WIDE).axes
    (container,) = axes.containers
    lengths = [
        [np.ptp(segment[:, axis]) for segment in bars.get_segments() if len(segment)]
        for axis, bars in enumerate(container[2])
    ]
    assert lengths[0] == pytest.approx([2 * half])
    assert lengths[1] == pytest.approx([2 * marks[0].y.half_width])
