"""The commands of the section "The stack" of infra/README.md, made small enough for a test."""

import re

from engine import ROOT

STUDY = (
    "search.trials=1", "search.epochs=1", "confirm.seeds=2", 'variants=["softmax","relu_rope"]',
    'settings."data.train_limit"=300', 'space."model.width"=32', 'space."model.depth"=2',
)  # fmt: skip
SMALLER = {"tune": "--trials 2 --epochs 1", "study": " ".join(f"--set '{line}'" for line in STUDY)}


def commands():
    """In their order."""
    section = (ROOT / "infra/README.md").read_text().partition("\n## The stack\n")[2].partition("\n## ")[0]
    for block in re.findall(r"```sh\n(.*?)```", section, re.DOTALL):
        for line in block.splitlines():
            words = line.split()
            said = [word for word in words[words.index("erpe") + 1 :] if word != "submit"] if "erpe" in words else [""]
            small = SMALLER.get(said[0], "")
            yield f"{line} {small}".strip()
