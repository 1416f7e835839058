"""Run by infra/sanitize: a build of the kernels with sanitizers, over many shapes and ways to lie in memory.

python tests/sanitized.py LIBRARY [EXAMPLES]
"""

import sys
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from erpe.model.attention import build_attention
from erpe.model.kernels import cpu

VARIANTS = ["relu", "relu_rope", "relu_circulant", "relu_general", "favor", "favor_rope", "favor_circulant"]
VARIANTS += ["favor_general"]


def laid(x, way):
    """The same shape, elsewhere: with gaps, heads side by side, all of one number, in odd places, images alike."""
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    return {
        "plain": lambda: x,
        "every other": lambda: wide[..., 1 : 2 * x.shape[-1] : 2].copy_(x),
        "gaps": lambda: wide[..., 1 : 1 + x.shape[-1]].copy_(x),
        "heads": lambda: x.transpose(1, 2).contiguous().transpose(1, 2),
        "turned": lambda: x.mT.contiguous().mT,
        "expanded": lambda: x[:1].expand_as(x) if len(x) else x,
        "one number": lambda: torch.full((1, 1, 1, 1), 0.5, dtype=x.dtype, device=x.device).expand_as(x),
    }[way]()


WAYS = ["plain", "every other", "gaps", "heads", "turned", "expanded", "one number"]


@st.composite
def problems(draw):
    """A layer, its inputs, and how many threads."""
    one_of = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    size = one_of(4, 8, 12, 32, 36)
    layer = build_attention(
        one_of(*VARIANTS), grid=(draw(st.integers(1, 12)), draw(st.integers(1, 23))), heads=one_of(1, 3), head_dim=size,
        cls=draw(st.booleans()), features=one_of(1, 8, 24, 33), normalize_qk=draw(st.booleans()), eps=1e-3,
        relu_projection=one_of("none", "orthogonal"), rope=one_of("axial", "mixed"),
        circulant_block=one_of(None, size // 2) if size > 4 else None,
    )  # fmt: skip
    images, values = draw(st.integers(0, 3)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(0)
    inputs = [
        laid(torch.randn(images, layer.shape.heads, layer.shape.tokens, d, generator=generator), one_of(*WAYS))
        for d in (size, size, values)
    ]
    return layer, inputs, one_of(1, 2)


@given(problems())
def check(problem):
    """Forward and backward; whatever is wrong with memory ends the process."""
    layer, inputs, threads = problem
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float16)  # of which nothing may depend
    learn = [x.detach().requires_grad_() for x in inputs]
    y = layer(*learn)
    slopes = torch.autograd.grad(y, [*learn, *layer.parameters()], torch.ones_like(y[..., :1]).expand_as(y))
    torch.set_default_dtype(torch.float32)
    assert all(x.isfinite().all() for x in slopes)


if __name__ == "__main__":
    library, examples = sys.argv[1], int((sys.argv[2:] or ["150"])[0])
    cpu.LIBRARY = cpu.load([Path(library)])
    assert cpu.LIBRARY, f"{library} does not load"
    settings(max_examples=examples, deadline=None, database=None)(check)()
    print("clean")
