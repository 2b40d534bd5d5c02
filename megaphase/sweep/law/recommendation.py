"""The recipe that a law thinks best for a run, with predictions and how far they reach."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megaphase.sweep.law.big_run import BigRun
from megaphase.sweep.law.candidates import Candidate, Recipe, recipes_of
from megaphase.sweep.law.law import TaskLaw
from megaphase.sweep.law.proxies import Proxy, best_proxies
from megaphase.sweep.law.rows import LawRow
from megaphase.sweep.law.section import verdict_sentence
from megaphase.sweep.law.sweep_law import SweepLaw
from megaphase.sweep.law.table import SettingTable, Vector
from megaphase.sweep.law.target import WHERE, Target
from megaphase.utils.errors import InputError, RunError

SAME = 1.25  # ratio up to which sizes and budgets count as those of the sweep


@dataclass(frozen=True)
class Prediction:
    """A predicted loss, half of its 95 % interval, and the best static recipe's prediction."""

    task: str
    loss: float
    half_width: float
    static: float | None


@dataclass(frozen=True)
class Reach:
    """A quantity of the recommended run, and the range of the sweep."""

    name: str
    value: float
    low: float
    high: float

    @property
    def factor(self) -> float:
        """How many times it is above or below the range; 1 within it."""
        if self.value > self.high:
            return self.value / self.high if self.high > 0 else float("inf")
        return self.low / self.value if 0 < self.value < self.low else 1.0

    @property
    def text(self) -> str:
        """The factor in words."""
        if self.factor <= 1 + 1e-6:
            return "within the sweep's range"
        return (
            f"{self.factor:.3g}× {'above' if self.value > self.high else 'below'} the sweep's range"
        )


@dataclass(frozen=True)
class Recommendation:
    """What is recommended.

    Attributes:
        static: the static recipe with the best minimized losses, whatever the limits.
        unknown: tasks whose losses no law predicts.
        tokenizer: the name of the sweep's.
    """

    law: SweepLaw
    big: BigRun
    target: Target
    candidate: Candidate
    row: LawRow
    static: Candidate | None
    predictions: Sequence[Prediction]
    unknown: Sequence[str]
    reach: Sequence[Reach]
    proxies: Sequence[Proxy]
    tokenizer: str


@dataclass(frozen=True)
class _Scored:
    """Candidates with the predicted loss of every name of the target [names, candidates]."""

    candidates: Sequence[Candidate]
    losses: dict[str, Vector]

    @property
    def is_static(self) -> np.ndarray:
        return np.array([each.recipe.kind == "static" for each in self.candidates])

    def joined(self, other: _Scored) -> _Scored:
        losses = {name: np.concatenate([values, other.losses[name]])
                  for name, values in self.losses.items()}  # fmt: skip
        return _Scored([*self.candidates, *other.candidates], losses)


def recommend(law: SweepLaw, big: BigRun, target: Target, tokenizer: str) -> Recommendation:
    """Return the best recipe within the range of the sweep; tokenizer: the name of the sweep's.

    Raises:
        InputError: the target compares with static recipes, and the sweep has none.
        RunError: no law fits, or none holds for such a run, or the target cannot be reached.
    """
    laws = {each.task: each for each in law.laws}
    _check_laws(law, laws, big, target)
    recipes = recipes_of(law.rows)
    if not recipes:
        raise RunError("the sweep has tried no recipe of one phase or of two, so there is none to "
                       "recommend")  # fmt: skip
    if any(limit.of == "static" for limit in target.limits.values()) and not any(
        recipe.kind == "static" for recipe in recipes
    ):
        raise InputError(WHERE, "the sweep has no static recipe", "write within X, of best")

    most_epochs = {
        task: max(1.0, *(row.epochs(task) for row in law.rows.rows)) for task in law.rows.tasks
    }

    def scored(candidates: Iterable[Candidate]) -> _Scored:
        known = [(each, each.big_row(law.rows, big)) for each in candidates]
        known = [(each, row) for each, row in known if _repeats_at_most(row, most_epochs)]
        candidates, rows = [each for each, _ in known], [row for _, row in known]
        if not rows:
            return _Scored([], dict.fromkeys(target.members, np.empty(0)))
        by_task = {
            task: laws[task].fit.predict(SettingTable.of(rows, task))
            for task in {task for members in target.members.values() for task in members}
        }
        losses = {
            name: np.mean([by_task[task] for task in members], axis=0)
            for name, members in target.members.items()
        }
        return _Scored(candidates, losses)

    every = scored(each for recipe in recipes for each in recipe.grid())
    if not every.candidates:
        raise RunError(_too_often(most_epochs, recipes, law, big))
    first = every.candidates[_best(every, target)]
    every = every.joined(scored(first.recipe.around(first)))
    chosen = every.candidates[_best(every, target)]
    row = chosen.big_row(law.rows, big)
    static = _best_static(every, target)
    fitting = [each for each in law.laws if each.fits]
    named = {task for members in target.members.values() for task in members}
    return Recommendation(
        law=law,
        big=big,
        target=target,
        candidate=chosen,
        row=row,
        static=static,
        predictions=_predictions(law, fitting, row, static, big),
        unknown=[each.task for each in law.laws if not each.fits],
        reach=reach_of(law, row),
        proxies=best_proxies([laws[task] for task in sorted(named)], law.rows, row),
        tokenizer=tokenizer,
    )


def _repeats_at_most(row: LawRow, epochs: Mapping[str, float]) -> bool:
    """Return whether no text is repeated more often: no sweep tells what that does."""
    return all(row.epochs(task) <= most * (1 + 1e-9) for task, most in epochs.items())


def _too_often(
    most: Mapping[str, float], recipes: Sequence[Recipe], law: SweepLaw, big: BigRun
) -> str:
    """Say that every recipe repeats some text more often than the sweep has tried."""
    rows = [each.big_row(law.rows, big) for recipe in recipes for each in recipe.grid()]
    least = {task: min(row.epochs(task) for row in rows) for task in most}
    task = max(most, key=lambda each: least[each] / most[each])
    return (
        f"nothing is recommended: with the sweep's lowest rate {big.path} would see the text of "
        f"{task} {least[task]:,.3g} times, and no law tells what more than the "
        f"{most[task]:,.3g} times of the sweep do; add a sweep with less text "
        f"(settings: tasks.{task}.subsample), or with lower rates"
    )


def _check_laws(law: SweepLaw, laws: dict[str, TaskLaw], big: BigRun, target: Target) -> None:
    if law.reason is not None:
        raise RunError(f"no law is fitted, so nothing is recommended: {law.reason}")
    named = [task for members in target.members.values() for task in members]
    if misfits := [task for task in dict.fromkeys(named) if not laws[task].fits]:
        others = [task for task, each in laws.items() if each.fits]
        raise RunError(
            f"nothing is recommended. {'; '.join(verdict_sentence(laws[task]) for task in misfits)}"
            f". Add settings or seeds to the sweep, or name other tasks in {WHERE} (a law fits: "
            f"{', '.join(others) or 'none'})"
        )
    minimized = [laws[task] for name in target.minimized for task in target.members[name]]
    if all(each.is_constant for each in minimized):
        raise RunError(f"nothing is recommended. {verdict_sentence(minimized[0])}")
    sizes = law.sizes
    if len(sizes) == 1 and not sizes[0] / SAME <= big.parameters <= sizes[0] * SAME:
        raise RunError(
            f"the sweep has one model size, {sizes[0]:,} parameters without embeddings, and "
            f"{big.path} has {big.parameters:,}; add models to the sweep"
        )
    budgets = [row.total_tokens for row in law.rows.rows]
    budget = big.steps * big.step_tokens
    has_one, other = max(budgets) <= min(budgets) * SAME, f"{big.path} has {budget:,} tokens"
    if has_one and not max(budgets) / SAME <= budget <= min(budgets) * SAME:
        raise RunError(
            f"the sweep has one budget, {max(budgets):,.0f} tokens, from which no law tells what "
            f"more tokens do, and {other}; add a sweep with another budget"
        )
    for task in dict.fromkeys(named):
        of_tokens = laws[task].chosen.form.depends_on_tokens or laws[task].is_constant
        if not of_tokens and not min(budgets) / SAME <= budget <= max(budgets) * SAME:
            raise RunError(
                f"the law of {task} ({laws[task].chosen.form.name}) holds for the sweep's budget "
                f"alone, and {other}; add a sweep with another budget"
            )


def _limits(scored: _Scored, target: Target) -> dict[str, float]:
    """Return the highest loss that each limit allows.

    Raises:
        RunError: it is relative to static recipes, and there are none.
    """
    if any(limit.of == "static" for limit in target.limits.values()) and not scored.is_static.any():
        raise RunError(
            "nothing is recommended: every static recipe would repeat a text more often than the "
            f"sweep; write within X, of best, in {WHERE}, or add a sweep with less text"
        )
    return {
        name: limit.nats
        + float(np.min(scored.losses[name][scored.is_static] if limit.of == "static"
                       else scored.losses[name]))
        for name, limit in target.limits.items()
    }  # fmt: skip


def _objective(scored: _Scored, target: Target) -> Vector:
    mean: Vector = np.mean([scored.losses[name] for name in target.minimized], axis=0)
    return mean


def _best(scored: _Scored, target: Target) -> int:
    """Return the index of the best candidate that keeps all limits.

    Raises:
        RunError: none does.
    """
    limits = _limits(scored, target)
    excess = np.zeros(len(scored.candidates))
    for name, most in limits.items():
        excess = np.maximum(excess, scored.losses[name] - most)
    allowed = excess <= 1e-9
    if not allowed.any():
        raise RunError(
            f"no recipe within the sweep's range reaches {target}; the nearest one exceeds a limit "
            f"by {float(excess.min()):.3f} nats"
        )
    return int(np.argmin(np.where(allowed, _objective(scored, target), np.inf)))


def _best_static(scored: _Scored, target: Target) -> Candidate | None:
    """Return the static recipe with the best minimized losses, whatever the limits."""
    if not scored.is_static.any():
        return None
    return scored.candidates[
        int(np.argmin(np.where(scored.is_static, _objective(scored, target), np.inf)))
    ]


def _predictions(
    law: SweepLaw, laws: Sequence[TaskLaw], row: LawRow, static: Candidate | None, big: BigRun
) -> list[Prediction]:
    found = []
    for each in laws:
        losses, widths = each.predict([row])
        of_static = None
        if static is not None:
            of_static = float(each.predict([static.big_row(law.rows, big)])[0][0])
        found.append(Prediction(each.task, float(losses[0]), float(widths[0]), of_static))
    return found


def reach_of(law: SweepLaw, row: LawRow) -> list[Reach]:
    """Return every quantity of a run beside the range that the sweep has tried."""
    rows, low = law.rows.rows, law.rows.low

    def compare(name: str, values: Sequence[float], own: float) -> Reach:
        return Reach(name, own, min(values), max(values))

    found = [
        compare("parameters without embeddings", [each.parameters for each in rows],
                row.parameters),
        compare("steps", [each.steps for each in rows], row.steps),
        compare("tokens", [each.total_tokens for each in rows], row.total_tokens),
        compare("tokens per step", [each.total_tokens / each.steps for each in rows],
                row.total_tokens / row.steps),
        compare("last phase: low-resource rate", [each.phases[-1].rate(low) for each in rows],
                row.phases[-1].rate(low)),
        compare("last phase: peak", [each.phases[-1].peak for each in rows], row.phases[-1].peak),
    ]  # fmt: skip
    for task in law.rows.tasks:
        found += [
            compare(f"{task}: tokens of an epoch", [each.unique[task] for each in rows],
                    row.unique[task]),
            compare(f"{task}: tokens", [each.tokens(task) for each in rows], row.tokens(task)),
            compare(f"{task}: epochs", [each.epochs(task) for each in rows], row.epochs(task)),
        ]  # fmt: skip
    return found
