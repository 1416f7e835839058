"""Accidents inside a process, asked for by its environment: in the driver, in every worker of Ray, in a sender.

    ERPE_CHAOS_POINT=erpe.study.session:StudySession.tell:before:3   SIGKILL before the third call of this process
    ERPE_CHAOS_JOURNAL=FILE                                     a line when an epoch begins and when it is saved
    ERPE_CHAOS_SLOW=0.2                                         seconds that every epoch takes longer

Moments: `before` and `after` a call; `half`: when half of what it should write is in the file.
"""

import functools
import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path


def die():
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # a kill takes a moment


def note(what, trial):
    """One whole line, also when many processes write."""
    name = f"{trial.folder.parent.name}/{trial.folder.name}"
    line = f"{time.time():.3f} {os.getpid()} {what} {name} {len(trial.history)}\n"
    file = os.open(os.environ["ERPE_CHAOS_JOURNAL"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line.encode())
    os.close(file)


def keep_journal(module):
    train = module.Trial.epoch

    @functools.wraps(train)
    def epoch(trial):
        note("begin", trial)
        time.sleep(float(os.environ.get("ERPE_CHAOS_SLOW", 0)))
        found = train(trial)
        note("saved", trial)
        return found

    module.Trial.epoch = epoch


def half_of(call):
    """As a kill in the middle of the write would leave it."""

    def killed(target, content):
        if isinstance(content, dict):  # a line of a trial's history
            target.path.parent.mkdir(parents=True, exist_ok=True)  # as the write itself begins
            with target.path.open("ab") as file:
                file.write(json.dumps(content).encode()[:20])
        else:
            path = Path(target)
            _, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            Path(temporary).write_bytes(content[: len(content) // 2])
        die()

    return killed


def set_trap(module):
    _, place, moment, turn = os.environ["ERPE_CHAOS_POINT"].split(":")
    *path, name = place.split(".")
    owner = functools.reduce(getattr, path, module)
    call, calls = getattr(owner, name), 0

    @functools.wraps(call)
    def trapped(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls < int(turn):
            return call(*args, **kwargs)
        if moment == "half":
            return half_of(call)(*args)
        if moment == "before":
            die()
        call(*args, **kwargs)
        return die()

    setattr(owner, name, trapped)


class After(importlib.abc.MetaPathFinder):
    """Changes a module as soon as it has been imported."""

    def __init__(self, changes):
        self.changes = changes

    def find_spec(self, name, path, target=None):
        changes = self.changes.pop(name, None)
        spec = changes and importlib.machinery.PathFinder.find_spec(name, path)
        if not spec:
            return None
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            for change in changes:
                change(module)

        spec.loader.exec_module = exec_module
        return spec


def arm():
    """What the environment asks for, in modules that are there and in those to come."""
    changes = defaultdict(list)
    if "ERPE_CHAOS_JOURNAL" in os.environ:
        changes["erpe.training.trial"].append(keep_journal)
    if "ERPE_CHAOS_POINT" in os.environ:
        changes[os.environ["ERPE_CHAOS_POINT"].partition(":")[0]].append(set_trap)
    for name in changes.keys() & sys.modules.keys():
        for change in changes.pop(name):
            change(sys.modules[name])
    sys.meta_path.insert(0, After(changes))
