"""`erpe` and `python -m erpe`."""

import gc
import os
import signal
import sys
import threading

gc.set_threshold(50_000)  # what imports make stays: to look through it again and again took .3 s of 1.8


def main() -> None:
    """Run the command line, and end at once.

    SIGTERM and SIGHUP do what Ctrl-C does, so that nothing is left behind. Once the command is over, they do nothing.

    What still talks to a tracking server is not waited for: Python would cut its thread off in the middle of C++, which
    aborts the process. All that counts is on disk before it is sent.
    """
    try:
        try:
            for number in (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is signal.SIG_DFL:  # `nohup` has SIGHUP ignored
                    signal.signal(number, signal.default_int_handler)
            from erpe.cli import app
            from erpe.cli.output import open_streams

            open_streams()
            app.main()
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
    except KeyboardInterrupt:  # while modules were imported
        print("erpe: interrupted", file=sys.stderr)
        sys.exit(130)
    except SystemExit as end:
        if threading.active_count() == 1 or not isinstance(end.code, int | None):
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code or 0)


if __name__ == "__main__":
    main()
