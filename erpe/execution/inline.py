"""Run a search in this process, for a machine without Ray."""

from __future__ import annotations

import traceback

from erpe.execution.controller import TrialController
from erpe.execution.packing import Packs
from erpe.execution.trial_loop import PackRunner, TrialFactory
from erpe.study.records import TrialRecord


def run_inline(controller: TrialController, start: TrialFactory, pack: int = 1) -> None:
    """The search in this process, one pack of trials after the other: for a machine without Ray.

    Args:
        pack: trials of one shape that train as one program; one that ends makes room for another.
    Raises:
        ErpeError: see `StudyController.on_trial_result`.
    """
    packs, together = Packs(controller, pack), PackRunner(start)
    tickets: dict[str, TrialRecord] = {}
    while True:
        for ticket in packs.join(list(tickets.values())):
            tickets[ticket.uid] = ticket
            together.add(ticket.uid, ticket.config, controller.folder(ticket))
        if not tickets:
            return
        packs.apart(_round(controller, together, tickets))


def _round(controller: TrialController, together: PackRunner, tickets: dict[str, TrialRecord]) -> list[TrialRecord]:
    """Hear an event of each trial, and forget those that end; the trials to run again after a crash."""
    events = together.round()
    while True:
        try:
            uid, event = next(events)
        except StopIteration:
            return []
        except Exception:
            reason, crashed = traceback.format_exc(), list(tickets.values())
            for ticket in crashed:
                together.drop(ticket.uid)
            tickets.clear()
            return [ticket for ticket in crashed if controller.on_trial_error(ticket, reason)]
        if not controller.on_trial_result(tickets[uid], event):
            together.drop(uid)
            del tickets[uid]
