"""What arms are called in a paper: `FAVOR+ + circulant-STRING` is `favor_circulant`."""

from __future__ import annotations

from erpe.config import split_variant
from erpe.report.pairing import LEARNED_POSITIONS, NO_POSITIONS, switches

ATTENTION = {"softmax": "softmax", "favor": "FAVOR+", "relu": "ReLU"}
ENCODING = {"none": "none", "general": "general RPE", "circulant": "circulant-STRING", "rope": "RoPE"}
SWITCH = dict.fromkeys(NO_POSITIONS, "no positions") | dict.fromkeys(LEARNED_POSITIONS, "learned positions")


def label(arm: str, variant: str) -> str:
    """`ReLU + RoPE, no positions` of `relu_rope-position_none`."""
    attention, encoding = split_variant(variant)
    words = ATTENTION[attention] + (f" + {ENCODING[encoding]}" if encoding != "none" else "")
    return ", ".join([words, *switched(switches(arm, variant))])


def switched(names: frozenset[str]) -> list[str]:
    """Switches in words, sorted."""
    return sorted(SWITCH.get(name, name) for name in names)
