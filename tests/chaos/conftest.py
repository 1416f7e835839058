"""What the short set shares: a study is hurt, goes on, and its books must agree."""

import random

import pytest
from case import Case
from faults import FAULTS


@pytest.fixture
def hurt(tmp_path, request):
    """Hurt a study so often in a home; everything must be fine at the end."""

    def run(fault, home, executor, times, **size):
        name = request.node.name.replace("[", "-").strip("]")
        case = Case(home, tmp_path / name, executor, **size)
        result = FAULTS[fault](case, random.Random(name), times)
        assert result.fine, result
        assert result.injected >= 1, result

    return run
