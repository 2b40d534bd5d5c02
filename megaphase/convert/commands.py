"""The `megaphase convert` commands; imports are inside the functions to keep `--help` fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from megaphase.utils.arguments import MOST, Average, Checkpoint, finite, named
from megaphase.utils.standard_streams import new_console

convert_app = typer.Typer(
    help="Convert checkpoints to other layouts, and to and from other programs.",
    no_args_is_help=True,
)


@convert_app.callback()
def _convert() -> None:
    from megaphase.utils.heap import prepare_for_large_tensors

    prepare_for_large_tensors()


Out = Annotated[
    Path, typer.Option(callback=named, help="The new folder; it must not exist.", metavar="DIR")
]
Workers = Annotated[int, typer.Option(min=1, max=1024, help="Reading and writing threads.")]
TrustPickle = Annotated[
    bool,
    typer.Option(
        "--trust-pickle", help="Load pickles that may run code; only from trusted sources."
    ),
]
NoTokenizer = Annotated[bool, typer.Option("--no-tokenizer", help="Convert the model alone.")]
DEFAULT_WORKERS = 4


@convert_app.command("reshape")
def reshape_command(
    checkpoint: Checkpoint,
    out: Out,
    tensor: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Tensor-parallel size.")
    ] = None,
    data: Annotated[int | None, typer.Option(min=1, max=MOST, help="Data-parallel size.")] = None,
    zero: Annotated[
        int | None, typer.Option(min=0, max=3, help="ZeRO stage; 3 by default.")
    ] = None,
    portable: Annotated[
        bool,
        typer.Option("--portable", help="Write a file for every parameter."),
    ] = False,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Write fp32 weights without optimizer state.")
    ] = False,
    average: Average = False,
    workers: Workers = DEFAULT_WORKERS,
) -> None:
    """Write a checkpoint for another layout.

    Training resumes from any checkpoint on any layout without this; it saves every rank from
    reading other ranks' files, and `--portable` makes them readable by other programs.

    Example: megaphase convert reshape runs/a@pretrain --tensor 4 --data 8 --out reshaped/
    """
    from megaphase.convert.reading_ahead import reading_ahead
    from megaphase.utils.quick_imports import quick_imports

    with reading_ahead(checkpoint), quick_imports():
        from megaphase.convert.partition import Layout
        from megaphase.convert.reshape import reshape
        from megaphase.utils.errors import InputError

    if portable == (tensor is not None or data is not None or zero is not None):
        problem = (
            "excludes --tensor, --data and --zero" if portable else "is not given, nor a layout"
        )
        raise InputError("--portable", problem, "give --tensor and --data, or --portable alone")
    layout = None if portable else Layout(tensor or 1, data or 1, 3 if zero is None else zero)
    reshape(
        checkpoint,
        out,
        layout,
        weights_only=weights_only,
        average=average,
        workers=workers,
        console=new_console(stderr=True, highlight=False),
    )
    print(f"Checkpoint: {out}")


@convert_app.command("average")
def average_command(
    checkpoints: Annotated[
        list[str],
        typer.Argument(metavar="CKPT…", help="Two or more: RUN@NAME, or a path, of any layouts."),
    ],
    out: Out,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="W1,W2,…",
            help="How much each checkpoint counts, relative to their sum; equally by default.",
        ),
    ] = None,
    average: Average = False,
    workers: Workers = DEFAULT_WORKERS,
) -> None:
    """Write the mean of the weights of several checkpoints, of one run or of several.

    The result is a checkpoint without optimizer state, from which `train --from`, `evaluate` and
    the other conversions start. Models and tokenizers must be equal. Its step, its samples used and
    its history are those of the checkpoint of the largest step.

    Example: megaphase convert average runs/a@step-00008000 runs/a@step-00009000 --out mean/

    Example: megaphase convert average runs/a@joint runs/b@joint --weights 0.7,0.3 --out soup/
    """
    from megaphase.convert.average import average as write_average
    from megaphase.utils.errors import InputError

    shares = None
    if weights is not None:
        try:
            shares = [float(each) for each in weights.split(",")]
        except ValueError:
            raise InputError(
                "--weights", f"{weights!r} is no list of numbers", "write 1,2"
            ) from None
    newest = write_average(
        checkpoints,
        shares,
        out,
        of_averages=average,
        workers=workers,
        console=new_console(stderr=True, highlight=False),
    )
    print(f"Checkpoint: {out}\nStep, samples used and history are those of {newest.folder}")


@convert_app.command("to-hf")
def to_hf_command(
    checkpoint: Checkpoint,
    out: Out,
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"] | None,
        typer.Option(help="Precision of the weights; the run's by default."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="The run's by default.", metavar="DIR")
    ] = None,
    no_tokenizer: NoTokenizer = False,
    max_shard_gb: Annotated[
        float,
        typer.Option(
            min=1e-6,
            max=1e9,
            callback=finite,
            help="Largest size of a file, except for larger tensors.",
        ),
    ] = 5.0,
    max_positions: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST,
            help="max_position_embeddings of a model with rotary positions; the seq_len of the "
            "checkpoint's phase by default, with YaRN factor × original length.",
        ),
    ] = None,
    average: Average = False,
    workers: Workers = DEFAULT_WORKERS,
) -> None:
    """Write a Hugging Face model with its tokenizer.

    `AutoModelForCausalLM.from_pretrained(DIR)` computes the same logits, `AutoTokenizer` gives the
    same ids, or the command says which class does. The model becomes one of the first family that
    has its options: see docs/conversion.md.

    Example: megaphase convert to-hf runs/a@joint --out hf/
    """
    from megaphase.convert.reading_ahead import reading_ahead
    from megaphase.utils.quick_imports import quick_imports

    with reading_ahead(checkpoint), quick_imports():
        from megaphase.convert.hugging_face.to_hf import to_hf

    written = to_hf(
        checkpoint,
        out,
        precision=dtype,
        tokenizer=tokenizer,
        no_tokenizer=no_tokenizer,
        max_shard_bytes=int(max_shard_gb * 1e9),
        max_positions=max_positions,
        average=average,
        workers=workers,
        console=new_console(stderr=True, highlight=False),
    )
    print(f"{written.family.title} model: {out}")
    if written.shape.position == "rotary":
        length, yarn = written.shape.seq_len, written.yarn_positions
        source = "the checkpoint's seq_len" if yarn is None else "YaRN's factor × original length"
        source = "as asked for" if max_positions else source
        print(f"max_position_embeddings is {length}, {source}; --max-positions sets it.")
        if yarn is not None and length != yarn:
            print("Some versions of transformers, such as 4.51, compute YaRN's factor from it, and")
            print(f"so other logits; they need {yarn}, the factor × the original length.")
    if written.chat_ends is not None:
        ends = " and ".join(written.chat_ends)
        print(f"Chat template: generation stops at {ends}. Text that spells a control token")
        print("becomes that token in transformers; megaphase refuses such messages.")
    if written.other_class is not None:
        taken, right = written.other_class
        line = (
            f"AutoTokenizer of transformers 5 makes a {taken} of the vocabulary and merges alone, "
            "which gives other ids than this tokenizer for some texts: load it with "
            f"transformers.{right}.from_pretrained({str(out)!r})."
        )
        new_console(stderr=True, highlight=False).print(line, soft_wrap=True, markup=False)


@convert_app.command("from-hf")
def from_hf_command(
    directory: Annotated[
        Path,
        typer.Argument(metavar="MODEL_DIR", help="A downloaded Hugging Face model."),
    ],
    out: Out,
    no_tokenizer: NoTokenizer = False,
    trust_pickle: TrustPickle = False,
    workers: Workers = DEFAULT_WORKERS,
) -> None:
    """Convert a Hugging Face model to a checkpoint for `train --from`.

    docs/conversion.md lists the families; a key of config.json that is not known is refused.

    The required section `model` of the run file is printed, and written next to the weights as
    model.yaml; the tokenizer is copied into the folder tokenizer.

    Example: megaphase convert from-hf Llama-2-7b-hf/ --out base/

    Example: megaphase train joint.yaml --from base/
    """
    from megaphase.convert.hugging_face.from_hf import from_hf

    console = new_console(stderr=True, highlight=False)
    taken = from_hf(
        directory,
        out,
        no_tokenizer=no_tokenizer,
        trust_pickle=trust_pickle,
        workers=workers,
        console=console,
    )
    print(f"Checkpoint: {out}\n\nThe run file of a training that begins with it says:\n")
    if taken.tokenizer is not None:
        print(f"tokenizer: {taken.tokenizer}")
    print(taken.model_section, end="")
    if taken.shape.position == "rotary":
        print("\nIts positions are rotary, so seq_len may be another one.")
    if taken.left_out:
        line = (
            f"Left out of the tokenizer, since the model has {taken.shape.vocab:,} rows and none "
            f"for them: {', '.join(taken.left_out)}. No text encodes to them."
        )
        console.print(line, soft_wrap=True, markup=False)
    if taken.tokenizer is None:
        line = (
            f"Converted without a tokenizer: {taken.why_no_tokenizer}. Give the run file one with "
            "the model's own ids, as `tokenizer: DIR`."
        )
        console.print(line, soft_wrap=True)


@convert_app.command("to-megatron")
def to_megatron_command(
    checkpoint: Checkpoint,
    out: Out,
    tensor: Annotated[int, typer.Option(min=1, max=MOST, help="Tensor-parallel size.")] = 1,
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"] | None,
        typer.Option(help="Precision of the weights; the run's by default."),
    ] = None,
    implementation: Annotated[
        Literal["transformer_engine", "local"],
        typer.Option(help="Megatron-LM's --transformer-impl, which determines the tensors' names."),
    ] = "transformer_engine",
    vocab_divisible_by: Annotated[
        int, typer.Option(min=1, max=MOST, help="Megatron-LM's --make-vocab-size-divisible-by.")
    ] = 128,
    average: Average = False,
    workers: Workers = DEFAULT_WORKERS,
) -> None:
    """Write a checkpoint of Megatron-LM (--ckpt-format torch): weights, no optimizer state.

    Megatron-LM starts from it at iteration 0; the arguments for loading it are printed. A model
    with activation gelu and without bias gets biases of zero, because Megatron-LM's gelu without
    bias is another function.

    Example: megaphase convert to-megatron runs/a@pretrain --tensor 2 --out megatron/
    """
    from megaphase.convert.megatron.arguments import load_options
    from megaphase.convert.megatron.names import Implementation
    from megaphase.convert.megatron.to_megatron import Target, to_megatron

    args = to_megatron(
        checkpoint,
        out,
        Target(tensor, dtype, Implementation(implementation), vocab_divisible_by),
        average=average,
        workers=workers,
        console=new_console(stderr=True, highlight=False),
    )
    print(f"Megatron-LM checkpoint: {out}\n\nTo load it: --load {out} {load_options(args)}")


@convert_app.command("from-megatron")
def from_megatron_command(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="MEGATRON_DIR",
            help="The --save folder, or an iter_… or release folder in it.",
        ),
    ],
    out: Out,
    vocab: Annotated[
        int | None,
        typer.Option(min=1, max=MOST, help="The tokenizer's size, if the checkpoint has none."),
    ] = None,
    trust_pickle: TrustPickle = False,
    workers: Workers = DEFAULT_WORKERS,
) -> None:
    """Convert a checkpoint of Megatron-LM to one for `train --from`.

    Supports GPT and Llama-type models saved with --ckpt-format torch_dist or torch, of any
    tensor- and pipeline-parallel size; converts the model's weights, without optimizer state.
    Padding rows of the embedding are removed. The required section `model` of the run file is
    printed, and written next to the weights as model.yaml.

    Example: megaphase convert from-megatron megatron/ --out base/

    Example: megaphase train joint.yaml --from base/
    """
    from megaphase.convert.megatron.from_megatron import from_megatron

    section = from_megatron(
        directory,
        out,
        vocab=vocab,
        trust_pickle=trust_pickle,
        workers=workers,
        console=new_console(stderr=True, highlight=False),
    )
    print(f"Checkpoint: {out}\n\nThe run file of a training that begins with it says:\n")
    print(section, end="")


@convert_app.command("inspect")
def inspect_command(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A checkpoint of megaphase (or RUN@NAME), Hugging Face, Megatron-LM or "
            "DeepSpeed, or a safetensors file.",
        ),
    ],
    verify: Annotated[
        bool, typer.Option(help="Verify the files' hashes, which reads all of them.")
    ] = True,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    trust_pickle: TrustPickle = False,
    workers: Workers = DEFAULT_WORKERS,
) -> None:
    """Show the content of a checkpoint, and whether it is intact.

    Example: megaphase convert inspect runs/a@pretrain
    """
    from json import dumps

    from megaphase.convert.inspect import Inspector, inspect
    from megaphase.convert.inspect_table import inspection_as_json, inspection_table

    how = Inspector(verify, trust_pickle, workers, new_console(stderr=True, highlight=False))
    contents = inspect(checkpoint, how)
    if json:
        print(dumps(inspection_as_json(contents), indent=2, ensure_ascii=False))
    else:
        new_console(highlight=False).print(inspection_table(contents), markup=False)
