"""Imports DeepSpeed as training does."""

from megaphase.training.deepspeed_import import import_deepspeed

import_deepspeed()
