"""The forms that a law may have: a task's loss as a function of a run's setting.

A form is nonlinear in a few parameters and linear in the others, its coefficients. N: parameters
without embeddings; D: tokens of the task, U those of one epoch, R = D/U - 1 the epochs beyond the
first; p = D over all tokens.

power: L = E + A/N^alpha + B/D^beta (Hoffmann et al. 2022).
repetition: D becomes U + U R* (1 - exp(-R/R*)) (Muennighoff et al. 2023, arXiv 2305.16264), in
    which a repeated token is worth less, but never harms.
overfitting: the power form + P R^kappa, a penalty that is added for repetition, as by Lovelace et
    al. 2026 (arXiv 2605.01640): losses of small corpora rise again, which the form above cannot.
order: D is multiplied by the mean of exp(-recency (1 - x)) over the task's tokens, x their place in
    the run, so that early tokens count less (or more), also as repetition.
transfer: tau times the tokens of all other tasks are added (an exchange factor as in ATLAS,
    Longpre et al. 2025, arXiv 2510.22037).
efficiency: the effective tokens are multiplied by a power of N, since larger models reach a loss
    with fewer of them (Kaplan et al. 2020, arXiv 2001.08361).
capacity: the penalty is multiplied by (N/U)^omega, since models that are larger for their text
    memorize it sooner.
mixing: L = E + K exp(-t p) (Ye et al. 2024, arXiv 2403.16952). multilingual: L = (E + A/N^alpha)
    p^-gamma (He et al. 2024, arXiv 2410.12883). log-linear and constant: what a form must beat.

All but the constant have terms of the schedule, which are linear: ln of the last phase's peak (and
its square, with three peaks or more); optionally its products with ln N and with ln of the last
phase's tokens, since the best peak depends on both (Li et al. 2025, arXiv 2503.04715), and besides
these the peak of the first phase, the reset and the end of the learning rate; all as far as the
sweep varies them independently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import numpy as np

from megaphase.sweep.law.table import SettingTable, Vector

Core = Literal[
    "constant", "log-linear", "mixing", "multilingual", "power", "repetition", "overfitting"
]
Sign = Literal["positive", "free"]
Schedule = Literal["none", "main", "peaks", "all"]  # each has the terms of those before it
TOKEN_CORES: tuple[Core, ...] = ("power", "repetition", "overfitting")
FIXED_ALPHA = 0.34  # of Hoffmann et al. 2022, for sweeps with two model sizes
SIZE_UNIT, TOKEN_UNIT = 1e6, 1e4  # so that coefficients are about 1


class Bounded(NamedTuple):
    """A nonlinear parameter with its bounds and the values from which fits start."""

    name: str
    low: float
    high: float
    starts: tuple[float, ...]
    log: bool = False


ALPHA = Bounded("alpha", 0.05, 1.5, (0.34,))
BETA = Bounded("beta", 0.02, 2.0, (0.3, 0.8))
GAMMA = Bounded("gamma", 0.001, 1.5, (0.1, 0.4))
RATE_OF_MIXING = Bounded("t", 0.1, 1000.0, (3.0, 30.0), log=True)
REPEATS = Bounded("repeats", 0.1, 200.0, (4.0, 15.0), log=True)
KAPPA = Bounded("kappa", 0.3, 2.5, (1.0,))
RECENCY = Bounded("recency", -10.0, 40.0, (0.5, 4.0))
EFFICIENCY = Bounded("efficiency", 0.0, 3.0, (0.5, 1.5))
OMEGA = Bounded("omega", 0.0, 2.0, (0.3, 1.0))
TAU = Bounded("tau", 1e-6, 1.0, (3e-3, 0.05), log=True)


class Column(NamedTuple):
    """A linear coefficient and the values that it multiplies."""

    name: str
    sign: Sign
    values: Vector


class Centers(NamedTuple):
    """See `Scope`."""

    peak: float
    size: float
    tokens: float


@dataclass(frozen=True)
class Scope:
    """Which terms a sweep can identify.

    Attributes:
        sizes: number of different model sizes.
        centers: means of the logarithms of the last phase's peak, of the size and of the last
            phase's tokens, which are subtracted from them.
        schedule: names of the schedule's terms.
        repeats: whether the task's text is repeated in some setting.
        capacities: number of different ratios of parameters to the tokens of one epoch.
    """

    sizes: int
    centers: Centers
    schedule: tuple[str, ...]
    repeats: bool
    capacities: int

    def terms(self, schedule: Schedule) -> tuple[str, ...]:
        """Return the names of the terms that forms with this schedule have."""
        known = {"none": (), "main": MAIN, "peaks": (*MAIN, *PRODUCTS)}.get(schedule, self.schedule)
        return tuple(name for name in self.schedule if name in known)


@dataclass(frozen=True)
class Form:
    """One form. schedule: which terms of the schedule it has."""

    core: Core
    order: bool
    transfer: bool
    efficiency: bool
    schedule: Schedule
    scope: Scope
    capacity: bool = False

    @property
    def name(self) -> str:
        """The form's name in tables."""
        parts = [self.core, *(["capacity"] if self.capacity else [])]
        parts += ["order"] if self.order else []
        parts += ["transfer"] if self.transfer else []
        parts += ["efficiency"] if self.efficiency else []
        parts += {"peaks": ["peaks"], "all": ["schedule"]}.get(self.schedule, [])
        return " + ".join(parts)

    def contains(self, other: Form) -> bool:
        """Return whether another form is this one without some of its terms."""
        return (
            self.core == other.core
            and self != other
            and self.order >= other.order
            and self.transfer >= other.transfer
            and self.efficiency >= other.efficiency
            and self.capacity >= other.capacity
            and LEVELS.index(self.schedule) >= LEVELS.index(other.schedule)
        )

    @property
    def centers(self) -> list[tuple[str, float]]:
        """The means that the terms of the schedule subtract from logarithms, by name."""
        terms, centers = self.scope.terms(self.schedule), self.scope.centers
        known = (
            ("mean of ln peak", centers.peak, (*MAIN, *PRODUCTS)),
            ("mean of ln N", centers.size, PRODUCTS[:1]),
            ("mean of ln tokens", centers.tokens, PRODUCTS[1:]),
        )
        return [(name, value) for name, value, users in known if set(users) & set(terms)]

    @property
    def depends_on_tokens(self) -> bool:
        """Whether the form holds for any budget; the others only know rates."""
        return self.core in TOKEN_CORES

    @cached_property
    def nonlinear(self) -> list[Bounded]:
        """The nonlinear parameters."""
        found: list[Bounded] = []
        if self.core in ("multilingual", *TOKEN_CORES):
            found += [ALPHA] if self.scope.sizes > 2 else []
        if self.core in TOKEN_CORES:
            found.append(BETA)
        own = {"mixing": RATE_OF_MIXING, "multilingual": GAMMA,
               "repetition": REPEATS, "overfitting": KAPPA}  # fmt: skip
        found += [own[self.core]] if self.core in own else []
        found += [OMEGA] if self.capacity else []
        found += [RECENCY] if self.order else []
        found += [TAU] if self.transfer else []
        return found + ([EFFICIENCY] if self.efficiency else [])

    def columns(self, table: SettingTable, at: Sequence[float]) -> list[Column]:
        """Return the columns of the coefficients; at: the nonlinear parameters' values."""
        values = {each.name: value for each, value in zip(self.nonlinear, at, strict=True)}
        ones = np.ones(len(table.tokens))
        columns = [Column("E", "free" if self.core == "log-linear" else "positive", ones)]
        sizes = table.parameters / SIZE_UNIT
        scaled = sizes ** -values.get("alpha", FIXED_ALPHA)
        if self.core == "log-linear":
            columns.append(Column("b", "free", np.log(table.tokens / TOKEN_UNIT)))
            if self.scope.sizes > 1:
                columns.append(Column("a", "free", np.log(sizes)))
        elif self.core == "multilingual":
            falling = table.rate ** -values["gamma"]
            columns = [Column("E", "positive", falling)]
            if self.scope.sizes > 1:
                columns.append(Column("A", "positive", scaled * falling))
        elif self.core != "constant":
            if self.scope.sizes > 1:
                columns.append(Column("A", "positive", scaled))
            if self.core == "mixing":
                columns.append(Column("K", "positive", np.exp(-values["t"] * table.rate)))
            else:
                placed = self._placed(table, values)
                effective = self._effective(table, placed, values) / TOKEN_UNIT
                columns.append(Column("B", "positive", effective ** -values["beta"]))
                if self.core == "overfitting":
                    share = sizes * TOKEN_UNIT / table.unique
                    penalty = table.repeated(placed) ** values["kappa"]
                    penalty = penalty * share ** values.get("omega", 0.0)
                    columns.append(Column("P", "positive", penalty))
        return columns + self._schedule(table)

    def _placed(self, table: SettingTable, values: dict[str, float]) -> Vector:
        """Return the tokens of the task, weighted by their place in the run."""
        tokens: Vector = table.tokens * (table.order(values["recency"]) if self.order else 1.0)
        return tokens

    def _effective(self, table: SettingTable, tokens: Vector, values: dict[str, float]) -> Vector:
        """Return the effective tokens of the task; tokens: those weighted by their place."""
        if self.core == "repetition":
            most = values["repeats"]
            gained = most * (1 - np.exp(-table.repeated(tokens) / most))
            tokens = np.minimum(tokens, table.unique) + table.unique * gained
        if self.efficiency:
            tokens = tokens * (table.parameters / SIZE_UNIT) ** values["efficiency"]
        if self.transfer:
            tokens = tokens + values["tau"] * table.others
        effective: Vector = np.maximum(tokens, 1e-6)
        return effective

    def _schedule(self, table: SettingTable) -> list[Column]:
        taken = self.scope.terms(self.schedule)
        terms = schedule_terms(table, self.scope.centers) if taken else {}
        return [Column(name, "free", terms[name]) for name in taken]


MAIN = ("ln peak", "ln peak squared")
PRODUCTS = ("ln peak x ln N", "ln peak x ln tokens")
LEVELS: tuple[Schedule, ...] = get_args(Schedule)


def schedule_terms(table: SettingTable, centers: Centers) -> dict[str, Vector]:
    """Return the values of every term of the schedule."""
    last = np.log(table.last_peak) - centers.peak
    return {
        "ln peak": last,
        "ln peak squared": last**2,
        "ln peak x ln N": last * (np.log(table.parameters) - centers.size),
        "ln peak x ln tokens": last * (np.log(table.last_tokens) - centers.tokens),
        "ln first peak": np.log(table.first_peak / table.last_peak),
        "reset": table.resets,
        "end": table.last_end,
    }


def scope_of(table: SettingTable) -> Scope:
    """Return which terms the settings of this table can identify.

    A term of the schedule is taken if its values are no linear combination of those before it.
    """
    logarithms = (np.log(n) for n in (table.last_peak, table.parameters, table.last_tokens))
    centers = Centers(*(float(np.mean(each)) for each in logarithms))
    taken: list[str] = []
    basis = [np.ones(len(table.tokens))]
    for name, values in schedule_terms(table, centers).items():
        if name == "ln peak squared" and len(np.unique(np.round(np.log(table.last_peak), 9))) < 3:
            continue
        stacked = np.stack(basis, axis=1)
        rest = values - stacked @ np.linalg.lstsq(stacked, values, rcond=None)[0]
        if float(np.std(rest)) > 1e-6 * (1 + float(np.std(values))):
            taken.append(name)
            basis.append(values)
    sizes = len(np.unique(table.parameters))
    repeats = bool(np.any(table.tokens > table.unique))
    capacities = len(np.unique(np.round(np.log(table.parameters / table.unique), 9)))
    return Scope(sizes, centers, tuple(taken), repeats, capacities)


def forms_of(scope: Scope) -> list[Form]:
    """Return the forms that are tried, the simplest first."""
    found = [Form("constant", False, False, False, "none", scope)]
    of_tokens = TOKEN_CORES if scope.repeats else TOKEN_CORES[:1]
    for core in ("log-linear", "mixing", "multilingual", *of_tokens):
        richer = core in TOKEN_CORES
        kinds = [(False, False), (True, False), (True, True)] if richer else [(False, False)]
        for efficiency in [False, True] if richer and scope.sizes > 1 else [False]:
            found += [Form(core, *kind, efficiency, "main", scope) for kind in kinds]
    if scope.capacities > 1:
        penalized = [form for form in found if form.core == "overfitting"]
        found += [replace(form, capacity=True) for form in penalized]
    of_main = [form for form in found if form.core != "constant"]
    for before, level in pairwise(LEVELS[LEVELS.index("main") :]):
        if scope.terms(level) != scope.terms(before):
            found += [replace(form, schedule=level) for form in of_main]
    return found
