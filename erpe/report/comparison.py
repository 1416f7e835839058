"""A comparison: all that the statistics say of some outcomes, and what a reader must know beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import pandas as pd

from erpe import __version__
from erpe.errors import StudyError
from erpe.report.gaps import gap_closed
from erpe.report.measures import MEASURES
from erpe.report.outcomes import TIMED, Outcomes
from erpe.report.pairing import KEY, arm_keys, by_arm, named, partner, reference_version, sound_runs
from erpe.report.ranks import friedman, fronts, nemenyi, ranks
from erpe.report.ratios import time_ratios
from erpe.report.significance import verdicts
from erpe.report.statistics import differences, summary
from erpe.study.plan import Compare
from erpe.text import counted

WIDEST = 0.2
"""Half of the 95 % interval of a time, as a part of its mean, beyond which something is amiss with it."""


@dataclass(frozen=True)
class Comparison:
    """Tidy tables of what was found. The columns are told where each is made."""

    arms: pd.DataFrame
    """`Outcomes.arms` and `mark`: what is amiss with an arm (`2 of 5 seeds`, `erpe 0.0.9`), or empty."""
    summary: pd.DataFrame
    """Means with intervals; see `statistics.summary`."""
    differences: pd.DataFrame
    """Paired comparisons and their verdicts; see `statistics.differences`."""
    gaps: pd.DataFrame
    """The gap closed; see `gaps.gap_closed`."""
    ratios: pd.DataFrame
    """Times over those of softmax; see `ratios.time_ratios`."""
    ranks: pd.DataFrame
    """Average ranks; see `ranks.ranks`."""
    friedman: pd.DataFrame
    """See `ranks.friedman`."""
    nemenyi: pd.DataFrame
    """See `ranks.nemenyi`."""
    fronts: pd.DataFrame
    """Trials of each search that no other one dominates, of several objectives; see `ranks.fronts`."""
    verdicts: pd.DataFrame
    """A sentence a comparison; see `verdicts.verdicts`."""
    notes: tuple[str, ...]
    """What a reader should know: missing seeds, other versions, other devices; a line each."""
    time_notes: tuple[str, ...] = ()
    """Those of the notes that are about times and memory."""

    def only(self, study: str, dataset: str) -> Comparison:
        """Return the part that is about one study on one data set; the notes stay."""
        tables = {field.name: getattr(self, field.name) for field in fields(self) if not field.name.endswith("notes")}
        own = {name: t[(t["study"] == study) & (t["dataset"] == dataset)] for name, t in tables.items()}
        return replace(self, **own)


def compare(outcomes: Outcomes, against: str | None = None, margin: float | None = None) -> Comparison:
    """Compare all arms of one or more studies, each data set by itself.

    Args:
        against: a study whose arms those of the other studies are compared with, too.
        margin: points of accuracy that are too few to matter; default: what each study says.
    Raises:
        ConfigError: the margin is not above 0, or no number.
        StudyError: there is no confirmed run, a study's arms share no data set, or the study `against` shares none
            with the others.
    """
    if margin is not None:
        Compare(margin=margin)
    _check(outcomes)
    pairs = differences(outcomes, against=against, margin=margin)
    gaps = gap_closed(outcomes, pairs)
    means = summary(outcomes)
    return Comparison(
        arms=outcomes.arms.assign(mark=_marks(outcomes)), summary=means, differences=pairs,
        gaps=gaps, ratios=time_ratios(outcomes), ranks=ranks(outcomes), friedman=friedman(outcomes),
        nemenyi=nemenyi(outcomes), fronts=fronts(outcomes), verdicts=verdicts(outcomes.arms, pairs, gaps),
        notes=tuple(_notes(outcomes, means)),
        time_notes=tuple(_time_notes(outcomes, means)),
    )  # fmt: skip


def _check(outcomes: Outcomes) -> None:
    if outcomes.arms.empty:
        raise StudyError("no study to compare: the store is empty, or no study has the name that was given")
    if outcomes.runs.empty:
        studies = ", ".join(outcomes.arms["study"].unique())
        raise StudyError(f"{studies}: no confirmed run yet, so nothing to compare; the study's command continues it")
    for study, arms in outcomes.arms.groupby("study", sort=False):
        if len(arms) > 1 and len(arms) == arms["dataset"].nunique():
            where = ", ".join(f"{arm} on {dataset}" for _, dataset, arm in arm_keys(arms))
            raise StudyError(f"{study}: its arms share no data set ({where}), so nothing can be compared")


def _marks(outcomes: Outcomes) -> list[str]:
    """Return what is amiss with each arm."""
    sound, every = by_arm(sound_runs(outcomes)), by_arm(outcomes.runs)
    marks = []
    for key, arm in zip(arm_keys(outcomes.arms), outcomes.arms.itertuples(index=False), strict=True):
        mark = [] if arm.finished else [f"{int(arm.seeds)} of {int(arm.seeds_planned)} seeds"]
        if key in every and key not in sound:
            mark.append(f"erpe {', '.join(sorted(every[key]['version'].unique()))}")
        marks.append("; ".join(mark))
    return marks


def _notes(outcomes: Outcomes, means: pd.DataFrame) -> list[str]:
    lines = [
        *outcomes.notes, *_other_versions(outcomes.runs), *_twice(outcomes.runs), *_one_seed(outcomes),
        *_missing_seeds(outcomes),
        *_without_partner(outcomes.arms), *_budgets(outcomes.arms), *_time_notes(outcomes, means),
        *_missing_measures(outcomes), *_no_predictions(outcomes),
    ]  # fmt: skip
    return list(dict.fromkeys(lines))


def _time_notes(outcomes: Outcomes, means: pd.DataFrame) -> list[str]:
    return [*_devices(outcomes), *_untimed(outcomes), *_busy(means)]


def _other_versions(runs: pd.DataFrame) -> Iterator[str]:
    version = reference_version(runs)
    if version != __version__:
        yield f"the runs compared were logged by erpe {version}; this is erpe {__version__}"
    for (study, other), group in runs[runs["version"] != version].groupby(["study", "version"], sort=False):
        arms = ", ".join(group["arm"].unique())
        yield f"{study}: {counted(len(group), 'run')} of {arms} by erpe {other}, not {version}: left out of every test"


def _twice(runs: pd.DataFrame) -> Iterator[str]:
    for (study, _, arm, _, seed), group in runs.groupby([*KEY, "version", "seed"], sort=False):
        if len(group) > 1:
            yield f"{study}: {arm} was confirmed {len(group)} times with seed {seed}; the first run counts"


def _one_seed(outcomes: Outcomes) -> Iterator[str]:
    for study, runs in sound_runs(outcomes).groupby("study", sort=False):
        if runs.groupby(KEY)["seed"].nunique().max() == 1:
            yield f"{study}: one seed an arm, so nothing can be tested; use confirm.seeds=8 instead"


def _missing_seeds(outcomes: Outcomes) -> Iterator[str]:
    """Note arms that lack seeds that others have: the mean is over fewer, and its pairs are. A line for all alike."""
    runs, alike = sound_runs(outcomes), dict[tuple[str, str], list[str]]()
    for (study, dataset), arms in outcomes.arms.groupby(KEY[:2], sort=False):
        here = runs[(runs["study"] == study) & (runs["dataset"] == dataset)]
        for arm in arms.itertuples(index=False):
            has = set(here.loc[here["arm"] == arm.arm, "seed"])
            missing = ", ".join(str(seed) for seed in sorted(set(here["seed"]) - has))
            said = "no run to compare" if not has else f"seeds {missing} are missing, pairs are over {len(has)}"
            if has and not missing:
                said = "" if arm.finished else f"{len(has)} of {int(arm.seeds_planned)} seeds so far"
            if said:
                alike.setdefault((f"{study} on {dataset}", said), []).append(arm.arm)
    yield from (f"{where}: {said}: {', '.join(arms)}" for (where, said), arms in alike.items())


def _without_partner(arms: pd.DataFrame) -> Iterator[str]:
    known, alike = named(arms), dict[tuple[str, str, str], list[str]]()
    for arm in arms.itertuples(index=False):
        wanted = dict.fromkeys([arm.attention, "softmax"])
        if lacking := [variant for variant in wanted if partner(known, arm, variant) is None]:
            alike.setdefault((arm.study, arm.dataset, " or ".join(lacking)), []).append(arm.arm)
    for (study, dataset, names), without in alike.items():
        yield f"{study}: no arm {names} with their switches on {dataset} to compare with: {', '.join(without)}"


def _budgets(arms: pd.DataFrame) -> Iterator[str]:
    for study, group in arms.groupby("study", sort=False):
        if (group["budget"] == "flops").any():
            yield f"{study}: every variant had the same FLOPs, so cheap ones trained for longer"
        short = group[group["trials"] < group["trials_planned"]]
        if len(short):
            each = ", ".join(f"{arm.arm} {arm.trials} of {arm.trials_planned}" for arm in short.itertuples())
            yield f"{study}: the search is not done, trials: {each}"


def _devices(outcomes: Outcomes) -> Iterator[str]:
    """Note that runs are of several devices; their times may be of one, as runs whose model is gone have none."""
    for (study, dataset), group in sound_runs(outcomes).groupby(KEY[:2], sort=False):
        devices, timed = group["device"].unique(), group.reindex(columns=["device", TIMED]).dropna(subset=TIMED)
        if len(devices) > 1:
            what = "memory" if timed["device"].nunique() == 1 else "times and memory"
            yield f"{study} on {dataset}: ran on {', '.join(map(str, devices))}; do not compare its {what}"


def _untimed(outcomes: Outcomes) -> Iterator[str]:
    """Note runs without times: those are taken at the end of a study, of all runs at once, when nothing else runs."""
    for (study, dataset), group in sound_runs(outcomes).groupby(KEY[:2], sort=False):
        without = int(group.reindex(columns=[TIMED])[TIMED].isna().sum())
        if without:
            runs = f"{without} of {counted(len(group), 'run')}"
            yield (
                f"{study} on {dataset}: inference and training times were not measured for {runs}; the study's "
                "command does it at its end, when nothing else runs, if the models are still there"
            )


def _busy(means: pd.DataFrame) -> Iterator[str]:
    """Note times that their seeds do not agree on."""
    times = means[means["measure"].str.startswith("time/")]
    wide = times[times["high"] - times["low"] > 2 * WIDEST * times["mean"]]
    for (study, dataset), group in wide.groupby(KEY[:2], sort=False):
        arms = ", ".join(group["arm"].unique())
        wider = f"95 % intervals of times of {arms} are wider than ± {100 * WIDEST:.0f} %"
        yield f"{study} on {dataset}: {wider}: the machine was busy, or the seeds are too few; they rank no arms"


def _missing_measures(outcomes: Outcomes) -> Iterator[str]:
    for (study, dataset), group in sound_runs(outcomes).groupby(KEY[:2], sort=False):
        for measure in MEASURES:
            without = int(group[measure].isna().sum()) if measure in group else 0
            if without and not measure.startswith("time/"):
                yield f"{study} on {dataset}: {without} of {counted(len(group), 'run')} have no {measure}"


def _no_predictions(outcomes: Outcomes) -> Iterator[str]:
    for (study, dataset), group in sound_runs(outcomes).groupby(KEY[:2], sort=False):
        images = len(outcomes.labels.get(dataset, ()))
        told = {note.partition(":")[0] for note in outcomes.notes}  # a damaged file is a note of its own
        lengths = [len(outcomes.predictions.get(uid, ())) for uid in group["uid"] if uid not in told]
        without = int(np.sum([length != images or not length for length in lengths]))
        if without:
            runs = f"{without} of {counted(len(group), 'run')}"
            yield f"{study} on {dataset}: {runs} have no predictions of the test set, nor intervals for new images"
