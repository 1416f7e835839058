"""One study that is hurt again and again, always continued by the same command, and its books at the end."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from books import compare_books, first_begin, read_journal
from forks import Fork
from homes import store_of

ROOT = Path(__file__).parents[2]
SPACE = """
[space]
"train.lr" = {low = 1e-4, high = 1e-2, log = true}
"model.width" = 16
"model.depth" = 1
"model.heads" = 2
"train.batch" = 50
"""
CONCURRENCY = {"ray": 2, "inline": 1}


@dataclass
class Result:
    """What a fault did to a study."""

    fault: str
    home: str
    executor: str
    injected: int = 0
    trials_lost: int = 0
    trials_doubled: int = 0
    epochs_lost: int = 0
    epochs_doubled: int = 0
    repeated: int = 0
    """Epochs trained more than once."""
    seconds: list[float] = field(default_factory=list)
    """From each start of the command after a fault to its next epoch."""
    wrong: list[str] = field(default_factory=list)
    """Everything else that should not be."""
    date: str = ""
    commit: str = ""
    """Of the code that was hurt."""

    @property
    def fine(self):
        """Nothing lost, nothing doubled, no more repeated than one epoch a fault and trial at work."""
        numbers = (self.trials_lost, self.trials_doubled, self.epochs_lost, self.epochs_doubled)
        return not any(numbers) and not self.wrong and self.repeated <= self.injected * CONCURRENCY[self.executor]


class Case:
    """A study of digits in a home, and the command that runs it."""

    def __init__(self, home, folder, executor, trials=8, epochs=4, slow=0.15):
        self.home, self.folder, self.executor, self.trials, self.slow = home, folder, executor, trials, slow
        self.name = f"chaos-{folder.name}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "space.toml").write_text(SPACE)
        self.journal, self.root, self.turn = folder / "journal", folder / "store", 0
        self.arguments = [
            *("tune", "--variant", "relu", "--dataset", "digits", "--name", self.name),
            *("--trials", str(trials), "--epochs", str(epochs)),
            *("--space", str(folder / "space.toml"), "--set", "data.train_limit=200", "--json"),
            *("--executor", executor, "--concurrency", str(CONCURRENCY[executor]), "--store", str(self.root)),
        ]

    def start(self, point=None, arguments=None, **environment):
        """The command, in a process group of its own as a shell would start it."""
        self.turn += 1
        changes = {"ERPE_CHAOS_JOURNAL": str(self.journal), "ERPE_CHAOS_SLOW": str(self.slow)}
        changes |= ({"ERPE_CHAOS_POINT": point} if point else {}) | self.home.environment() | environment
        forked = self.executor == "inline" and "LD_PRELOAD" not in environment
        return Process(arguments or self.arguments, changes, self.log, forked)

    @property
    def log(self):
        """Where the command writes this time."""
        return self.folder / f"{self.turn:03d}.log"

    def finish(self, result, fenced=()):
        """The same command to its end, without harm; then the books."""
        process = self.start()
        code = process.wait(300)
        seconds = first_begin(self.journal, process.began)
        result.seconds += [seconds] if seconds is not None else []
        if code == 3:  # the server had not got everything in time
            code = self.start(arguments=["sync", "--store", str(self.root)]).wait(300)
        if code != 0:
            result.wrong.append(f"the command ended with {code}: {process.said()}")
            return result
        books = asdict(compare_books(store_of(self.home, self.root), self.name, self.trials))
        result.wrong += books.pop("wrong")
        for name, count in books.items():
            setattr(result, name, getattr(result, name) + count)
        journal = read_journal(self.journal, fenced)
        result.repeated = journal.repeated
        result.wrong += [f"{journal.retrained} saved epochs were trained again"] * bool(journal.retrained)
        return result


def started(arguments, changes, log):
    """`erpe` from nothing, in a session of its own."""
    path = [str(Path(__file__).parent / "inject"), str(ROOT)]
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": os.pathsep.join(path)}
    with log.open("wb") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "erpe", *arguments], stdout=out, stderr=out, stdin=subprocess.DEVNULL,
            env=os.environ | threads | changes, start_new_session=True,
        )  # fmt: skip


def forked_command(arguments, changes, log):
    """`erpe` where its modules are loaded already."""
    return Fork(_command, (arguments,), os.environ | changes, log)


def _command(arguments):
    sys.path.insert(0, str(Path(__file__).parent / "inject"))
    import accidents

    accidents.arm()
    sys.argv = ["erpe", *arguments]
    from erpe.cli.app import main

    main()


class Process:
    """A command that runs."""

    def __init__(self, arguments, changes, log, forked):
        self.began, self.path = time.time(), log
        self._process = forked_command(arguments, changes, log) if forked else started(arguments, changes, log)
        self.pid = self._process.pid

    def said(self):
        """The end of what it printed."""
        return self.path.read_text(errors="replace")[-2000:]

    def wait(self, seconds):
        """Its exit code; nothing if it goes on."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def until(self, text, seconds=120, again=False):
        """Wait until it has printed this, or `again`; False if it ended before."""
        deadline, known = time.monotonic() + seconds, self._times(text) if again else 0
        while self._times(text) <= known:
            if self._process.poll() is not None or time.monotonic() > deadline:
                return self._times(text) > known
            time.sleep(0.02)
        return True

    def _times(self, text):
        return self.path.read_text(errors="replace").count(text)

    def send(self, number):
        """A signal to the command itself."""
        self._process.send_signal(number)

    def send_all(self, number):
        """A signal to its whole process group, as a terminal or an init system sends it."""
        os.killpg(self.pid, number)

    def kill(self):
        """SIGKILL, and gone."""
        self.send(signal.SIGKILL)
        self._process.wait()

    def others(self, words):
        """Processes of its session whose command line has these words: workers, the raylet."""
        return [pid for pid in session(self.pid) if words in command_line(pid)]


def session(leader):
    """All processes of a session, its leader left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != leader:
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == leader:
                found.append(int(entry.name))
    return found


def command_line(pid):
    """Of a process; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
