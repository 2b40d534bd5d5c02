"""Rates that do not sum to 1 are refused with the ones that do, ready to be pasted."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from megaphase.plan.mixture import MixtureConfig


def proposed(rates):
    """Return the rates of the message that refuses these."""
    with pytest.raises(ValidationError) as found:
        MixtureConfig.model_validate({"rates": rates})
    message = found.value.errors()[0]["msg"]
    return yaml.safe_load(message.partition("in the same proportions: ")[2])


NUMBERS = st.integers(0, 1000) | st.floats(1e-6, 1e3)


@given(st.dictionaries(st.text("abc", min_size=1), NUMBERS, min_size=1, max_size=20))
def test_the_proposed_rates_are_accepted_and_in_the_same_proportions(weights):
    total = sum(weights.values())
    if total == 0 or abs(total - 1) <= 1e-6:
        return
    rates = proposed(weights)
    assert MixtureConfig.model_validate({"rates": rates}).rates == rates
    for task, weight in weights.items():
        assert rates[task] == pytest.approx(weight / total, abs=2e-6)


def test_curves_are_proposed_with_their_shapes():
    curves = {"a": {"from": 0.1, "to": 1, "shape": "cosine"}, "b": 0.5, "c": {"from": 0, "to": 0.5}}
    assert proposed(curves) == {
        "a": {"from": 0.166667, "to": 0.5, "shape": "cosine"},
        "b": {"from": 0.833333, "to": 0.25},
        "c": {"from": 0, "to": 0.25},
    }


def test_nothing_is_proposed_where_all_rates_are_0():
    assert proposed({"a": 0, "b": 0}) is None
