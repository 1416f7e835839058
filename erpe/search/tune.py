"""`tune`: a study from its specification to a tested model, as often as the command is given."""

from __future__ import annotations
