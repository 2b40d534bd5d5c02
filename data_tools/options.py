"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

JsonKey = Annotated[str, typer.Option(help="The key of each JSON object that holds the text.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what --out names.")]
