"""What arms are called in a paper: `FAVOR+ + circulant-STRING` is `favor_circulant`."""

from __future__ import annotations

from erpe.report.pairing import LEARNED_POSITIONS, NO_POSITIONS, switches


class Words(dict[str, str]):
    """Names in words; those of plug-ins stay as they are."""

    def __missing__(self, name: str) -> str:
        return name


ATTENTION = Words(softmax="softmax", favor="FAVOR+", relu="ReLU")
ENCODING = Words(none="none", general="general RPE", circulant="circulant-STRING", rope="RoPE")
SWITCH = dict.fromkeys(NO_POSITIONS, "no positions") | dict.fromkeys(LEARNED_POSITIONS, "learned positions")


def label(arm: str, variant: str) -> str:
    """`ReLU + RoPE, no positions` of `relu_rope-position_none`."""
    attention, _, encoding = variant.partition("_")
    words = ATTENTION[attention] + (f" + {ENCODING[encoding]}" if encoding else "")
    return ", ".join([words, *switched(switches(arm, variant))])


def switched(names: frozenset[str]) -> list[str]:
    """Switches in words, sorted."""
    return sorted(SWITCH.get(name, name) for name in names)
