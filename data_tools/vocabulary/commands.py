"""`megaphase convert extend-vocab`; imports are inside the function to keep `--help` fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from megaphase.convert.commands import DEFAULT_WORKERS, Out, Workers
from megaphase.data_tools.options import JsonKey, Separator, Template, reading_of
from megaphase.utils.arguments import MOST_SEED, Checkpoint
from megaphase.utils.standard_streams import new_console


def extend_vocab_command(
    checkpoint: Checkpoint,
    tokenizer: Annotated[
        Path,
        typer.Option(metavar="DIR", help="The result of `megaphase tokenizer extend`."),
    ],
    out: Out,
    init: Annotated[
        Literal["mean", "random"],
        typer.Option(
            help="New rows: the mean of those of the tokens that the new one replaces, or random "
            "ones with mean and variance of the old rows."
        ),
    ] = "mean",
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Of random rows.")] = 0,
    base_tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The checkpoint's tokenizer; the run's or the imported model's by default.",
        ),
    ] = None,
    check: Annotated[
        list[str],
        typer.Option(
            metavar="LANGUAGE=FILE",
            help="Text, or a corpus of the checkpoint's tokenizer, on whose first 16 KiB the loss "
            "is measured before and after; repeatable. The whole model is loaded for it.",
        ),
    ] = [],  # noqa: B006
    json_key: JsonKey = "text",
    template: Template = None,
    separator: Separator = None,
    workers: Workers = DEFAULT_WORKERS,
) -> None:
    """Give a checkpoint's model rows for the tokens of an extended tokenizer.

    All other rows and weights stay as they are. A model with more rows than its tokenizer has
    tokens gives these to the new tokens first. The optimizer state is left out, and the samples
    used are counted anew: the phase that begins with the result must say `optimizer_state: reset`.
    The tokenizer is copied into the folder tokenizer, the run file's section `model` is printed.

    Example: megaphase convert extend-vocab base/ --tokenizer new/ --out extended/ --check en=en.txt

    Example: megaphase train joint.yaml --from extended/
    """
    from megaphase.convert.extend_vocab import new_tokens, write_extended
    from megaphase.convert.hugging_face.from_hf import TOKENIZER_FOLDER
    from megaphase.convert.source import open_source
    from megaphase.convert.source_tokenizer import load_tokenizer, prompt_start
    from megaphase.data_tools.vocabulary.check import check_table, check_texts
    from megaphase.generation.model import load_model
    from megaphase.generation.text_loss import text_loss
    from megaphase.tokenizer import Tokenizer
    from megaphase.utils.files import real_path

    source = open_source(checkpoint)
    base = load_tokenizer(source, base_tokenizer, "--base-tokenizer")
    extended, start = Tokenizer.load(tokenizer), prompt_start(source, base)
    tokens = new_tokens(source, base, extended)
    texts = check_texts(check, base, reading_of(json_key, template, separator))
    section = write_extended(
        source,
        tokens,
        out,
        init=init,
        seed=seed,
        tokenizer=extended,
        workers=workers,
        console=new_console(stderr=True, highlight=False),
    )
    if texts:
        model = load_model(source, None)
        before = {name: text_loss(model, base, each, start) for name, each in texts.items()}
        del model
        model = load_model(open_source(str(out)), None, verify=False)
        after, new = (
            {name: text_loss(model, words, each, start) for name, each in texts.items()}
            for words in (base, extended)
        )
        new_console(highlight=False).print(check_table(before, after, new))
    free = min(source.shape.vocab, tokens.stop) - tokens.first
    taken = f", {free:,} of them in rows that no token had" if free > 0 else ""
    print(
        f"{tokens.stop - tokens.first:,} new tokens, ids {tokens.first:,} to {tokens.stop - 1:,}"
        f"{taken}\nCheckpoint: {out}\n\nThe run file of a training that begins with it says:\n"
    )
    print(f"tokenizer: {real_path(out) / TOKENIZER_FOLDER}\n{section}", end="")
