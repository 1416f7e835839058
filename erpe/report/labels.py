"""What arms are called in a paper: `FAVOR+ + circulant-STRING` is `favor_circulant`."""

from __future__ import annotations

from typing import Any, NamedTuple

import pandas as pd

from erpe.report.pairing import LEARNED_POSITIONS, NO_POSITIONS, switches


class Words(dict[str, str]):
    """Names in words; those of plug-ins stay as they are."""

    def __missing__(self, name: str) -> str:
        return name


ATTENTION = Words(softmax="softmax", favor="FAVOR+", relu="ReLU")
ENCODING = Words(none="none", general="general RPE", circulant="circulant-STRING", rope="RoPE")
DATASET = Words(
    mnist="MNIST", fashion_mnist="Fashion-MNIST", kmnist="KMNIST", cifar10="CIFAR-10", cifar100="CIFAR-100", svhn="SVHN"
)
SWITCH = dict.fromkeys(NO_POSITIONS, "no positions") | dict.fromkeys(LEARNED_POSITIONS, "learned positions")


def label(arm: str, variant: str, without: frozenset[str] = frozenset()) -> str:
    """`ReLU + RoPE (no positions)` of `relu_rope-position_none`.

    Args:
        without: switches that are told elsewhere.
    """
    attention, _, encoding = variant.partition("_")
    words = ATTENTION[attention] + (f" + {ENCODING[encoding]}" if encoding else "")
    return words + switched(switches(arm, variant) - without, " ({})")


def labels_of(arms: pd.DataFrame) -> dict[str, str]:
    """Arm -> `label`.

    Args:
        arms: with columns `arm` and `variant`.
    """
    return {arm: label(arm, variant) for arm, variant in zip(arms["arm"], arms["variant"], strict=True)}


def switched(names: frozenset[str], form: str = "{}") -> str:
    """`no positions, patch2`: switches in words, put into `form`; nothing where there are none."""
    return form.format(", ".join(sorted(SWITCH.get(name, name) for name in names))) if names else ""


class Names(NamedTuple):
    """What the two arms of a pair are called where its family is told, as in a heading."""

    arm: str
    """`FAVOR+ + RoPE`."""
    against: str
    encoding: str
    """`RoPE`."""
    shared: str
    """Switches that are told for both: `no positions`; nothing where the two differ in one."""


def names(pair: dict[Any, Any], variants: dict[str, str]) -> Names:
    """Return the names of a row of `statistics.differences`.

    Args:
        variants: arm -> variant.
    """
    variant, other = variants[pair["arm"]], variants.get(pair["against"], pair["against"].partition("-")[0])
    own, others = switches(pair["arm"], variant), switches(pair["against"], other)
    apart = pair["kind"] in ("switch", "replacement", "study")
    before = own - others if apart else own & others
    more = switched(own - before, " ({})")
    return Names(
        label(pair["arm"], variant, before),
        label(pair["against"], other, before),
        ENCODING[variant.partition("_")[2]] + more,
        "" if apart else switched(before),
    )
