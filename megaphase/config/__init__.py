"""The run file as pydantic models; every error names the file and the key's path.

`load_run_file` is the only way in: it reads YAML 1.2 (so that the task `no` stays Norwegian and
`200e9` is a number), applies `key.path=value` overrides and checks all that can be checked
without looking at a corpus or at the world size.
"""

from megaphase.config.fields import Section
from megaphase.config.load import load_run_file, run_config, set_value
from megaphase.config.phases import (
    LearningRateConfig,
    MixtureConfig,
    OverfitConfig,
    PhaseConfig,
    StopConfig,
)
from megaphase.config.run import RunConfig
from megaphase.config.sections import (
    BackendsConfig,
    BatchConfig,
    CheckpointConfig,
    FaultsConfig,
    HardwareConfig,
    LoggingConfig,
    ModelConfig,
    MonitorConfig,
    OptimizerConfig,
    ParallelConfig,
    TaskConfig,
    ValidationConfig,
)

__all__ = [
    "BackendsConfig",
    "BatchConfig",
    "CheckpointConfig",
    "FaultsConfig",
    "HardwareConfig",
    "LearningRateConfig",
    "LoggingConfig",
    "MixtureConfig",
    "ModelConfig",
    "MonitorConfig",
    "OptimizerConfig",
    "OverfitConfig",
    "ParallelConfig",
    "PhaseConfig",
    "RunConfig",
    "Section",
    "StopConfig",
    "TaskConfig",
    "ValidationConfig",
    "load_run_file",
    "run_config",
    "set_value",
]
