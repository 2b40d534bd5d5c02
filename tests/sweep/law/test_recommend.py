"""Recommendations from a known law against the true optimum, and the run file that is written."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from law_support import MODEL, SMALL, TRUTH, UNIQUE, lawful_rows, lawless_rows, true_loss

from megaphase.config.load import load_run_file
from megaphase.sweep.law.big_run import read_big_run
from megaphase.sweep.law.candidates import group_rates, recipes_of
from megaphase.sweep.law.law import fit_laws
from megaphase.sweep.law.recommendation import recommend
from megaphase.sweep.law.rows import LawRows
from megaphase.sweep.law.sweep_law import SweepLaw
from megaphase.sweep.law.target import Limit, parse_target
from megaphase.sweep.law.tuned_run import lines_of, write_tuned_run
from megaphase.utils.errors import InputError, RunError

BIG = {
    "output": "big",
    "tokenizer": "tok",
    "tasks": {"en": {"corpus": "data/en"}, "hi": {"corpus": "data/hi"}},
    "model": {"layers": 4, "hidden": 192, "heads": 4, "seq_len": 128},
    "batch": {"samples": 10},
    "phases": [
        {"name": "static", "steps": 4000, "mixture": {"proportional": True},
         "learning_rate": {"peak": 0.001}},
    ],
}  # fmt: skip
EPOCHS = ["en=1_600_000", "hi=20000"]


def rows_of(rows):
    return LawRows(rows, ["en"], ["hi"], {})


@cache
def law():
    return SweepLaw.of_rows(rows_of(lawful_rows(models=(MODEL, SMALL), steps=(500, 1000))))


def big_run(folder: Path, data=BIG, **more):
    path = folder / "big.yaml"
    path.write_text(yaml.safe_dump(data))
    options = {"steps": None, "tokens": None, "epoch_tokens": EPOCHS} | more
    return read_big_run(path, ["en", "hi"], **options)


def target(text):
    return parse_target(text, ["en"], ["hi"])


def true_losses(candidate, big, task):
    return true_loss(candidate.big_row(law().rows, big), task, TRUTH[task])


def grid(big):
    """A grid over the sweep's range, other than that of the search."""
    for recipe in recipes_of(law().rows):
        for share in recipe.share.values(5, log=False):
            for rate in recipe.rate.values(9):
                for last in (0.001, 0.004):
                    first = next(recipe.grid())
                    yield replace(first, share=share, rate=rate, first_peak=0.004, last_peak=last)


def test_the_recommended_recipe_is_near_the_true_optimum(tmp_path):
    big = big_run(tmp_path)
    found = recommend(law(), big, target("{hi: min, en: within 0.03}"), "tok")
    every = [(true_losses(each, big, "hi"), true_losses(each, big, "en")) for each in grid(big)]
    lowest = min(english for _, english in every)
    best = min(hindi for hindi, english in every if english <= lowest + 0.03)
    own = true_losses(found.candidate, big, "hi")
    assert own <= best + 0.02
    assert true_losses(found.candidate, big, "en") <= lowest + 0.03 + 0.02
    for each in found.predictions:
        true = true_losses(found.candidate, big, each.task)
        assert abs(each.loss - true) <= each.half_width, each


def test_a_single_minimum_and_both_groups(tmp_path):
    big = big_run(tmp_path)
    for text, tasks in [("{hi: min}", ["hi"]), ("{high: min, low: min}", ["en", "hi"])]:
        found = recommend(law(), big, target(text), "tok")
        best = min(np.mean([true_losses(each, big, task) for task in tasks]) for each in grid(big))
        own = np.mean([true_losses(found.candidate, big, task) for task in tasks])
        assert own <= best + 0.02


def test_the_run_file_is_valid_and_says_why(tmp_path):
    big = big_run(tmp_path)
    found = recommend(law(), big, target("{hi: min, en: within 0.03 of static}"), "tok")
    out = tmp_path / "tuned.yaml"
    write_tuned_run(found, out)
    config = load_run_file(out)
    assert sum(phase.steps for phase in config.phases) == 4000
    assert config.phases[-1].mixture.rates["hi"] == pytest.approx(found.candidate.rate, abs=1e-5)
    peak = config.phases[-1].learning_rate.peak
    assert peak == pytest.approx(found.candidate.last_peak, rel=0.01)
    assert config.phases[-1].learning_rate.final == pytest.approx(peak / 10, rel=0.01)
    text = out.read_text()
    for words in (
        "Target: {hi: min, en: within 0.03 of static}",
        "Predicted validation losses",
        f"and those of the best static recipe, {100 * found.static.rate:.3g} % at peak ",
        "above the sweep's range",
        "Further runs",
    ):
        assert words in text
    with pytest.raises(InputError, match="exists"):
        write_tuned_run(found, out)
    elsewhere = tmp_path / "folder" / "tuned.yaml"
    elsewhere.parent.mkdir()
    write_tuned_run(found, elsewhere)
    assert load_run_file(elsewhere).tasks["hi"].corpus == tmp_path / "data" / "hi"
    assert load_run_file(elsewhere).output == tmp_path / "big"


def test_reach_is_told_in_times(tmp_path):
    big = big_run(tmp_path)
    found = recommend(law(), big, target("{hi: min}"), "tok")
    reach = {each.name: each for each in found.reach}
    assert reach["steps"].factor == pytest.approx(4.0)
    assert reach["tokens"].text == "4× above the sweep's range"
    assert reach["parameters without embeddings"].factor == pytest.approx(
        big.parameters / max(law().sizes)
    )
    assert reach["hi: tokens of an epoch"].factor == 1.0
    assert reach["last phase: peak"].factor == 1.0


def test_proxies_narrow_the_prediction_by_what_is_promised(tmp_path):
    """The promise against new fits' covariance, with the proxies added as measured rows."""
    big = big_run(tmp_path)
    found = recommend(law(), big, target("{hi: min}"), "tok")
    left = [each.left for each in found.proxies]
    assert len(left) == 3
    assert 1 > left[0] > left[1] > left[2] > 0
    rows = [*law().rows.rows]
    new = []
    for number, each in enumerate(found.proxies):
        model = next((row.model for row in rows if row.parameters == each.parameters), BIG["model"])
        bare = each.candidate.row(law().rows, model, each.steps, 1280, UNIQUE)
        losses = {task: true_loss(bare, task, TRUTH[task]) for task in ("en", "hi")}
        new.append(replace(bare, run=f"proxy{number}", sweep=f"proxy{number}", losses=losses))
    hindi = next(each for each in law().laws if each.task == "hi")
    (more,) = fit_laws([*rows, *new], ["hi"])
    assert more.chosen.form.core == hindi.chosen.form.core
    row = found.row

    def spread(each):
        _, widths = replace_error(each).predict([row])
        return widths[0]

    def replace_error(each):
        """Without errors of left-out settings and of other forms: the parameters' part alone."""
        chosen = replace(each.chosen, errors=np.zeros_like(each.chosen.errors))
        return replace(each, chosen=chosen, near=[])

    assert spread(more) < spread(hindi)


def test_what_does_not_fit_is_not_recommended(tmp_path):
    big = big_run(tmp_path)
    lawless = SweepLaw.of_rows(rows_of(lawless_rows()))
    with pytest.raises(RunError, match=r"nothing is recommended\. hi: no law fits"):
        recommend(lawless, big, target("{hi: min}"), "tok")
    few = SweepLaw.of_rows(rows_of(lawful_rows(seeds=1)))
    with pytest.raises(RunError, match="one seed"):
        recommend(few, big, target("{hi: min}"), "tok")
    one_size = SweepLaw.of_rows(rows_of(lawful_rows()))
    with pytest.raises(RunError, match="one model size"):
        recommend(one_size, big, target("{hi: min}"), "tok")


def test_rates_of_groups():
    rows = LawRows([], ["a", "b"], ["c", "d"], {}, (1.0, 2.0))
    rates = group_rates(rows, {"a": 300, "b": 100, "c": 100, "d": 400}, 0.3)
    assert rates == pytest.approx({"a": 0.525, "b": 0.175, "c": 0.1, "d": 0.2}, abs=1e-6)
    assert sum(rates.values()) == pytest.approx(1, abs=1e-12)
    assert set(group_rates(rows, {"a": 300, "b": 100, "c": 100, "d": 400}, 0.0)) == {"a", "b"}


def test_a_rate_that_changes_within_a_phase_is_no_static_recipe():
    def highest(rows):
        (static,) = [each for each in recipes_of(rows_of(rows)) if each.kind == "static"]
        return static.rate.high

    rows = lawful_rows()
    most = highest(rows)
    curved = [
        replace(row, phases=[replace(row.phases[0], changes=True)])
        if len(row.phases) == 1 and row.phases[0].rate(["hi"]) == most
        else row
        for row in rows
    ]
    assert highest(curved) < most


def test_wrong_run_files(tmp_path):
    with pytest.raises(InputError, match="the sweep has this task"):
        big_run(tmp_path, BIG | {"tasks": {"en": {"corpus": "data/en"}}})
    with pytest.raises(InputError, match="--epoch-tokens hi=N"):
        big_run(tmp_path, epoch_tokens=["en=100"])
    for wrong in ("hi", "hi=x", "hi=0", "xx=5", "=5"):
        with pytest.raises(InputError, match="--epoch-tokens"):
            big_run(tmp_path, epoch_tokens=["en=100", wrong])
    (phase,) = BIG["phases"]
    for more in ({"model": {"seq_len": 32}}, {"order": "random"}, {"batch": {"samples": 2}}):
        with pytest.raises(InputError, match=rf"phases\[0\]\.{next(iter(more))}: .*without it"):
            big_run(tmp_path, BIG | {"phases": [phase | more]})
    assert big_run(tmp_path, BIG | {"phases": [phase | {"order": "balanced"}]}).steps > 1
    assert big_run(tmp_path, tokens=1_280_001).steps == 1001
    assert big_run(tmp_path, steps=7).steps == 7


NAMES = st.sampled_from(["high", "low", "en", "hi"])
NATS = st.floats(0, 10).map(lambda nats: round(nats, 4))
VALUES = st.one_of(
    st.just("min"),
    st.builds(lambda nats, of: f"within {nats}{of}", NATS, st.sampled_from(["", " of static"])),
)


@given(st.dictionaries(NAMES, VALUES, min_size=1))
def test_targets_are_read(wanted):
    text = "{" + ", ".join(f"{name}: {value}" for name, value in wanted.items()) + "}"
    if "min" not in wanted.values():
        with pytest.raises(InputError, match="no task is to have the lowest loss"):
            target(text)
        return
    found = target(text)
    assert found.minimized == [name for name, value in wanted.items() if value == "min"]
    for name, value in wanted.items():
        if value != "min":
            parts = value.split()
            of = "static" if parts[-1] == "static" else "best"
            assert found.limits[name] == Limit(float(parts[1]), of)
    again = target(str(found))
    assert again.limits == found.limits


@given(st.text(max_size=60))
def test_any_other_text_is_refused_with_the_key(text):
    if "min" in text:
        return
    with pytest.raises(InputError, match="--target"):
        target(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hi", "not a mapping"),
        ("{}", "not a mapping"),
        ("{hi: min", "not a mapping"),
        ("{xx: min}", "no such task or group"),
        ("{hi: max}", "write min, within X"),
        ("{hi: min, en: within -1}", "write min, within X"),
        ("{hi: min, en: within 1e400}", "write min, within X"),
        ("{hi: min, en: 0.02}", "write min, within X"),
        ("{en: within 0.02}", "give one of them min"),
    ],
)
def test_wrong_targets(text, words):
    with pytest.raises(InputError, match="--target") as caught:
        target(text)
    assert words in str(caught.value)


def test_no_text_is_repeated_more_often_than_the_sweep_has_tried(tmp_path):
    most = max(row.epochs("hi") for row in law().rows.rows)
    big = big_run(tmp_path, steps=16_000, epoch_tokens=["en=6_400_000", "hi=20000"])
    rows = [each.big_row(law().rows, big) for each in grid(big)]
    assert max(row.epochs("hi") for row in rows) > 4 * most
    found = recommend(law(), big, target("{hi: min}"), "tok")
    assert found.row.epochs("hi") <= most * (1 + 1e-9)
    ranges = {"static": "tried: 1 to 8 %", "two-phase": "tried: 5 to 40 %"}
    assert any(ranges[found.candidate.recipe.kind] in line for line in lines_of(found))
    further = [line.split(": variance")[0] for line in lines_of(found) if ": variance" in line]
    assert len(set(further)) == len(further) == 3


@pytest.mark.slow
def test_values_at_an_end_and_laws_without_an_effect_of_size_are_named(tmp_path):
    rows = lawful_rows(models=(MODEL, SMALL), steps=(500, 1000))
    noise = np.random.default_rng(0)
    rows = [  # Hindi's loss depends on its tokens alone.
        replace(each, losses={**each.losses,
                "hi": 4 + 30 / each.tokens("hi") ** 0.5 + 0.001 * noise.normal()})
        for each in rows
    ]  # fmt: skip
    found = recommend(
        SweepLaw.of_rows(rows_of(rows)), big_run(tmp_path), target("{hi: min}"), "tok"
    )
    lines = lines_of(found)
    assert any("upper end, a better one may lie beyond it" in line for line in lines)
    assert any("laws without an effect of the model's size: hi" in line for line in lines)
    less = big_run(tmp_path, steps=16_000, epoch_tokens=["en=6_400_000", "hi=1000"])
    with pytest.raises(RunError, match=r"text of hi \d+ times.*tasks\.hi\.subsample"):
        recommend(law(), less, target("{hi: min}"), "tok")


def test_a_law_of_rates_holds_for_the_budgets_of_the_sweep_alone(tmp_path, monkeypatch):
    laws = []
    for each in law().laws:
        of_rates = next(tried for tried in each.tried if tried.form.core == "mixing")
        laws.append(replace(each, chosen=of_rates, means=replace(each.means, noise=10.0)))
    rates = replace(law(), laws=laws)
    noisy = r"hi: no law fits.*at most 0\.100 would do.*name other tasks in --target \(.*: en"
    with pytest.raises(RunError, match=noisy):
        recommend(rates, big_run(tmp_path), target("{hi: min, en: within 0.1}"), "tok")
    monkeypatch.setattr("megaphase.sweep.law.law.MOST_NATS", 10.0)
    with pytest.raises(RunError, match="holds for the sweep's budget alone"):
        recommend(rates, big_run(tmp_path), target("{hi: min}"), "tok")


@pytest.mark.slow
def test_one_budget_tells_nothing_of_another(tmp_path):
    one = SweepLaw.of_rows(rows_of(lawful_rows(models=(MODEL, SMALL))))
    with pytest.raises(RunError, match=r"one budget, 1,280,000 tokens.*add a sweep with another"):
        recommend(one, big_run(tmp_path), target("{hi: min}"), "tok")


@pytest.mark.parametrize(
    ("schedule", "reset", "one_peak"),
    [("cosine, spans", True, True), ("cosine, spans", False, True), ("cosine", False, False),
     ("cosine", True, False)],
)  # fmt: skip
def test_phases_have_one_peak_where_a_schedule_spans_them(schedule, reset, one_peak):
    """Whether the optimizer state is reset says nothing about the schedule."""
    rows = [
        replace(row, phases=[row.phases[0], replace(row.phases[1], schedule=schedule, reset=reset)])
        for row in lawful_rows()
        if len(row.phases) == 2
    ]
    (recipe,) = [each for each in recipes_of(rows_of(rows)) if each.kind == "two-phase"]
    assert recipe.one_peak == one_peak
