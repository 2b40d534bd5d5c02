"""`megaphase train`; it imports what it needs, so `--help` stays fast."""

from __future__ import annotations

from megaphase.utils.arguments import (
    Overrides,
    Profile,
    ProfileSteps,
    RunFile,
    Source,
)
from megaphase.utils.standard_streams import new_console, standard_output_is_a_log

PROFILE_STEPS = 3


def train_command(
    run_file: RunFile,
    overrides: Overrides = None,
    source: Source = None,
    profile: Profile = False,
    profile_steps: ProfileSteps = None,
) -> None:
    """Train all phases of a run file, or resume where the run stopped.

    One process by itself; several under `megaphase launch local`, torchrun or srun. On SIGTERM,
    SIGUSR1 or Ctrl-C it saves and ends with exit code 75; the same command then resumes, also with
    another number of processes. A second Ctrl-C ends it at once.

    Example: megaphase train run.yaml phases.0.steps=500

    Example: megaphase train joint.yaml --from runs/base@pretrain
    """
    from contextlib import ExitStack

    from megaphase.config.load import load_run_file
    from megaphase.distributed.all_ranks import leaving_processes, on_first_rank
    from megaphase.fault_tolerance.stop_signals import StopSignals

    standard_output_is_a_log()
    # The signals before anything that takes seconds is imported.
    with StopSignals() as signals, leaving_processes(), ExitStack() as resources:
        config = on_first_rank(lambda: load_run_file(run_file, tuple(overrides or ())))

        from megaphase.training.closing import next_commands
        from megaphase.training.startup import watched_processes
        from megaphase.training.trainer import Trainer

        watchdog = resources.enter_context(watched_processes(config, signals))
        with watchdog.patient("setting up"):
            trainer = Trainer(config, new_console(), watchdog, signals, resources, source)
            if trainer.is_done():
                steps = trainer.state.step
                trainer.say(f"{config.output}: all {steps:,} steps are done; nothing to do")
                trainer.finish_trackers()
                trainer.finish_uploads()
                for line in next_commands(config):
                    trainer.say(line)
                return
            if trainer.has_reached_end_after():
                end = config.checkpoint.end_after
                trainer.say(f"{config.output}: checkpoint.end_after: {end:,} has been reached")
                trainer.finish_trackers()
                trainer.finish_uploads()
                return
            trainer.build(profile_steps or (PROFILE_STEPS if profile else 0))
        trainer.run()
