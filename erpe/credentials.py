"""Passwords and tokens as files, for services that want a sign-in: NAME_FILE names the file, NAME is what it holds."""

from __future__ import annotations

import os
from pathlib import Path

from erpe.errors import ConfigError

NAMES = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "PGPASSWORD")
"""Of the tracking server, and of PostgreSQL where its address has none. Ray has its own, RAY_AUTH_TOKEN_PATH."""


def read_secret_files() -> None:
    """Put into the environment, where MLflow and PostgreSQL's client look, what files hold; what is there stays.

    Raises:
        ConfigError: a file cannot be read, or is empty.
    """
    for name in NAMES:
        path = os.environ.get(f"{name}_FILE")
        if not path or name in os.environ:
            continue
        try:
            secret = Path(path).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "no text"
            raise ConfigError(f"{name}_FILE {path}: cannot be read ({why}); name a file with the secret") from None
        if not secret:
            raise ConfigError(f"{name}_FILE {path}: empty; name a file with the secret")
        os.environ[name] = secret
