"""The colours of arms: the same in every report, different within one."""

from hypothesis import given, settings
from hypothesis import strategies as st

from megaphase.report.page import CSS_VARIABLES
from megaphase.sweep.arms.config import KINDS
from megaphase.sweep.pareto.arm_styles import MARKERS, style_of_arms
from megaphase.utils.plot_style import LINE_COLOURS

names = st.one_of(st.sampled_from([*KINDS, "dropout", "cooldown", "cascade"]), st.text(max_size=6))


@settings(deadline=None)
@given(st.lists(names, unique=True, max_size=len(LINE_COLOURS)), st.randoms())
def test_colours_depend_on_the_names_alone_and_differ(arms, random):
    styles = style_of_arms(arms)
    assert list(styles) == arms
    assert len({colour for colour, _ in styles.values()}) == len(arms)
    assert {colour for colour, _ in styles.values()} <= CSS_VARIABLES.keys()
    shuffled = random.sample(arms, len(arms))
    assert style_of_arms(shuffled) == styles


@settings(deadline=None)
@given(st.lists(names, unique=True, max_size=30))
def test_known_arms_have_the_same_style_in_every_sweep(others):
    fixed = style_of_arms(KINDS)
    found = style_of_arms(list(dict.fromkeys([*others, *KINDS])))
    assert {arm: found[arm] for arm in KINDS} == fixed


def test_an_unknown_arm_does_not_take_the_colour_of_a_known_one():
    fixed = {colour for colour, _ in style_of_arms(KINDS).values()}
    for name in map(str, range(50)):
        assert style_of_arms([name])[name][0] not in fixed


def test_more_arms_than_colours_differ_in_the_marker():
    many = [f"arm-{i}" for i in range(len(LINE_COLOURS) * len(MARKERS))]
    assert len(set(style_of_arms(many).values())) == len(many)
