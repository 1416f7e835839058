"""What users call things, and what Optuna's database calls them: the only place that knows both.

A user knows studies and their arms; the database has a study for the search of each arm, and one for its seeds.

    search_name("digits-nine", "favor")                     # "digits-nine.favor"
    seeds_stem("digits-nine", "favor")                      # "digits-nine.favor.confirm": "-" and six digits follow
    shown("digits-nine.favor.confirm-0cf6a4")               # "digits-nine/favor/seeds"
    trial_name("favor", "confirm", 2)                       # "favor/seed-2", behind "digits-nine/"

The names of the database are also those of folders and locks, and never change.
"""

from __future__ import annotations

import re

from erpe.variants import VARIANTS, own_variants

SEED = "seed-"
"""Before the number of a confirmed run, in its name."""


def search_name(study: str, arm: str) -> str:
    """Return the search of an arm, in the database."""
    return f"{study}.{arm}"


def seeds_stem(study: str, arm: str) -> str:
    """Return the confirmation of an arm, in the database, without the digits of its identity."""
    return f"{search_name(study, arm)}.confirm"


def model_name(study: str, arm: str) -> str:
    """Return what MLflow's registry calls the model of an arm; it allows no slash."""
    return f"{study}.{arm}" if arm else study


def shown(name: str) -> str:
    """Return a study of the database as a user knows it: STUDY, STUDY/ARM or STUDY/ARM/seeds.

    A record knows better what it is part of: an arm of a plug-in that is not loaded is not known by its name.
    """
    variants = "|".join((*VARIANTS, *own_variants()))
    found = re.fullmatch(rf"(.+)\.((?:{variants})(?:-[^/]+?)?)(\.confirm-[0-9a-f]{{6}})?", name)
    if not found:
        return name
    study, arm, confirmed = found.groups()
    return part_name(study, arm, "confirm" if confirmed else "search")


def part_name(study: str, arm: str, phase: str) -> str:
    """Return STUDY, STUDY/ARM or STUDY/ARM/seeds."""
    return "/".join(filter(None, [study, arm, "seeds" if phase == "confirm" else ""]))


def trial_name(part: str, phase: str, number: int) -> str:
    """Return STUDY/NUMBER, STUDY/ARM/NUMBER or STUDY/ARM/seed-NUMBER.

    Args:
        part: STUDY or STUDY/ARM; in MLflow, whose experiment is the study, ARM alone.
    """
    return f"{part}/{SEED if phase == 'confirm' else ''}{number}"
