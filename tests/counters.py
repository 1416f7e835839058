"""FLOPs as tools count them: fvcore and torch's FlopCounterMode, with what both leave out put right.

Both count nothing for the fused attention of CPUs and for FFTs, and say so at most in a warning. Here each operator
is counted, or listed below as work on single entries, or an error.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from erpe.errors import ErpeError

ENTRYWISE = frozenset(
    """_conj _safe_softmax _softmax_backward_data _to_copy _unsafe_view add add_ alias amax bernoulli_ cat clamp
    clamp_min clone constant_pad_nd copy_ cos detach div div_ empty empty_like eq exp exp_ expand expand_as flip ge
    gelu gelu_backward gt linalg_vector_norm lt mT masked_fill_ maximum mean mul mul_ native_layer_norm
    native_layer_norm_backward neg new_empty new_empty_strided new_zeros numpy_T ones_like pad permute polar pow relu
    roll rsub scalar_tensor select select_backward sgn sin slice slice_backward split square squeeze stack sub sum t
    threshold_backward transpose unbind unflatten unfold unfold_backward unsqueeze view view_as_complex
    view_as_real where zeros_like
    """.split()
)
"""Operators on single entries or shapes alone: no matrix product, no FFT; not counted, as is usual."""

COUNTED = frozenset("mm bmm addmm baddbmm _fft_r2c _fft_c2r _fft_c2c".split())
"""What else runs below torch's dispatcher: FlopCounterMode counts the products, we the FFTs."""


def transform_flops(shape: list[int], axes: int = 2) -> float:
    """2.5 L log2 L for each real FFT over the last `axes` of `shape`, L entries each."""
    length = math.prod(shape[-axes:])
    return 2.5 * length * math.log2(length) * math.prod(shape[:-axes])


def count_with_torch(model: nn.Module, images: Tensor, backward: bool = False) -> int:
    """FLOPs by torch's FlopCounterMode over the unfused attention, FFTs added.

    Raises:
        ErpeError: an operator ran that is neither counted nor known to work on single entries.
    """
    seen = _Operators()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, seen:
        logits = model(images)
        if backward:
            logits.sum().backward()
    _refuse(sorted(seen.names - ENTRYWISE - COUNTED))
    return round(counter.get_total_flops() + seen.transforms)


def count_with_fvcore(model: nn.Module, images: Tensor) -> int:
    """FLOPs of the forward pass by fvcore: its multiply-adds, doubled, with handles for attention and FFTs.

    Raises:
        ErpeError: fvcore met an operator that is neither counted nor known to work on single entries.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fvcore uses the deprecated torch.jit
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(model, images)
        analysis.set_op_handle(
            "aten::scaled_dot_product_attention", _attention_macs, "aten::layer_norm", _nothing,
            "aten::fft_rfft2", _rfft_macs, "aten::fft_irfft2", _irfft_macs,
            "aten::matmul", _matmul_macs, "aten::einsum", _einsum_macs,
        )  # fmt: skip
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        total = analysis.total()
        _refuse(sorted({name.split("::")[-1] for name in analysis.unsupported_ops()} - ENTRYWISE))
    return round(2 * total)


class _Operators(TorchDispatchMode):
    """Notes the names of all operators, and the FLOPs of FFTs; a complex one is two real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.transforms = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[-1]
        result = func(*args, **(kwargs or {}))
        self.names.add(name)
        if name in ("_fft_r2c", "_fft_c2r"):
            real = args[0] if name == "_fft_r2c" else result
            self.transforms += transform_flops([*real.shape], axes=len(args[1]))
        elif name == "_fft_c2c":
            self.transforms += 2 * transform_flops([*result.shape], axes=len(args[1]))
        return result


def _refuse(unknown: list[str]) -> None:
    if unknown:
        raise ErpeError(f"FLOPs of {', '.join(unknown)} are not counted; add a formula or list it as entrywise")


def _shape(value: Any) -> list[int]:
    sizes: list[int] = value.type().sizes()
    return sizes


def _nothing(inputs: list[Any], outputs: list[Any]) -> float:
    return 0


def _attention_macs(inputs: list[Any], outputs: list[Any]) -> float:
    (b, h, n, d), keys, values = _shape(inputs[0]), _shape(inputs[1])[2], _shape(inputs[2])[3]
    return b * h * n * keys * (d + values)


def _rfft_macs(inputs: list[Any], outputs: list[Any]) -> float:
    *batch, rows, half = _shape(outputs[0])
    return transform_flops([*batch, rows, 2 * (half - 1)]) / 2


def _irfft_macs(inputs: list[Any], outputs: list[Any]) -> float:
    return transform_flops(_shape(outputs[0])) / 2


def _matmul_macs(inputs: list[Any], outputs: list[Any]) -> float:
    return math.prod(_shape(outputs[0])) * _shape(inputs[0])[-1]


def _einsum_macs(inputs: list[Any], outputs: list[Any]) -> float:
    """Of the one contraction erpe writes as an einsum."""
    written = inputs[0].toIValue()
    if written != "bhnf,bhfcn->bhnc":
        raise ErpeError(f"FLOPs of einsum {written} are not counted; add a formula")
    b, h, f, c, n = _shape(list(inputs[1].node().inputs())[1])
    return b * h * f * c * n
