"""Made-up outcomes with known truth, for the tests of the report room. Nothing here was measured."""

from __future__ import annotations

import numpy as np
import pandas as pd

from erpe.report.outcomes import Outcomes
from erpe.variants import VARIANTS, split_variant

ACCURACY = {"softmax": 0.95, "favor": 0.90, "relu": 0.91}
GAIN = {"none": 0.0, "general": 0.03, "circulant": 0.02, "rope": 0.01}


def made_up(variants=VARIANTS, seeds=5, images=500, noise=0.003, dataset="digits", study="made-up", seed=0) -> Outcomes:
    """A study whose accuracies are ACCURACY + GAIN + noise (a part of it shared by equal seeds)."""
    draw = np.random.default_rng(seed)
    shared = draw.normal(0, noise, seeds)
    labels = draw.integers(0, 10, images)
    arms, runs, trials, epochs, predictions = [], [], [], [], {}
    for place, variant in enumerate(variants):
        attention, encoding = split_variant(variant)
        who = {"study": study, "dataset": dataset, "arm": variant, "variant": variant}
        what = {"attention": attention, "encoding": encoding}
        arms.append(
            who | what | {"budget": "trials", "trials_planned": 4, "trials": 4, "seeds_planned": seeds}
            | {"seeds": seeds, "finished": True, "openings": seeds, "abandoned": 0, "own_axes": "none"}
            | {"default_won": False, "objective": "accuracy,flops", "at_most": "params=500000"}
        )  # fmt: skip
        for number in range(4):
            uid = f"{study}-{variant}-t{number}"
            trials.append(
                who | {"number": number, "uid": uid, "seed": number, "state": "COMPLETE" if number < 3 else "PRUNED"}
                | {"value": 0.8 + 0.01 * number, "epochs": 5, "seconds": 10.0, "train.lr": 1e-3 * (number + 1)}
                | {"model.width": 64, "accuracy": 0.8 + 0.01 * number, "flops": (1e5, 3e6, 2e6, 1e5)[number]}
            )  # fmt: skip
            for epoch in range(1, 6):
                where = {"phase": "search", "uid": uid, "seed": number, "epoch": epoch}
                epochs.append(who | where | {"val/accuracy": 0.8 - 0.3 / epoch, "train/loss": np.nan})
        for run in range(seeds):
            uid = f"{study}-{variant}-c{run}"
            rate = np.clip(ACCURACY[attention] + GAIN[encoding] + shared[run] + draw.normal(0, noise), 0, 1)
            wrong = draw.random(images) > rate
            predictions[uid] = np.where(wrong, (labels + 1) % 10, labels)
            accuracy = float((predictions[uid] == labels).mean())
            likelihood = -100.0 * (1.1 - accuracy) + draw.normal()
            k = 200_000 + 1000 * place
            runs.append(
                who | what | {"seed": 1000 + run, "uid": uid, "version": "0.1.0", "device": "cpu"}
                | {"test/accuracy": accuracy, "test/precision": accuracy, "test/recall": accuracy, "test/f1": accuracy}
                | {"test/log_likelihood": likelihood, "train/log_likelihood": 3 * likelihood, "params": float(k)}
                | {"aic": 2 * k - 6 * likelihood, "bic": k * np.log(1437) - 6 * likelihood, "train/images": 1437.0}
                | {"flops/forward": 6.0e6 + 3e5 * place, "flops/train_step": 18.0e6 + 9e5 * place}
                | {"time/inference_ms_per_image": 0.2 + 0.01 * place + draw.normal(0, 0.002)}
                | {"time/inference_ms_batch1": 3 + 0.1 * place, "memory/peak_mib": 500.0 + place}
                | {"time/train_seconds_per_epoch": 1.0 + 0.05 * place + draw.normal(0, 0.01)}
            )  # fmt: skip
            for epoch in range(1, 6):
                where = {"phase": "confirm", "uid": uid, "seed": 1000 + run, "epoch": epoch}
                epochs.append(who | where | {"val/accuracy": np.nan, "train/loss": 2.0 / epoch + 0.01 * place})
    return Outcomes(
        arms=pd.DataFrame(arms),
        runs=pd.DataFrame(runs),
        trials=pd.DataFrame(trials),
        epochs=pd.DataFrame(epochs),
        predictions=predictions,
        labels={dataset: labels},
    )
