import json
import multiprocessing
import os
import resource
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from erpe.errors import ConfigError, StoreError
from erpe.tracking.outbox import Ack, Event, Outbox, decode, encode


def epoch(step, value=0.5):
    return Event(kind="epoch", uid="s:0", step=step, metrics={"val/accuracy": value})


def fill(folder, count, study="study"):
    outbox = Outbox(folder, study)
    with outbox.exclusive():
        for step in range(1, count + 1):
            outbox.write(epoch(step))
    return outbox


def steps(folder, study="study"):
    """What a new reader finds, in order."""
    return [event.step for event, _ in Outbox(folder, study).read(0)]


def reopen(folder, study="study"):
    seen = []
    outbox = Outbox(folder, study, seen.append)
    with outbox.exclusive():
        pass
    return outbox, seen


def test_events_come_back_in_order_and_each_only_once_to_an_observer(tmp_path):
    fill(tmp_path, 5)
    outbox, seen = reopen(tmp_path)
    with outbox.exclusive():
        outbox.write(epoch(6))
    assert [event.step for event in seen] == [1, 2, 3, 4, 5, 6] == steps(tmp_path)
    assert [event.seq for event in seen] == [1, 2, 3, 4, 5, 6]


def test_time_rises_even_when_the_clock_steps_back(tmp_path, monkeypatch):
    clock = iter([1000.0, 999.0, 999.0, 1001.0])
    monkeypatch.setattr(time, "time", lambda: next(clock))
    outbox = fill(tmp_path, 2)
    with outbox.exclusive():
        outbox.write(epoch(3))
        outbox.write(epoch(4))
    assert [event.ts for event, _ in outbox.read(0)] == [1_000_000, 1_000_001, 1_000_002, 1_001_000]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e-300, 0.1 + 0.2])
def test_a_number_survives_exactly(value):
    assert repr(decode(encode(epoch(1, value))).metrics["val/accuracy"]) == repr(value)


def test_a_torn_last_line_is_cut_wherever_it_was_torn(tmp_path):
    path = fill(tmp_path, 3).path
    whole = path.read_bytes()
    third = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(third, len(whole)):
        path.write_bytes(whole[:cut])
        assert steps(tmp_path) == [1, 2]  # a reader waits before a line that may still be written
        outbox, _ = reopen(tmp_path)
        with outbox.exclusive():
            outbox.write(epoch(9))
        assert steps(tmp_path) == ([1, 2, 9] if cut < len(whole) - 1 else [1, 2, 3, 9])


def test_a_line_damaged_in_the_middle_is_moved_aside_in_one_line(tmp_path):
    path = fill(tmp_path, 5).path
    offsets = [end for _, end in Outbox(tmp_path, "study").read(0)]
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = lines[2].replace(b"0.5", b"0.6")
    path.write_bytes(b"".join([*lines[:2], damaged, *lines[3:]]))
    with pytest.raises(StoreError, match=r"1 damaged line\(s\), moved to study.corrupt") as error:
        reopen(tmp_path)
    assert "\n" not in str(error.value)
    assert (tmp_path / "study.corrupt").read_bytes() == damaged
    outbox, _ = reopen(tmp_path)
    assert steps(tmp_path) == [1, 2, 4, 5] and outbox.seq == 5
    assert [end for _, end in outbox.read(0)] == [offsets[i] for i in (0, 1, 3, 4)]  # acknowledgements stay true


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10_000), garbage=st.binary(min_size=1, max_size=40))
def test_no_damage_invents_or_alters_an_event(tmp_path, place, garbage):
    for file in tmp_path.iterdir():
        file.unlink()
    path = fill(tmp_path, 6).path
    whole = path.read_bytes()
    events = [event for event, _ in Outbox(tmp_path, "study").read(0)]
    place %= len(whole)
    path.write_bytes(whole[:place] + garbage + whole[place + len(garbage) :])
    try:
        reopen(tmp_path)
    except StoreError:
        reopen(tmp_path)  # mended
    found = [event for event, _ in Outbox(tmp_path, "study").read(0)]
    assert all(event in events for event in found)
    assert len(found) >= 6 - 1 - garbage.count(b"\n") - len(garbage) // 40 - 1


def _write_many(folder, first, count):
    outbox = Outbox(folder, "study")
    for step in range(first, first + count):
        with outbox.exclusive():
            outbox.write(epoch(step))


def test_two_processes_write_without_losing_or_mixing_a_line(tmp_path):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(tmp_path, first, 60)) for first in (0, 1000)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    _, seen = reopen(tmp_path)
    assert [event.seq for event in seen] == list(range(1, 121))
    assert sorted(event.step for event in seen) == [*range(60), *range(1000, 1060)]


def _write_until_full(folder, queue):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    outbox = Outbox(folder, "study")
    try:
        for step in range(100):
            with outbox.exclusive():
                outbox.write(epoch(step))
    except StoreError as error:
        written = steps(folder)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        with outbox.exclusive():
            outbox.write(epoch(1000))
        queue.put((str(error), written, steps(folder)))


def test_a_full_disk_is_one_line_and_leaves_whole_lines(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    writer = context.Process(target=_write_until_full, args=(tmp_path, queue))
    writer.start()
    error, written, after = queue.get(timeout=60)
    writer.join(60)
    assert str(tmp_path / "study.jsonl") in error and "cannot be written" in error and "\n" not in error
    assert written == list(range(len(written))) and after == [*written, 1000]


def test_a_folder_that_is_none_is_one_line(tmp_path):
    (tmp_path / "spool").write_text("a file")
    with pytest.raises(StoreError, match="cannot be written") as error:
        fill(tmp_path / "spool", 1)
    assert "\n" not in str(error.value)


def test_an_outbox_that_shrinks_in_use_stops_its_writer(tmp_path):
    outbox = fill(tmp_path, 3)
    outbox.path.write_bytes(b"")
    with pytest.raises(StoreError, match="shrunk"), outbox.exclusive():
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"offset": 3, "evil": 1}', "\0\0\0"])
def test_a_damaged_acknowledgement_means_nothing_arrived(tmp_path, text):
    outbox = fill(tmp_path, 1)
    (tmp_path / "study.ack").write_text(text)
    assert outbox.ack == Ack()


def test_an_acknowledgement_dies_with_its_outbox(tmp_path):
    outbox = fill(tmp_path, 1)
    outbox.acknowledge(Ack("uri", 120, 1))
    assert outbox.ack == Ack("uri", 120, 1)
    outbox.path.unlink()
    assert fill(tmp_path, 1).ack == Ack()


def test_what_is_acknowledged_is_on_the_disk_before(tmp_path, monkeypatch):
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append(os.fstat(handle).st_ino), fsync(handle)))
    outbox = fill(tmp_path, 3)
    assert order == []  # an epoch waits for no disk
    monkeypatch.setattr(os, "replace", lambda *names: (order.append("ack"), replace(*names)))
    outbox.acknowledge(Ack("uri", outbox.path.stat().st_size, 3))
    assert order[0] == outbox.path.stat().st_ino and order[-1] == "ack"
    with outbox.exclusive():
        outbox.write(Event(kind="end_trial", uid="s:0", state="COMPLETE"))
    assert order[-1] == outbox.path.stat().st_ino


def test_reading_goes_on_where_it_stopped_and_in_bounded_steps(tmp_path, monkeypatch):
    outbox = fill(tmp_path, 50)
    monkeypatch.setattr("erpe.tracking.outbox.BATCH_BYTES", 1000)
    offset, found = 0, []
    while batch := outbox.read(offset):
        assert len(batch) < 20
        found += [event.step for event, _ in batch]
        offset = batch[-1][1]
    assert found == list(range(1, 51))


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden", "a b", "a'b", "a\nb", "a:b"])
def test_a_name_that_is_no_file_name_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="study name"):
        Outbox(tmp_path, name)


def test_a_line_is_json_that_others_can_read(tmp_path):
    (line,) = fill(tmp_path, 1).path.read_text().splitlines()
    found = json.loads(line)
    assert found["kind"] == "epoch" and found["seq"] == 1 and found["metrics"] == {"val/accuracy": 0.5}
