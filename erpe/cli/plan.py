"""A study before it runs: its file with every default, its arms, what it costs and what it can find."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rich.table import Table

from erpe.datasets import Dataset
from erpe.study.objectives import Goals
from erpe.study.plan import Plan
from erpe.study.plan_file import toml_lines
from erpe.text import Terminal, clock
from erpe.training.own import given_path

if TYPE_CHECKING:
    from erpe.bench.probe import Probe


def plan_rows(plan: Plan) -> list[dict[str, Any]]:
    """Each arm of a study with its size and cost at a typical configuration of its space."""
    from erpe.model.vit import parameter_count
    from erpe.study.distributions import typical
    from erpe.study.search_space import own_axes
    from erpe.training.evaluate import cost

    rows = []
    for arm in plan.arms():
        spec = plan.search_spec(arm)
        config = typical(spec.space, spec.base)
        params = parameter_count(config.model)
        varied = sum(len(axis.probes()) > 1 for axis in spec.space.axes.values())
        rows.append({"arm": arm.name, "variant": arm.variant, "epochs": spec.epochs, "axes": varied, "params": params})
        rows[-1] |= {"own": own_axes(arm.variant, spec.space), "confirm": plan.confirm_spec(arm, config).epochs}
        rows[-1] |= cost(config)
    return rows


def plan_table(plan: Plan, rows: list[dict[str, Any]], notes: list[str]) -> None:
    """Print the resolved file, which is a study file again, and as comments the arms it makes."""
    written = plan.resolved().model_dump(mode="json", exclude_none=True)
    if isinstance(plan.dataset, Dataset):
        written["dataset"] = str(given_path(plan.dataset) or plan.dataset)
    for each in toml_lines(written):
        print(each)
    print(f"\n# {len(rows)} arms; size and cost of a typical model of each")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("arm", "epochs", "axes", "parameters", "MFLOPs a step"):
        table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
    for row in rows:
        numbers = (f"{row['params']:,}", f"{row['flops/train_step'] / 1e6:,.2f}")
        table.add_row(row["arm"], str(row["epochs"]), str(row["axes"]), *numbers)
    Terminal().print_table(table, "# ")
    for note in notes:
        print(f"# {note}")


def counted_note(plan: Plan) -> list[str]:
    """Which arms' attention has no closed form of its FLOPs."""
    from erpe.config import defaults
    from erpe.model.flops import is_counted

    counted = [variant for variant in plan.variants if is_counted(defaults(variant, plan.dataset).model)]
    return [f"attention counted by torch, not in closed form: {', '.join(counted)}"] if counted else []


def plan_notes(plan: Plan, rows: list[dict[str, Any]], points: float) -> list[str]:
    """Return what a study searches, how much it runs, and what it can find; a line each.

    Args:
        rows: of `plan_rows`.
        points: standard deviation of paired differences, in points of accuracy.
    Raises:
        ConfigError: a standard deviation that makes no sense.
    """
    return [*_searched(plan, rows), *_amount(plan, rows), *_found(plan, points)]


def _searched(plan: Plan, rows: list[dict[str, Any]]) -> list[str]:
    from erpe.study.pruning import FEWEST_FOR_PRUNING, chosen_pruner
    from erpe.study.samplers import startup_trials

    arm, trials = plan.arms()[0], plan.search.trials
    spec = plan.search_spec(arm)
    startup, pruner = startup_trials(spec, trials), chosen_pruner(spec, trials)
    few = trials < FEWEST_FOR_PRUNING and (pruner != "none" or spec.pruner == "auto")
    why = f" (fewer than {FEWEST_FOR_PRUNING} trials compare too few)" if few else ""
    common = f"the first {startup} of {trials}" if startup else f"all {trials}"
    lines = [f"trials: {common} are the same draws for every arm; sampler {spec.sampler}; pruner {pruner}{why}"]
    sharing: dict[str, dict[str, None]] = {}  # switches change no axis
    for arm_row in rows:
        sharing.setdefault(", ".join(arm_row["own"]), {})[arm_row["variant"]] = None
    own = [f"{', '.join(variants)}: {axes}" for axes, variants in sharing.items() if axes]
    lines += _allowed(plan)
    return [*lines, *(["axes that only some arms search:", *(f"  {each}" for each in own)] if own else [])]


def _allowed(plan: Plan) -> list[str]:
    """Return the limits of costs, and what share of random draws those in closed form refuse in each arm."""
    from erpe.study.objectives import check_limits

    if not (goals := Goals.of(plan.search)).at_most:
        return []
    shares = {arm.name: check_limits(plan.search_spec(arm)) for arm in plan.arms()}
    refused = ", ".join(f"{name} {1 - share:.0%}" for name, share in shares.items() if share < 1)
    return [f"at most {goals.limits}" + f"; so many draws cost more and are not trained: {refused}" * bool(refused)]


def _amount(plan: Plan, rows: list[dict[str, Any]]) -> list[str]:
    trials, seeds = plan.search.trials, plan.confirm.seeds
    searched = trials * sum(row["epochs"] for row in rows)
    confirmed = seeds * sum(row["confirm"] for row in rows)
    return [
        f"{len(rows)} arms x ({trials} trials + {seeds} seeds) = {len(rows) * (trials + seeds):,} runs",
        f"at most {searched:,} epochs of search and {confirmed:,} of confirmation",
    ]


def detectable(plan: Plan, points: float) -> dict[str, float | None]:
    """Family of tests -> the difference in points of accuracy that the study finds with 80 % power; None: nothing.

    Args:
        points: standard deviation of paired differences, in points of accuracy.
    """
    from erpe.report.power import detectable_difference

    found = {name: detectable_difference(plan.confirm.seeds, points, tests) for name, tests in families(plan).items()}
    return {name: None if math.isinf(difference) else difference for name, difference in found.items()}


def _found(plan: Plan, points: float) -> list[str]:
    """Return the difference that the seeds find, for each family of tests."""
    head = f"found with 80 % power from {plan.confirm.seeds} seeds, if paired differences have sd {points:g} points:"
    lines, sizes = [], families(plan)
    for family, found in detectable(plan, points).items():
        told = "nothing" if found is None else f"{found:.2f} points"
        tests = "one test" if sizes[family] == 1 else f"first of {sizes[family]} tests, Holm"
        lines.append(f"  {family}: {told} ({tests})")
    return [head, *lines] if lines else []


def families(plan: Plan) -> dict[str, int]:
    """Family of tests -> how many it has, for the largest of a kind: families are one a combination of switches."""
    import pandas as pd

    from erpe.report.pairing import pairs
    from erpe.variants import split_variant

    who = (plan.name, str(plan.dataset))
    arms = pd.DataFrame(
        [(*who, arm.name, arm.variant, *split_variant(arm.variant), True) for arm in plan.arms()],
        columns=["study", "dataset", "arm", "variant", "attention", "encoding", "finished"],
    )
    named = {
        "gap": "gaps, linear attention against softmax",
        "encoding": "encodings against none",
        "softmax": "encodings against softmax",
        "replacement": "encodings against learned positions",
    }
    sizes = pairs(arms).groupby(["kind", "family"]).size()
    return {named[kind]: int(sizes[kind].max()) for kind in named if kind in sizes.index.get_level_values("kind")}


def time_notes(probed: Probe) -> list[str]:
    """How long a study takes on this machine."""
    speeds = probed.images_per_second
    slow, fast = min(speeds, key=speeds.__getitem__), max(speeds, key=speeds.__getitem__)
    return [
        f"about {clock(probed.total_seconds)} on {probed.machine['device']}: {probed.concurrency} trials at a time, "
        f"threads of each: {probed.threads}",
        f"  measured one trial at a time, {speeds[slow]:,.0f} ({slow}) to {speeds[fast]:,.0f} ({fast}) images/s; "
        "nothing pruned",
    ]
