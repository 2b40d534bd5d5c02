"""`megaphase generate` and `translate`; imports are inside the functions to keep `--help` fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from megaphase.utils.arguments import (
    MOST,
    MOST_SEED,
    Average,
    Overrides,
    RunFile,
    finite,
    named,
)
from megaphase.utils.errors import InputError
from megaphase.utils.standard_streams import new_console

# Logits divided by a smaller number overflow.
_LEAST_TEMPERATURE = 1e-4

Beam = Annotated[
    int, typer.Option(min=1, max=10_000, help="Hypotheses of beam search; 1 is greedy.")
]
# tokens^A is a number for texts of up to 10^10 tokens.
_MOST_PENALTY = 30.0
_LENGTH_PENALTY = 1.0
LengthPenalty = Annotated[
    float | None,
    typer.Option(
        min=-_MOST_PENALTY,
        max=_MOST_PENALTY,
        callback=finite,
        show_default="1",
        metavar="A",
        help="Score of beam search: log-probability / tokens^A; a larger A favours long texts.",
    ),
]
Batch = Annotated[
    int, typer.Option(min=1, max=MOST, help="Prompts per batch; affects only speed and memory.")
]
Dtype = Annotated[
    Literal["fp32", "bf16"] | None,
    typer.Option(help="Precision of weights and arithmetic; the run's by default."),
]
Verify = Annotated[bool, typer.Option(help="Verify the hashes of the checkpoint's files first.")]


def _temperature(value: float) -> float:
    finite(value)
    if 0 < value < _LEAST_TEMPERATURE:
        raise typer.BadParameter(f"{value} is neither 0 nor {_LEAST_TEMPERATURE} or more.")
    return value


def _penalty(given: float | None, beam: int) -> float:
    if given is None:
        return _LENGTH_PENALTY
    if beam == 1:
        raise InputError("--length-penalty", "applies only to beam search", "give --beam, too")
    return given


def generate_command(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CKPT",
            help="RUN, whose latest checkpoint is taken, RUN@NAME (a phase's name for its end, "
            "latest, best-hi, step-00001000), or a path.",
        ),
    ],
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="A prompt; repeatable.")
    ] = None,
    input: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON lines with one prompt each; - is standard input."),
    ] = None,
    messages: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSON lines with the messages of a conversation each, which the tokenizer's chat "
            "template renders for an answer; - is standard input.",
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Each prompt is a user's message, to be answered as a chat."),
    ] = False,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="With --chat: the system's message.")
    ] = None,
    json_key: Annotated[
        str | None,
        typer.Option(
            help="The key in a line of --input or --messages.", show_default="prompt, messages"
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The run's or the imported model's by default."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, max=MOST, help="Maximum number of new tokens, within seq_len.")
    ] = 64,
    beam: Beam = 1,
    length_penalty: LengthPenalty = None,
    temperature: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1e4,
            callback=_temperature,
            help="Sampling temperature; 0 takes the most likely token.",
        ),
    ] = 0.0,
    top_k: Annotated[
        int, typer.Option(min=0, max=MOST, help="Sample among the K most likely tokens; 0: all.")
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            callback=finite,
            help="Sample among the most likely tokens with this total probability.",
        ),
    ] = 1.0,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=MOST_SEED, help="Seed of the sampling.", show_default="0"),
    ] = None,
    batch: Batch = 16,
    dtype: Dtype = None,
    average: Average = False,
    verify: Verify = True,
    control_tokens: Annotated[
        bool,
        typer.Option("--control-tokens", help="Show control tokens within the generated texts."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object per prompt.")] = False,
) -> None:
    """Continue texts, on one GPU or the CPU, until the document or, with a chat template, the turn
    ends, or --max-tokens are generated.

    Greedy by default; use --beam for the most likely text, --temperature for a random one. The
    result does not depend on the other prompts. A prompt "" starts a new document. Control tokens
    in a prompt are ordinary text; --messages and --chat render conversations.

    Example: megaphase generate runs/a --prompt "The sea" --prompt "Das Meer"

    Example: megaphase generate runs/a@best-hi --input prompts.jsonl --temperature 0.8 --json

    Example: megaphase generate runs/a@chat --chat --prompt "Where is the sea?"
    """
    from json import dumps

    from megaphase.chats.marked_text import text_with_control_tokens
    from megaphase.chats.turn_ends import turn_ends
    from megaphase.checkpoint.names import with_latest
    from megaphase.convert.source import open_source
    from megaphase.convert.source_tokenizer import (
        check_tokenizer_known,
        load_tokenizer,
        prompt_start,
    )
    from megaphase.decoding.options import Decoding
    from megaphase.generation.prompts import (
        asked,
        encode_conversations,
        read_conversations,
        read_prompts,
        spelled_control_token,
    )

    if messages is not None and not (prompt is None and input is None):
        raise InputError("--messages", "does not go with --prompt and --input", "give one of them")
    if messages is None and (prompt is None) == (input is None):
        missing = "neither is given, and no --messages"
        problem = missing if prompt is None else "both are given"
        raise InputError("--prompt and --input", problem, "give one of them")
    if chat and messages is not None:
        raise InputError("--chat", "is for --prompt and --input", "leave it out")
    if system is not None and not chat:
        remedy = "add --chat, or write the message into the file of --messages"
        raise InputError("--system", "belongs to --chat", remedy)
    if beam > 1 and temperature:
        raise InputError("--beam", "cannot be combined with --temperature", "give one of them")
    if not temperature and (top_k or top_p < 1.0 or seed is not None):
        problem = "apply only to sampling"
        raise InputError("--top-k, --top-p and --seed", problem, "give --temperature, too")
    penalty = _penalty(length_penalty, beam)
    if json_key is not None and prompt is not None:
        raise InputError("--json-key", "is for --input and --messages", "leave it out")
    texts = prompt or ([] if input is None else read_prompts(input, json_key or "prompt"))
    conversations = asked(texts, system) if chat else []
    if messages is not None:
        conversations = read_conversations(messages, json_key or "messages")
    check_tokenizer_known(checkpoint, tokenizer)
    source = open_source(with_latest(checkpoint), average=average)
    words = load_tokenizer(source, tokenizer)
    if conversations:
        prompts = encode_conversations(conversations, words)
    else:
        start = prompt_start(source, words)
        prompts = [start + tokens for tokens in words.encode_batch(texts)]

    from megaphase.decoding.generate import check_lengths, generate, text_after
    from megaphase.generation.model import load_model
    from megaphase.generation.progress import counting_progress

    check_lengths(prompts, source.shape.seq_len)
    model = load_model(source, dtype, verify=verify)
    how = Decoding(
        max_tokens,
        beam,
        penalty,
        temperature,
        top_k,
        top_p,
        seed or 0,
        turn_ends(words),
    )
    console = new_console(stderr=True, highlight=False)
    if not conversations and (spelled := spelled_control_token(texts, words)):
        line = "Warning: prompt {} spells the control token {}, which is ordinary text there"
        hint = "; --messages and --chat render conversations"
        console.print(line.format(*spelled) + hint, markup=False, soft_wrap=True)
    if with_latest(checkpoint) != checkpoint:
        console.print(f"Checkpoint: {source.folder}", markup=False, soft_wrap=True)
    with counting_progress(console, "generating", len(prompts)) as advance:
        found = generate(model, prompts, how, words.eod, batch=batch, advance=advance)
    for number, each in enumerate(found):
        completion = text_after(prompts[number], each.tokens, words)
        if control_tokens:
            before = text_with_control_tokens(words, prompts[number])
            both = text_with_control_tokens(words, [*prompts[number], *each.tokens])
            completion = both.removeprefix(before)
        asked_for: dict[str, object] = (
            {"messages": conversations[number].messages}
            if conversations
            else {"prompt": texts[number]}
        )
        if json:
            row = {**asked_for, "completion": completion, "tokens": len(each.tokens)}
            row |= {"log_probability": each.log_probability, "ended": each.ended}
            print(dumps(row, ensure_ascii=False))
            continue
        shown = conversations[number].shown() if conversations else texts[number]
        print(f"{'' if number == 0 else chr(10)}{shown}{completion}")


def translate_command(
    run_file: RunFile,
    overrides: Overrides = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="A translation task; repeatable. All by default."),
    ] = None,
    checkpoint: Annotated[
        str,
        typer.Option(metavar="NAME", help="A phase's end, best-TASK, step-…, RUN@NAME or a path."),
    ] = "latest",
    samples: Annotated[
        int,
        typer.Option(min=1, max=MOST, help="Held-out pairs of each task, always the same ones."),
    ] = 1000,
    split: Annotated[
        Literal["validation", "test"],
        typer.Option(help="Pairs held out for validation, or those of the test split."),
    ] = "validation",
    max_tokens: Annotated[
        int,
        typer.Option(
            min=1, max=MOST, help="Maximum number of tokens per translation, within seq_len."
        ),
    ] = 256,
    beam: Beam = 4,
    length_penalty: LengthPenalty = None,
    bleu_tokenizer: Annotated[
        Literal["13a", "intl", "zh", "char", "none"],
        typer.Option(help="sacrebleu's tokenizer for BLEU; zh for Chinese."),
    ] = "13a",
    batch: Batch = 16,
    dtype: Dtype = None,
    average: Average = False,
    verify: Verify = True,
    out: Annotated[
        Path | None,
        typer.Option(
            callback=named,
            metavar="FILE",
            help="Write sources, references and hypotheses as JSON lines.",
        ),
    ] = None,
    scores: Annotated[
        Path | None, typer.Option(callback=named, metavar="FILE", help="Write the scores as JSON.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Translate held-out sources of a run's translation tasks, and measure BLEU and chrF.

    Uses one GPU or the CPU. The scores are sacrebleu's, printed with its signatures.

    Example: megaphase translate run.yaml --checkpoint joint --task en-eu --out en-eu.jsonl
    """
    from json import dumps

    from megaphase.config.load import load_run_file
    from megaphase.decoding.options import Decoding
    from megaphase.generation.evaluation import (
        TranslationTest,
        evaluate_translation,
        scores_as_json,
        scores_table,
        signature_lines,
        write_translations,
    )
    from megaphase.utils.files import atomic_write_json, check_place

    config = load_run_file(run_file, tuple(overrides or ()))
    for file in (out, scores):
        if file is not None:
            check_place(file)
    how = Decoding(max_tokens, beam, _penalty(length_penalty, beam))
    test = TranslationTest(samples, how, batch, dtype, bleu_tokenizer, verify, split)
    console = new_console(stderr=True)
    results = evaluate_translation(config, checkpoint, task or [], test, console, average=average)
    if out is not None:
        write_translations(out, results.translations)
    if scores is not None:
        atomic_write_json(scores, scores_as_json(results))
    if json:
        print(dumps(scores_as_json(results), indent=2))
    else:
        new_console(highlight=False).print(scores_table(results))
        print(*signature_lines(results), sep="\n")
