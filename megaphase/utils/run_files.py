"""Names of the files in a run directory."""

RUN_FILE = "run.json"  # the parsed run file
PLAN_FILE = "plan.json"  # tokens, rates and epochs of every phase and task
METRICS_FILE = "metrics.jsonl"  # training, validation and events, one object per line
LOCK_FILE = ".lock"  # held by the training process
ORIGIN_FILE = "origin.json"  # in a branch: the checkpoint from which it started
TRACKERS = "trackers"  # folder: the IDs of the run at trackers, and their own files
CHECKPOINTS = "checkpoints"  # the folder with the run's checkpoints
