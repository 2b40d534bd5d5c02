"""A number in a row of metrics that was measured, and may not be finite."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BeforeValidator

# JSON has no NaN, so a writer may write null for a loss that has overflowed.
Measured = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
