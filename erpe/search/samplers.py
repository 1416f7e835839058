"""Optuna's samplers and pruners, with every setting written down: other versions have other defaults."""

from __future__ import annotations

import io
import pickle
from typing import TYPE_CHECKING, Any

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, RandomSampler, TPESampler

from erpe.errors import StoreError
from erpe.search.study import StudySpec

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

_SAMPLERS: dict[str, dict[str, Any]] = {
    "tpe": {"n_startup_trials": 8, "multivariate": True, "constant_liar": True},
    "gp": {"n_startup_trials": 8, "warn_independent_sampling": False},
    "cmaes": {"n_startup_trials": 4, "warn_independent_sampling": False},
    "random": {},
}
"""Random start-up is short, since most studies are; a sampler that meets a conditional axis draws it alone."""


_CMAES_STATE = {
    ("cmaes._cma", "CMA"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy.random._mt19937", "MT19937"),
    ("numpy.random._pickle", "__bit_generator_ctor"),
    ("numpy.random._pickle", "__randomstate_ctor"),
    ("numpy.random.bit_generator", "SeedSequence"),
}


class _Unpickler(pickle.Unpickler):
    """Reads the CMA-ES state, which Optuna keeps as a pickle in the database, and no other object."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _CMAES_STATE:
            raise StoreError(f"the state of the CMA-ES sampler names {module}.{name}: the database was altered")
        return super().find_class(module, name)


class _CmaEs(CmaEsSampler):
    """CMA-ES that runs no code from the database: nobody's pickle is trusted."""

    def _restore_optimizer(self, completed_trials: list[FrozenTrial]) -> Any:
        for trial in reversed(completed_trials):
            attrs = {k: v for k, v in trial.system_attrs.items() if k.startswith(self._attr_key_optimizer)}
            if attrs:
                try:
                    return _Unpickler(io.BytesIO(bytes.fromhex(self._concat_optimizer_attrs(attrs)))).load()
                except (ValueError, pickle.UnpicklingError, EOFError, KeyError) as error:
                    raise StoreError(f"the state of the CMA-ES sampler is damaged ({error})") from None
        return None


_CLASSES: dict[str, type[BaseSampler]] = {
    "tpe": TPESampler,
    "gp": GPSampler,
    "cmaes": _CmaEs,
    "random": RandomSampler,
}


def make_sampler(spec: StudySpec, seed: int) -> BaseSampler:
    """The study's sampler. It is made anew for every trial: its state is the database, its seed the trial's."""
    make: Any = _CLASSES[spec.sampler]
    return make(seed=seed, **_SAMPLERS[spec.sampler])


def _pruner_settings(spec: StudySpec) -> dict[str, Any]:
    # Warm-up says little about a trial: the first rung is at a tenth of the epochs.
    first = max(1, spec.epochs // 10)
    match spec.pruner:
        case "asha":
            return {"min_resource": first, "reduction_factor": 3}
        case "hyperband":
            return {"min_resource": first, "max_resource": spec.epochs, "reduction_factor": 3}
        case "median":
            return {"n_startup_trials": 4, "n_warmup_steps": first}
        case "none":
            return {}


def make_pruner(spec: StudySpec) -> BasePruner:
    """The study's pruner; rungs are epochs."""
    classes = {
        "asha": SuccessiveHalvingPruner, "hyperband": HyperbandPruner, "median": MedianPruner, "none": NopPruner,
    }  # fmt: skip
    make: Any = classes[spec.pruner]
    return make(**_pruner_settings(spec))


def settings(spec: StudySpec) -> dict[str, Any]:
    """All of the above as data, to be stored with the study."""
    return {
        "optuna": optuna.__version__,
        "sampler": {"name": spec.sampler} | _SAMPLERS[spec.sampler],
        "pruner": {"name": spec.pruner} | _pruner_settings(spec),
    }
