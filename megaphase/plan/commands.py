"""The `megaphase plan` commands; imports are inside the functions to keep `--help` fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from megaphase.utils.arguments import Overrides, Processes, RunFile, Source, finite
from megaphase.utils.standard_streams import new_table_console


class _ShowByDefault(TyperGroup):
    """Makes `plan RUN_FILE` an abbreviation of `plan show RUN_FILE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["show", *args]
        return super().parse_args(ctx, args)


plan_app = typer.Typer(
    cls=_ShowByDefault,
    help="The plan of a run: which sample of which task every training step sees.\n\n"
    "`megaphase plan RUN_FILE` is short for `megaphase plan show RUN_FILE`.",
    no_args_is_help=True,
)


@plan_app.command("show")
def show_command(
    run_file: RunFile,
    overrides: Overrides = None,
    processes: Processes = None,
    card: Annotated[
        str | None,
        typer.Option(help="The GPU, such as a100-80gb; hardware.card by default."),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            min=1,
            max=1e9,
            callback=finite,
            help="Nominal memory of one GPU in GB; the card's by default.",
        ),
    ] = None,
    layouts: Annotated[
        bool, typer.Option("--layouts", help="Also show memory and time of other layouts.")
    ] = False,
    source: Source = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Compare every byte of a large plan that is built with its hashes; training "
            "verifies what it reads, when it reads it.",
        ),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Also draw the run's steps to this file: .png, .svg or .pdf."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Show tokens, sampling rates and epochs per phase and task, and build the plan's index; show
    the memory that the run needs on each GPU, and how long it takes.

    Example: megaphase plan run.yaml --processes 64 --card h100-sxm --layouts

    Example: megaphase plan joint.yaml --from runs/base@pretrain
    """
    from json import dumps

    from megaphase.config.load import load_run_file
    from megaphase.distributed.dist_env import given_world_size
    from megaphase.estimate.hardware import hardware_of, planned_card
    from megaphase.estimate.memory_table import (
        largest_phase,
        memory_sentences,
        memory_summary,
        memory_warnings,
    )
    from megaphase.estimate.step_time_table import layouts_table, speed_sentences, speed_summary
    from megaphase.plan.batch_layout import check_remaining_batches
    from megaphase.plan.branch import choose_branch, recorded_branch
    from megaphase.plan.held_out_noise import held_out_warnings
    from megaphase.plan.load_plan import preview_plan, setups_for_vocabulary, stage_setups
    from megaphase.plan.preview import (
        batch_sentences,
        bos_sentences,
        loss_weight_sentences,
        origin_sentence,
        origin_summary,
        origin_table,
        plan_table,
        plan_warnings,
        stop_sentences,
        subsample_sentences,
        trained_sentences,
    )
    from megaphase.plan.thought_experiment import (
        is_thought_experiment,
        thought_experiment,
        vocab_size,
    )
    from megaphase.tokenizer import Tokenizer
    from megaphase.utils.errors import InputError

    config = load_run_file(run_file, tuple(overrides or ()))
    imagined = is_thought_experiment(config)
    for option, value in (("--plot", plot), ("--from", source)):
        if imagined and value is not None:
            raise InputError(option, "needs corpora, and the tasks have tokens", "leave it out")
    tokenizer = None if imagined else Tokenizer.load(config.tokenizer)
    vocab = vocab_size(config) if tokenizer is None else tokenizer.vocab_size
    if plot is not None:
        from megaphase.plan.run_plot import check_plot_path, save_run_plot

        check_plot_path(plot)
    if processes is None:
        processes = given_world_size() or config.parallel.fewest_processes
    setups, hardware = setups_for_vocabulary(config, vocab, processes), hardware_of(config, card)
    needed = memory_summary(setups, memory or planned_card(config, card).memory_gb)
    branch, plan, noise = None, None, []
    if tokenizer is None:
        summary, specs = thought_experiment(config)
        check_remaining_batches(config, specs, processes, 0, 0)
    else:
        branch = recorded_branch(config.output) if source is None else choose_branch(config, source)
        plan = preview_plan(config, tokenizer, branch, whole=verify, processes=processes)
        summary, specs = plan.summary(), plan.spec.phases
        noise = held_out_warnings(config, plan.spec)
        plan.store_counts()
    phases, largest = stage_setups(setups, specs), setups[largest_phase(setups)].setup
    times = speed_summary(largest, hardware, phases) if hardware else None
    if plot is not None and plan is not None:
        save_run_plot(plot, config, plan, 0 if branch is None else branch.step)
    summary |= {"memory": needed, "speed": times}
    if branch is not None:
        summary["origin"] = origin_summary(branch.origin, summary)
    if json:
        print(dumps(summary, indent=2, ensure_ascii=False))
        return
    console = new_table_console()
    if branch is not None:
        console.print(origin_sentence(summary["origin"]), markup=False, soft_wrap=True)
        console.print(origin_table(summary["origin"]))
        console.print()
    console.print(plan_table(summary))
    if plan is None or tokenizer is None:
        sentences = ["Planned from numbers of tokens: no corpus was read, and no index built"]
    else:
        sentences = [
            *bos_sentences(plan.spec.bos, tokenizer),
            *subsample_sentences(config, summary),
        ]
    for sentence in [
        *sentences,
        *batch_sentences(config, summary),
        *loss_weight_sentences(config),
        *stop_sentences(config),
        *trained_sentences(config),
    ]:
        console.print(sentence, markup=False, soft_wrap=True)
    for sentence in [*plan_warnings(summary), *noise, *memory_warnings(needed)]:
        console.print(f"Warning: {sentence}", style="yellow", markup=False, soft_wrap=True)
    for sentence in [*memory_sentences(needed), *speed_sentences(needed, times)]:
        console.print(sentence, markup=False, soft_wrap=True)
    if layouts:
        console.print(layouts_table(needed, times, width=console.width))
    if plot is not None:
        console.print(f"Plot: {plot}", markup=False, soft_wrap=True)
    if plan is not None and plan.folder.is_dir():
        console.print(f"Index: {plan.folder}", markup=False, soft_wrap=True)


@plan_app.command("trace")
def trace_command(
    step: Annotated[
        int, typer.Option(min=1, help="Step as in metrics.jsonl: from 1, over the whole run.")
    ],
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run directory, or the run file (YAML).")
    ],
    overrides: Overrides = None,
    task: Annotated[str | None, typer.Option(help="Only samples of this task.")] = None,
    row: Annotated[int | None, typer.Option(help="Only this row of the global batch.")] = None,
    text: Annotated[bool, typer.Option("--text", help="Print the text of the samples.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object per sample.")] = False,
) -> None:
    """Show the samples of a training step: task, epoch, documents and offsets of each.

    Example: megaphase plan trace runs/multilingual --step 1234 --task hi --text
    """
    from json import dumps

    from megaphase.plan.trace import (
        print_texts,
        sample_as_json,
        sample_origins,
        sample_texts,
        trace_step,
        trace_table,
    )
    from megaphase.plan.traced_run import open_traced_run
    from megaphase.utils.errors import InputError

    traced = open_traced_run(run, overrides)
    plan, tokenizer = traced.plan, traced.tokenizer
    tasks = traced.config.tasks
    if task is not None and task not in tasks:
        raise InputError(
            "--task", f"{run} has no task {task!r}", f"the tasks are {', '.join(tasks)}"
        )
    phase, phase_step, starts = traced.find_step(step)
    size = plan.spec.phases[phase].batch.samples_at(phase_step - 1)
    if row is not None and not 0 <= row < size:
        raise InputError("--row", f"a step has no row {row}", f"give 0 to {size - 1:,}")
    samples = [
        sample
        for sample in trace_step(plan, phase, phase_step, starts)
        if task in (None, sample.task) and row in (None, sample.row)
    ]
    if json:
        for sample in samples:
            texts = sample_texts(plan, sample, tokenizer) if text else None
            origins = sample_origins(plan, sample)
            print(dumps(sample_as_json(sample, texts, origins), ensure_ascii=False))
        return
    console = new_table_console()
    console.print(
        f"step {step:,}: step {phase_step:,} of {plan.phases[phase].name}, "
        f"{len(samples):,} of {size:,} samples",
        markup=False,
    )
    if text:
        print_texts(console, plan, samples, tokenizer)
    else:
        console.print(trace_table(plan, samples))
