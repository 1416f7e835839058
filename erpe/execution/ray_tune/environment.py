"""What Ray reads from its environment: to be imported before Ray. What the user set stays."""

import os

# Read when it is imported or started.
for _name, _value in {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run`, workers would be started by uv, from a copy
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # a local cluster listens on the loopback only
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a warning about its coming default
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # what Ray says of dead workers goes to stdout; the session has it
    "RAY_worker_niceness": "0",  # trials run at the command's own priority; 15 starves them on a shared machine
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # prints a box even when told to be silent
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours lets trials finish their epoch
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the session keeps them
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # the snapshot is never read
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}.items():
    os.environ.setdefault(_name, _value)

# Tune refuses these with a traceback; where it writes, `run_ray` says.
for _name in ("RAY_AIR_LOCAL_CACHE_DIR", "TUNE_RESULT_DIR"):
    os.environ.pop(_name, None)
