"""Every way to hurt a study: each takes a case, hurts it, lets the same command continue, and compares the books.

FAULTS[name](case, rng, times) -> Result
"""

import os
import signal
import struct
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path

from books import first_begin
from case import Result

POINTS = {
    "between create_run and save": "mlflow.tracking.client:MlflowClient.create_run:after:2",
    "between a run and the cursor": "erpe.tracking.publisher:Cursor.write:before:2",
    "between ask and write": "optuna.study:Study.ask:after:3",
    "between write and the worker": "erpe.study.session:StudySession.ask:after:4",
    "between an epoch in Optuna and in its history": "erpe.study.session:StudySession.report:after:5",
    "during a write of a history": "erpe.tracking.history:Journal._append:half:6",
    "after a decision": "erpe.study.session:StudySession.decide:after:2",
    "before tell": "erpe.study.session:StudySession.tell:before:2",
    "after tell": "erpe.study.session:StudySession.tell:after:2",
    "during a checkpoint write": "erpe.training.checkpoint:write_atomic:half:3",
    "between a checkpoint and its report": "erpe.training.trial_folder:save_tensors:after:5",
    "between a result and its report": "erpe.training.trial:Trial.finish:after:1",
    "between the test and its record": "erpe.study.session:StudySession.record_final:before:1",
}
"""Named points of a kill; in the driver, or in the worker where there is one."""


def result_of(case, fault):
    """Nothing yet."""
    return Result(fault, case.home.name, case.executor)


def goes_on(case, result, process, allowed=(0,)):
    """Note how the command ended that was hurt; whether it may be given again."""
    code = process.wait(300)
    if code not in allowed:
        result.wrong.append(f"ended with {code}: {process.said()[-500:]}")
    return code != 0


def driver_kill(case, rng, times):
    """SIGKILL of the driver at random moments."""
    result = result_of(case, "SIGKILL of the driver, random moments")
    while result.injected < times:
        process = case.start()
        if rng.random() < 0.7:  # else it is killed while it starts
            process.until("search" if case.executor == "inline" else "epoch", 120)
        if process.wait(rng.uniform(0.2, 3 if case.executor == "inline" else 6)) is not None:
            break  # done before its time
        process.kill()
        result.injected += 1
        note_seconds(case, result, process)
    return case.finish(result)


def note_seconds(case, result, process):
    """From a start to the first epoch, if it came to one."""
    seconds = first_begin(case.journal, process.began)
    if seconds is not None and result.injected > 1:
        result.seconds.append(seconds)


def driver_points(case, rng, times):
    """SIGKILL at named points, one after the other, in the order of a study's life."""
    result = result_of(case, "SIGKILL at named points")
    for name, point in list(POINTS.items())[-times:]:
        code = case.start(point).wait(120)
        result.injected += code == -signal.SIGKILL
        if code != -signal.SIGKILL:
            result.wrong.append(f"never came to the point {name}: ended with {code}")
    return case.finish(result)


def worker_kill(case, rng, times):
    """SIGKILL of Ray's workers while they train; the driver goes on."""
    result = result_of(case, "SIGKILL of a Ray worker")
    process = case.start()
    while (
        result.injected < times
        and process.until("epoch", 180, again=True)
        and process.wait(rng.uniform(0, 0.4)) is None
    ):
        workers = process.others("ray::Resource")
        if workers:
            hit = rng.choice(workers)
            os.kill(hit, signal.SIGKILL)
            result.injected += 1
    goes_on(case, result, process, (0, 3))
    return case.finish(result)


def raylet_kill(case, rng, times):
    """SIGKILL of the raylet: the driver ends in one line, the same command continues."""
    result = result_of(case, "SIGKILL of the raylet")
    while result.injected < times:
        process = case.start()
        if not process.until("epoch", 300) or process.wait(rng.uniform(0.1, 2)) is not None:
            process.kill()
            break
        for pid in process.others("raylet/raylet"):
            os.kill(pid, signal.SIGKILL)
            result.injected += 1
        goes_on(case, result, process, (0, 1, 3))
    return case.finish(result)


def server_outage(case, rng, times):
    """SIGKILL of the MLflow server at the start, in the middle and at the end of a study; back after seconds."""
    result = result_of(case, "SIGKILL of the MLflow server, back later")
    process = case.start()
    while result.injected < times:
        if result.injected == 0:
            case.home.kill_server()  # before the first word
        elif process.wait(rng.uniform(0.5, 3)) is None:
            case.home.kill_server()
        else:
            break
        result.injected += 1
        process.wait(rng.uniform(0.5, 3))
        case.home.start_server()
    goes_on(case, result, process, (0, 3))
    return case.finish(result)


def database_restart(case, rng, times):
    """PostgreSQL stopped as a crash would, and started again: under Optuna and MLflow alike."""
    result = result_of(case, "PostgreSQL: immediate stop and restart")
    process = case.start()
    while result.injected < times:
        if not process.until("trial", 90) or process.wait(rng.uniform(0.5, 2.5)) is not None:
            if not goes_on(case, result, process, (0, 1, 3)):
                break
            process = case.start()
            continue
        case.home.postgres.stop()
        process.wait(rng.uniform(0, 3))
        case.home.postgres.start()
        result.injected += 1
    goes_on(case, result, process, (0, 1, 3))
    return case.finish(result)


def sender_kill(case, rng, times):
    """SIGKILL of `erpe sync` while it sends what waited for a server that was down."""
    result = result_of(case, "SIGKILL of the sender")
    case.home.kill_server()
    process = case.start()
    goes_on(case, result, process, (0, 3))
    case.home.start_server()
    while result.injected < times:
        process = case.start(arguments=["sync", "--store", str(case.root)])
        if process.wait(rng.uniform(1.5, 4.5)) is not None:
            break
        process.kill()
        result.injected += 1
    return case.finish(result)


def second_driver(case, rng, times):
    """A second driver is refused in one line; the first does not notice."""
    result = result_of(case, "a second driver")
    process = case.start()
    while result.injected < times and process.until("search", 60):
        second = case.start()
        code = second.wait(60)
        if process.wait(0) is not None:
            break
        result.injected += 1
        if code != 1 or "another erpe is running it" not in second.said() or "Traceback" in second.said():
            result.wrong.append(f"the second driver ended with {code}: {second.said()[-500:]}")
    goes_on(case, result, process, (0, 3))
    return case.finish(result)


def old_driver_returns(case, rng, times):
    """A driver stops breathing, loses its lease, another takes over; then it wakes and must not write."""
    result, fenced = result_of(case, "an old driver returns after a pause"), set()
    while result.injected < times:
        old = case.start()
        if not old.until("epoch", 180) or old.wait(rng.uniform(0.1, 1)) is not None:
            break
        old.send(signal.SIGSTOP)
        fenced.add(old.pid)
        lose_lease(case)
        new = case.start()
        if not new.until("epoch", 90):
            result.wrong.append(f"the new driver never began: {new.said()[-500:]}")
        old.send(signal.SIGCONT)
        result.injected += 1
        code = old.wait(90)
        gave_up = any(words in old.said() for words in ("another erpe took over", "another erpe is running it"))
        if code != 1 or not gave_up or "Traceback" in old.said():
            result.wrong.append(f"the old driver ended with {code}: {old.said()[-500:]}")
        new.send(signal.SIGINT)
        goes_on(case, result, new, (0, 3, 130))
    return case.finish(result, fenced)


def lose_lease(case):
    """As a cut network, or a lock file on a share that came back, would do."""
    if case.home.name == "served":
        case.home.cut()
    for lock in (case.root / "locks").glob("*.lock"):
        lock.unlink()


def terminated(case, rng, times):
    """SIGTERM, to the driver or to its whole process group: it ends by itself, the same command continues."""
    result = result_of(case, "SIGTERM")
    while result.injected < times:
        process = case.start()
        if process.wait(rng.uniform(1, 12 if case.executor == "ray" else 5)) is not None:
            break
        (process.send if result.injected % 2 else process.send_all)(signal.SIGTERM)
        result.injected += 1
        code = process.wait(60)
        if code is None:
            result.wrong.append(f"SIGTERM did not end it: {process.said()[-500:]}")
            process.kill()
        elif "Traceback" in process.said():
            result.wrong.append(f"SIGTERM ended it with {code} and a traceback: {process.said()[-1500:]}")
    return case.finish(result)


def clock_steps(case, rng, times):
    """The clock of every process steps back and forth by hours while the study runs."""
    result = result_of(case, "a clock that steps backwards")
    clock = case.folder / "clock"
    clock.write_bytes(struct.pack("d", 0))
    process = case.start(LD_PRELOAD=wrong_clock(case.folder), ERPE_CHAOS_CLOCK=str(clock))
    while result.injected < times and process.until("epoch", 180) and process.wait(rng.uniform(0.2, 1)) is None:
        with clock.open("r+b") as file:
            file.write(struct.pack("d", -3600 * (result.injected + 1)))
        result.injected += 1
    goes_on(case, result, process, (0, 3))
    return case.finish(result)


def wrong_clock(folder):
    """A library that puts the clock wrong, made here."""
    library = folder / "clock.so"
    source = Path(__file__).parent / "inject/clock.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", library, source], check=True)
    return str(library)


def full_disk(case, rng, times):
    """No room for the next checkpoint, or for the next line of a history; then there is some again."""
    result = result_of(case, "a full disk, at checkpoint and history")
    with small_disk(case.root / "checkpoints") as place:
        for _ in range(times):
            process = case.start()
            if not process.until("epoch", 90):
                break
            fill(place)
            code = process.wait(60)
            (place / FILLER).unlink()
            if code == 0:
                break
            result.injected += 1
            if code != 1 or "No space left" not in process.said() or "Traceback" in process.said():
                result.wrong.append(f"a full {place.name} ended with {code}: {process.said()[-500:]}")
        return case.finish(result)


FILLER = "filler"


@contextmanager
def small_disk(place):
    """A file system of 4 MiB there."""
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place):
    """Until nothing fits."""
    with (place / FILLER).open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


FAULTS = {
    "driver": driver_kill,
    "points": driver_points,
    "worker": worker_kill,
    "raylet": raylet_kill,
    "server": server_outage,
    "database": database_restart,
    "sender": sender_kill,
    "second": second_driver,
    "fenced": old_driver_returns,
    "sigterm": terminated,
    "clock": clock_steps,
    "disk": full_disk,
}
