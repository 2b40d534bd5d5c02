"""Phases, rates, lengths and peaks by the paper's recipe, from the tokens that there are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megaphase.plan.plan import REPEATED_TOO_OFTEN
from megaphase.utils.errors import InputError

MAX_EPOCHS = REPEATED_TOO_OFTEN
# Of the epochs that max_epochs allows, what is planned for: rates are rounded, phases end on steps.
USED = 0.97
# Of all tokens, those of the joint phase, at most and at least; the low-resource tasks' rates
# together, for which it is shortened, and at most; the temperature by which they are raised
# (Arivazhagan et al. 2019).
JOINT, LEAST_JOINT, LEAST_LOW, MOST_LOW, TEMPERATURE = 0.1, 0.01, 0.1, 0.5, 3.3
# The rate of the model's own languages, from what docs/continued-pretraining.md advises down to
# what Ibrahim et al. (2024) needed.
REPLAY = (0.5, 0.4, 0.3, 0.25)
# Peak learning rate of a model of so many parameters, and the power of the ratio with which it
# falls: between GPT-3's (Brown et al. 2020) and Llama's (Touvron et al. 2023).
PEAK, PEAK_PARAMETERS, PEAK_POWER, MOST_PEAK = 6e-4, 125e6, -0.25, 3e-3
# A second phase's peak, and the last rate of every schedule, as fractions.
SECOND_PEAK, FINAL = 1 / 3, 0.1
# Tokens per parameter (Hoffmann et al. 2022).
TOKENS_PER_PARAMETER = 20
# Warm-up: a fraction of the phase's steps, and the most of them.
WARMUP = {
    "pretrain": (0.02, 2000), "joint": (0.05, 500), "new-rows": (0.1, 20), "chat": (0.05, 100),
}  # fmt: skip
# Conversations: epochs, a fraction of the pre-training's peak (both as of Touvron et al. 2023,
# Llama 2: 2 epochs at 2e-5), the most of all tokens where there is text, and the fewest steps for
# which the batch is made smaller.
CHAT_EPOCHS, CHAT_PEAK, MOST_CHAT, FEWEST_CHAT_STEPS = 2.0, 0.1, 0.1, 100
NEW_ROWS_STEPS, NEW_ROWS_PEAK, NEW_ROWS_EPOCHS = 100, 1e-3, 0.25
MILLION, FEW_TASKS = 10**6, 8
# Tokens of a batch by parameters (Brown et al. 2020, table 2.1, and below it).
BATCHES = ((3e6, 1 << 14), (3e7, 1 << 16), (1e8, 1 << 18), (1e9, 1 << 19), (5e9, 1 << 20))
LARGEST_BATCH = 1 << 21
FEWEST_STEPS = 1000
# Held out of each task: so many documents, and as fractions at least and at most.
HELD_OUT_DOCUMENTS, LEAST_HELD_OUT, MOST_HELD_OUT = 150, 0.001, 0.2


@dataclass(frozen=True)
class Task:
    """A task of the recipe.

    Attributes:
        low: whether it is low-resource; for a published model, whether it is new to it.
        tokens: of an epoch of its training documents, in whole samples.
        chat: whether it is of conversations, which get a phase of their own.
    """

    name: str
    low: bool
    tokens: int
    chat: bool = False


@dataclass(frozen=True)
class Phase:
    """A phase of the run file.

    Attributes:
        rates: by task, in millionths, which sum to a million.
        samples: of a batch; None: as in the phases before.
    """

    name: str
    steps: int
    tokens: int
    rates: dict[str, int]
    peak: float
    warmup_steps: int
    trained: str = "all"
    samples: int | None = None

    def epochs(self, tasks: Sequence[Task]) -> dict[str, float]:
        """Return how often each task is repeated within the phase."""
        return {
            task.name: self.tokens * self.rates[task.name] / MILLION / task.tokens
            for task in tasks
            if task.name in self.rates
        }


@dataclass(frozen=True)
class Recipe:
    """The phases, and whether the text limits their length."""

    phases: list[Phase]
    limited_by_text: bool
    replay: float | None = None

    @property
    def tokens(self) -> int:
        """Of all phases."""
        return sum(phase.tokens for phase in self.phases)


def batch_tokens(parameters: int) -> int:
    """Return the tokens of a batch for a model of so many parameters."""
    return next((tokens for most, tokens in BATCHES if parameters < most), LARGEST_BATCH)


def peak(parameters: int) -> float:
    """Return the peak learning rate of pre-training a model of so many parameters."""
    return rounded(min(MOST_PEAK, PEAK * (parameters / PEAK_PARAMETERS) ** PEAK_POWER))


def rounded(value: float) -> float:
    """Return a number with two significant digits."""
    return float(f"{value:.1e}")


def held_out_fraction(documents: int) -> float:
    """Return the fraction of a task's documents to hold out, with one significant digit."""
    wanted = HELD_OUT_DOCUMENTS / max(1, documents)
    if wanted >= MOST_HELD_OUT:
        return MOST_HELD_OUT
    unit = 10.0 ** math.floor(math.log10(wanted))
    up = float(f"{math.ceil(wanted / unit) * unit:.0e}")
    return min(max(up, LEAST_HELD_OUT), MOST_HELD_OUT)


def most_tokens(tasks: Sequence[Task], published: bool) -> float:
    """Return the tokens after which max_epochs ends the recipe."""
    high, low = _tokens(tasks, low=False), _tokens(tasks, low=True)
    allowed = USED * MAX_EPOCHS
    if published:
        return max(_most_of_joint(high, low, each, allowed) for each in REPLAY)
    if not low:
        return allowed * high
    if not high:
        return allowed * low
    # The joint phase takes at least half of its samples from the high-resource tasks.
    return allowed * high


def _tokens(tasks: Sequence[Task], *, low: bool) -> int:
    return sum(task.tokens for task in tasks if task.low == low)


def _most_of_joint(old: int, new: int, replay: float, allowed: float) -> float:
    if not old:
        return allowed * new
    if not new:
        return allowed * old
    return min(allowed * new / (1 - replay), allowed * old / replay)


def from_scratch(
    tasks: Sequence[Task], wanted: float, batch: int, parameters: int, where: str
) -> Recipe:
    """Return the phases of a model that is trained from scratch.

    wanted: tokens that the hours allow. batch: tokens of a step.

    Raises:
        InputError: the text is too little for a step of each phase.
    """
    most = most_tokens(tasks, published=False)
    total = min(wanted, most)
    limited = most < wanted
    low = [task for task in tasks if task.low]
    high = [task for task in tasks if not task.low]
    first = peak(parameters)
    if not low or not high:
        steps = _steps(total, batch, where)
        rates = capped_rates(tasks, steps * batch, 1.0, 1.0)
        return Recipe([_phase("pretrain", steps, batch, in_millionths(rates), first)], limited)
    # Short enough that the text of the low-resource tasks suffices for the rate they are to have.
    suffices = USED * MAX_EPOCHS * _tokens(tasks, low=True) / LEAST_LOW
    fewest = min(total * LEAST_JOINT, total - batch)
    joint = _steps(min(total * JOINT, max(fewest, suffices, batch)), batch, where)
    pretrain = _steps(total - joint * batch, batch, where)
    proportional = {task.name: task.tokens for task in high}
    before = _phase("pretrain", pretrain, batch, in_millionths(proportional), first)
    by_temperature = capped_rates(tasks, joint * batch, 1.0, TEMPERATURE)
    raised = {task.name: by_temperature[task.name] for task in low}
    if (share := sum(raised.values())) > MOST_LOW:
        raised = {name: rate * MOST_LOW / share for name, rate in raised.items()}
    left = 1 - sum(raised.values())
    whole = sum(proportional.values())
    rest = {name: left * tokens / whole for name, tokens in proportional.items()}
    in_order = {task.name: (raised | rest)[task.name] for task in tasks}
    after = _phase("joint", joint, batch, in_millionths(in_order), rounded(first * SECOND_PEAK))
    return Recipe([before, after], limited)


def for_published(
    tasks: Sequence[Task],
    wanted: float,
    batch: int,
    parameters: int,
    where: str,
    *,
    new_rows: bool,
) -> Recipe:
    """Return the phases that add tasks to a published model; arguments as of `from_scratch`.

    new_rows: whether the rows of new tokens are trained alone at first.
    """
    old, new = _tokens(tasks, low=False), _tokens(tasks, low=True)
    fresh = [task for task in tasks if task.low]
    allowed = MAX_EPOCHS * USED - (NEW_ROWS_EPOCHS if new_rows and fresh else 0.0)
    lengths = {each: min(wanted, _most_of_joint(old, new, each, allowed)) for each in REPLAY}
    longest = max(lengths.values())
    replay = next(each for each in REPLAY if lengths[each] >= 0.999 * longest)
    total = lengths[replay]
    second = rounded(peak(parameters) * SECOND_PEAK)
    phases = []
    if new_rows and fresh:
        most = NEW_ROWS_EPOCHS * min(task.tokens for task in fresh)
        steps = min(NEW_ROWS_STEPS, int(min(most, total * JOINT) // batch))
        if steps:
            rates = capped_rates(fresh, steps * batch, 1.0, TEMPERATURE, NEW_ROWS_EPOCHS)
            phases.append(
                _phase("new-rows", steps, batch, in_millionths(rates), NEW_ROWS_PEAK,
                       "new_embeddings")
            )  # fmt: skip
            total -= steps * batch
    steps = _steps(total, batch, where)
    share = {True: 1 - replay if old else 1.0, False: replay if new else 1.0}
    rates = {}
    for low in (False, True):
        group = [task for task in tasks if task.low == low]
        if group:
            temperature = TEMPERATURE if low else 1.0
            rates |= capped_rates(group, steps * batch, share[low], temperature, allowed)
    in_order = {task.name: rates[task.name] for task in tasks}
    phases.append(_phase("joint", steps, batch, in_millionths(in_order), second))
    limited = longest < wanted
    return Recipe(phases, limited, replay if old and new else None)


def chat_phase(
    chats: Sequence[Task],
    most: float,
    samples: int,
    seq_len: int,
    smallest: int,
    parameters: int,
    where: str,
) -> Phase:
    """Return the last phase, of conversations alone.

    Args:
        most: tokens that it may have.
        samples: of a batch of the other phases.
        smallest: samples that a batch has at least; it times a power of two is `samples`.

    Raises:
        InputError: the conversations are too few for a step.
    """
    there = _tokens(chats, low=False)
    tokens = min(most, CHAT_EPOCHS * there)
    while samples > smallest and tokens < FEWEST_CHAT_STEPS * samples * seq_len:
        samples //= 2
    batch = samples * seq_len
    if tokens < batch <= min(most, USED * MAX_EPOCHS * there):
        tokens = batch
    steps = _steps(tokens, batch, where)
    rates = capped_rates(chats, steps * batch, 1.0, 1.0)
    phase = _phase(
        "chat", steps, batch, in_millionths(rates), rounded(peak(parameters) * CHAT_PEAK)
    )
    return replace(phase, samples=samples)


def _steps(tokens: float, batch: int, where: str) -> int:
    steps = int(tokens // batch)
    if not steps:
        raise InputError(
            where,
            f"a phase would have {tokens:,.0f} tokens, fewer than the {batch:,} of one step",
            "take fewer GPUs, more hours, or more text",
        )
    return steps


def _phase(
    name: str, steps: int, batch: int, rates: dict[str, int], peak: float, trained: str = "all"
) -> Phase:
    fraction, most = WARMUP[name]
    warmup = min(most, math.ceil(fraction * steps), steps - 1)
    return Phase(name, steps, steps * batch, rates, peak, warmup, trained)


def capped_rates(
    tasks: Sequence[Task],
    tokens: int,
    share: float,
    temperature: float,
    epochs: float = MAX_EPOCHS * USED,
) -> dict[str, float]:
    """Return rates in proportion to tokens^(1 / temperature) that sum to `share`; none repeats its
    task more often than `epochs` in `tokens` tokens, as far as that is possible: what a cap cuts
    off goes to the others."""
    caps = {task.name: epochs * task.tokens / tokens for task in tasks}
    weights = {task.name: float(task.tokens) ** (1 / temperature) for task in tasks}
    limited: dict[str, float] = {}
    while True:
        free = [name for name in weights if name not in limited]
        left = share - sum(limited.values())
        if not free or left <= 0:
            break
        whole = sum(weights[name] for name in free)
        over = {name: caps[name] for name in free if left * weights[name] / whole > caps[name]}
        if not over:
            return limited | {name: left * weights[name] / whole for name in free}
        limited |= over
    whole = sum(limited.values())
    return {name: share * rate / whole for name, rate in limited.items()}


def in_millionths(rates: Mapping[str, float]) -> dict[str, int]:
    """Return rates in proportion, in millionths that sum to a million: all but the largest rounded
    down, of a few tasks to three significant digits; the largest takes the rest."""
    whole = sum(rates.values())
    largest = max(rates, key=lambda name: rates[name])
    digits = 3 if len(rates) <= FEW_TASKS else 6
    found = {name: _floor(MILLION * rate / whole, digits) for name, rate in rates.items()}
    found[largest] = MILLION - sum(each for name, each in found.items() if name != largest)
    return found


def _floor(millionths: float, digits: int) -> int:
    if millionths < 1:
        return 1
    unit = int(10 ** max(0, math.floor(math.log10(millionths)) + 1 - digits))
    return int(millionths // unit) * unit
