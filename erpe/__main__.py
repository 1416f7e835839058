"""`erpe` and `python -m erpe`."""

import gc
import os
import sys
import threading

gc.set_threshold(50_000)  # what imports make stays: to look through it again and again took .3 s of 1.8


def main() -> None:
    """Run the command line, and end at once.

    What still talks to a tracking server is not waited for: Python would cut its thread off in the middle of C++, which
    aborts the process. All that counts is on disk before it is sent.
    """
    try:
        from erpe.cli import app
        from erpe.cli.output import open_streams

        open_streams()
        app.main()
    except KeyboardInterrupt:  # while modules were imported
        sys.exit(130)
    except SystemExit as end:
        if threading.active_count() == 1 or not isinstance(end.code, int | None):
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code or 0)


if __name__ == "__main__":
    main()
