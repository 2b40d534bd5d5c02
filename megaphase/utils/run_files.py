"""What the files in a run directory are called."""

RUN_FILE = "run.json"  # the run file as it was understood
PLAN_FILE = "plan.json"  # tokens, rates and epochs of every phase and task
METRICS_FILE = "metrics.jsonl"  # training, validation and events, an object a line
LOCK_FILE = ".lock"  # held by the process that trains
ORIGIN_FILE = "origin.json"  # of a branch: where it began
