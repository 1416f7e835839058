"""Optuna's samplers, with every setting written down: other versions have other defaults.

Start-up and random draws are common to the arms of a study: an axis of trial k has the same value in each of them.
After the start-up a sampler that learns goes its own way in every arm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import optuna
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import TrialState

from erpe.config import TrialConfig
from erpe.errors import StudyError
from erpe.study.distributions import sample
from erpe.study.naming import shown
from erpe.study.pruning import chosen_pruner, pruner_settings
from erpe.study.records import COSTS, REFUSED
from erpe.study.spec import StudySpec, derive_seed

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

_SAMPLERS: dict[str, dict[str, Any]] = {
    "tpe": {"multivariate": True, "constant_liar": True},
    "gp": {"warn_independent_sampling": False},
    "random": {},
    "nsgaii": {},
}
"""A sampler that meets a conditional axis draws it alone."""

_STARTUP = {"tpe": 8, "gp": 8}
"""Finished trials before a sampler learns, in a long search; in a short one at most half the trials."""

POPULATION = 50
"""Trials of a generation of NSGA-II, in a long search; in a short one a quarter of the trials."""


MOST_DRAWS = 1000
"""In a row that would cost more than a limit allows."""


class CommonDraws(BaseSampler):
    """Draws a parameter from the study's seed, the trial's number and the parameter's name, and nothing else.

    So it does not matter what else an arm searches, what was drawn before, or how often the search was continued.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Nothing: every parameter is drawn alone."""
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Nothing: every parameter is drawn alone."""
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Draw a value of one parameter, uniformly."""
        draws = RandomSampler(seed=derive_seed(self._seed, "draw", trial.number, param_name))
        return draws.sample_independent(study, trial, param_name, param_distribution)


class _Generations(NSGAIISampler):
    """NSGA-II whose first generation, and what mutates, is common to the arms."""

    def __init__(self, seed: int, common: CommonDraws, population: int) -> None:
        super().__init__(population_size=population, seed=seed)
        self._common_draws = common

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Draw a value of one parameter, uniformly."""
        return self._common_draws.sample_independent(study, trial, param_name, param_distribution)


_CLASSES: dict[str, type[BaseSampler]] = {"tpe": TPESampler, "gp": GPSampler}


def population(trials: int | None) -> int:
    """Trials of a generation of NSGA-II."""
    return POPULATION if trials is None else max(2, min(POPULATION, trials // 4))


def startup_trials(spec: StudySpec, trials: int | None) -> int:
    """Finished trials before the sampler learns from them; all, where it never does.

    Args:
        trials: of the whole search; not known: as in a long one.
    """
    usual = _STARTUP.get(spec.sampler, 0)
    return usual if trials is None else min(usual, max(1, trials // 2))


def make_sampler(spec: StudySpec, earlier: list[FrozenTrial], trials: int | None) -> BaseSampler:
    """Return what draws the next trial. It is made anew for each: its state is the database, its seed the trial's.

    Args:
        earlier: every trial so far.
        trials: of the whole search.
    """
    common, startup = CommonDraws(spec.seed), startup_trials(spec, trials)
    tried = (trial for trial in earlier if REFUSED not in trial.user_attrs)
    finished = sum(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in tried)
    if spec.sampler == "random" or finished < startup:
        return common
    if spec.sampler == "nsgaii":
        return _Generations(derive_seed(spec.seed, "sampler", len(earlier)), common, population(trials))
    make: Callable[..., BaseSampler] = _CLASSES[spec.sampler]
    # From the count of trials, not from a running generator: a restart does not repeat suggestions.
    own = {"seed": derive_seed(spec.seed, "sampler", len(earlier)), "n_startup_trials": startup}
    alone = {} if spec.sampler == "tpe" else {"independent_sampler": common}
    return make(**own, **alone, **_SAMPLERS[spec.sampler])


def draw(study: optuna.Study, spec: StudySpec, trials: int | None) -> tuple[optuna.Trial, TrialConfig]:
    """Draw until a configuration is within the limits of costs that are known before it is trained.

    The sampler learns from those that are not.

    Args:
        trials: of the whole search.
    Raises:
        StudyError: too many in a row were not.
    """
    goals = spec.goals
    for _ in range(MOST_DRAWS):
        study.sampler = make_sampler(spec, study.get_trials(deepcopy=False), trials)
        asked = study.ask()
        drawn = sample(asked, spec.space, spec.base)
        costs: dict[str, float | None] = {**goals.closed_costs(drawn)}
        if costs:
            asked.set_user_attr(COSTS, costs)
        for name, part in goals.excess(costs).items():
            asked.set_constraint(name, part)
        if not (why := goals.over(costs)):
            return asked, drawn.replace({"seed": spec.trial_seed(asked.number)})
        asked.set_user_attr(REFUSED, why)
        study.tell(asked.number, state=TrialState.PRUNED)
    raise StudyError(
        f"study {shown(study.study_name)}: {MOST_DRAWS} draws in a row cost more than {goals.limits}; "
        "use more, or a space of smaller models instead"
    )


def settings(spec: StudySpec, trials: int | None) -> dict[str, Any]:
    """All of the above as data, to be stored with the study."""
    pruner, startup = chosen_pruner(spec, trials), startup_trials(spec, trials)
    learns = {"n_startup_trials": startup} if startup else {}
    learns |= {"population_size": population(trials)} if spec.sampler == "nsgaii" else {}
    return {
        "optuna": optuna.__version__,
        "trials": trials,
        "sampler": {"name": spec.sampler} | learns | _SAMPLERS[spec.sampler],
        "pruner": {"name": pruner} | pruner_settings(pruner, spec.epochs),
    }
