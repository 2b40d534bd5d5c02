"""Rows of sweeps whose losses follow a known law with noise, computed apart from the package."""

import math
import random

from megaphase.sweep.arms.setting import Mixture, TriedSetting
from megaphase.sweep.law.rows import LawPhase, LawRow

UNIQUE = {"en": 400_000, "hi": 20_000}
MODEL = {"seq_len": 128, "layers": 3, "hidden": 128, "heads": 4}
SMALL = {"seq_len": 128, "layers": 2, "hidden": 64, "heads": 4}
SIZES = {"base": (MODEL, 639_872), "small": (SMALL, 0)}


def row(rate, share, peak, seed=1, *, steps=1000, batch=1280, model=MODEL, losses=None, arm=None,
        unique=None, sweep="s"):  # fmt: skip
    """Return a row with one low-resource task: share of the steps on `en` alone, then a mixture."""

    def rate_of(peak, length):
        return {
            "schedule": "cosine",
            "peak": peak,
            "final": peak / 10,
            "warmup_steps": length // 20,
        }

    first = round(share * steps)
    phases = []
    if first:
        phases.append(
            LawPhase(
                first, {"en": first * batch}, 0.004, "cosine", 0.1, True, rate_of(0.004, first)
            )
        )
    rest = (steps - first) * batch
    tokens = {"en": (1 - rate) * rest, "hi": rate * rest}
    phases.append(
        LawPhase(steps - first, tokens, peak, "cosine", 0.1, True, rate_of(peak, steps - first))
    )
    name = arm or ("two-phase" if first else "static")
    setting = TriedSetting(
        arm=name, model=f"{model['layers']}x{model['hidden']}",
        values=(("rate", rate), ("pretrain_share", share), ("peak", peak), ("steps", steps)),
        mixture=Mixture(rate), share=share or None, peaks=(0.004, peak)[-len(phases):],
        label=f"{rate:g} after {share:g}", short_label=f"{rate:g}",
    )  # fmt: skip
    return LawRow(sweep, f"{name}-{rate}-{share}-{peak}-s{seed}", setting, seed, model, phases,
                  unique or UNIQUE, losses or {})  # fmt: skip


def true_loss(of_row, task, truth):
    """Return the loss of the law with these parameters."""
    size = of_row.parameters / 1e6
    total = sum(phase.steps for phase in of_row.phases)
    begin, weighted, uniform = 0, 0.0, 0.0
    f = truth["recency"]
    for k in range(1000):
        uniform += math.exp(-f * (1 - (k + 0.5) / 1000)) / 1000
    for phase in of_row.phases:
        tokens = phase.tokens.get(task, 0.0)
        end = begin + phase.steps
        mean = 0.0
        for k in range(1000):
            x = (begin + (k + 0.5) / 1000 * (end - begin)) / total
            mean += math.exp(-f * (1 - x)) / 1000
        weighted += mean / uniform * tokens
        begin = end
    repeats = max(weighted / of_row.unique[task] - 1, 0)
    loss = truth["E"] + truth["A"] * size**-0.34 + truth["B"] * (weighted / 1e4) ** -truth["beta"]
    capacity = size * 1e4 / of_row.unique[task]
    loss += truth["P"] * repeats ** truth["kappa"] * capacity ** truth.get("omega", 0.0)
    return loss + truth["peak"] * math.log(of_row.phases[-1].peak / 0.002)


HI = {"E": 2.0, "A": 0.8, "B": 1.5, "beta": 0.4, "recency": 2.0, "P": 0.02, "kappa": 1.2,
      "peak": 0.08}  # fmt: skip
EN = {"E": 1.5, "A": 0.5, "B": 4.0, "beta": 0.5, "recency": 1.0, "P": 0.0, "kappa": 1.0,
      "peak": 0.05}  # fmt: skip
TRUTH = {"hi": HI, "en": EN}


def settings(models=(MODEL,), steps=(1000,)):
    """Yield (rate, share, peak, model, steps) of a sweep's settings."""
    for model in models:
        for length in steps:
            for peak in (0.001, 0.004):
                for rate in (0.01, 0.03, 0.08):
                    yield rate, 0.0, peak, model, length
                for share in (0.7, 0.85):
                    for rate in (0.05, 0.15, 0.4):
                        yield rate, share, peak, model, length


def lawful_rows(noise=0.02, seeds=3, truth=TRUTH, models=(MODEL,), steps=(1000,), seed=7):
    """Return the rows of a sweep whose losses follow the law, with Gaussian noise."""
    random_numbers = random.Random(seed)
    rows = []
    for rate, share, peak, model, length in settings(models, steps):
        for s in range(seeds):
            bare = row(rate, share, peak, s, model=model, steps=length)
            losses = {
                task: true_loss(bare, task, truth[task]) + random_numbers.gauss(0, noise)
                for task in ("en", "hi")
            }
            rows.append(row(rate, share, peak, s, model=model, steps=length, losses=losses))
    return rows


def lawless_rows(noise=0.005, spread=0.5, seeds=3, seed=3):
    """Return rows whose losses differ between settings without any law."""
    random_numbers = random.Random(seed)
    rows = []
    for rate, share, peak, model, length in settings():
        own = {task: 4 + random_numbers.uniform(-spread, spread) for task in ("en", "hi")}
        for s in range(seeds):
            losses = {task: loss + random_numbers.gauss(0, noise) for task, loss in own.items()}
            rows.append(row(rate, share, peak, s, model=model, steps=length, losses=losses))
    return rows
