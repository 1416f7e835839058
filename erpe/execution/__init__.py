"""Run trials: the controller of a study, fair shares between arms, executors."""

import threading

COMMAND = threading.Event()
"""Set where the process is a command of ours, which may end it; a program that calls erpe ends by itself."""
