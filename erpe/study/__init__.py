"""Define a study and record what happens in it: specification, search space, database."""

import warnings

with warnings.catch_warnings():  # Optuna's progress bars, which nothing here shows, ask a notebook for ipywidgets
    warnings.filterwarnings("ignore", "IProgress")
    import tqdm.auto  # noqa: F401
