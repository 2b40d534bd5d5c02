"""Arms that do not spend the sweep's budget, in words for its reports."""

from __future__ import annotations

from megaphase.sweep.arms.recipes import arm_recipes
from megaphase.sweep.sweep import Sweep


def own_budgets(sweep: Sweep) -> list[str]:
    """Return a sentence for each arm of which a recipe has more or fewer steps than the budget."""
    found = []
    for name, arm in sweep.config.arms.items():
        if arm.budget == "own":
            steps = {recipe.steps for recipe in arm_recipes(sweep, name)}
            if steps != {sweep.steps}:
                to = f" to {max(steps):,}" if len(steps) > 1 else ""
                found.append(
                    f"{name} trains {min(steps):,}{to} steps, where the budget is {sweep.steps:,}"
                )
    return found
