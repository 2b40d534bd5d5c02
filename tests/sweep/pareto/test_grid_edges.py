"""Best settings at an edge of the grid."""

from sweep_support import record_of

from megaphase.sweep.pareto.fronts import fronts_of
from megaphase.sweep.pareto.grid_edges import grid_edges_sentence


def test_the_ends_of_every_axis_are_named():
    arms = {
        "static": {"rates": [0.05, 0.1, 0.2]},
        "two-phase": {"pretrain": [0.7, 0.85], "rates": [0.1]},
        "restart": {"pretrain": [0.7], "rates": [0.1]},
    }

    def losses(trial):
        rate = trial.mixture.rate or 0.0
        if trial.arm == "static":
            return 3.0, 5.0 + abs(rate - 0.1) - 100 * trial.peak
        return 3.0, 5.0 - trial.setting.share + 100 * trial.peak

    peaks = {"peaks": [0.001, 0.004]}
    record = record_of(arms, losses, seeds=[1], learning_rate=peaks)
    assert grid_edges_sentence(fronts_of(record)) == (
        "Best settings at an end of the values that were tried, beyond which a better one may lie: "
        "static (highest peak); two-phase (highest pre-training, lowest peak); restart (lowest "
        "peak)."
    )


def test_without_two_values_there_is_no_end():
    record = record_of({"static": {"rates": [0.1]}}, lambda _: (3.0, 5.0), seeds=[1])
    assert grid_edges_sentence(fronts_of(record)) is None
