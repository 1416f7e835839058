"""FLOPs: the closed form, torch's counter and fvcore's say one number, and none of them guesses."""

import pytest
import torch
from counters import count_with_fvcore, count_with_torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from erpe.config import ModelConfig
from erpe.errors import ErpeError
from erpe.model import build
from erpe.model.flops import forward_flops, train_step_flops
from erpe.variants import VARIANTS

# fvcore builds on torch.jit, which is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


def config(variant, **settings):
    """4 x 6 patches, 3 heads of 8: no two sizes are equal."""
    given = {"variant": variant, "image": (2, 8, 12), "classes": 7, "patch": 2, "width": 24, "depth": 1, "heads": 3}
    return ModelConfig(**given | settings)


def cases():
    """Each variant with each switch that changes what it computes."""
    for variant in VARIANTS:
        attention, _, encoding = variant.partition("_")
        linear, rotary = attention != "softmax", encoding in ("rope", "circulant")
        switches = [{}, {"pooling": "cls", "depth": 2}, {"normalize_qk": True, "position": "none", "mlp_ratio": 1.7}]
        if attention == "favor":
            switches += [{"features": 11}]
        if attention == "relu":
            switches += [{"relu_projection": "orthogonal", "features": 5}]
        if linear and encoding == "general":
            switches += [
                {"method": method, "pooling": pooling} for method in ("dense", "fft") for pooling in ("mean", "cls")
            ]
            switches += [{"rank": 1}, {"rank": 6, "pooling": "cls"}]
        if encoding == "rope":
            switches += [{"rope": "mixed"}]
        if encoding == "circulant":
            switches += [{"circulant_block": 4}, {"circulant_block": 8, "circulant_init": "normal"}]
        if linear and rotary:
            switches += [{"rotary_placement": "post", "pooling": "cls"}]
            switches += [{"rotary_placement": "post", "features": 12, "relu_projection": "orthogonal"}]
        for settings in switches:
            yield pytest.param(variant, settings, id="-".join([variant, *(str(x) for x in settings.values())]))


each_case = pytest.mark.parametrize(("variant", "settings"), [*cases()])
each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_counter = pytest.mark.parametrize("count", [count_with_torch, count_with_fvcore])


def images(batch=1):
    return torch.randn(batch, 2, 8, 12)


@pytest.mark.slow
@each_case
def test_closed_form_torch_and_fvcore_agree_exactly(variant, settings):
    given = config(variant, **settings)
    model = build(given).eval()
    assert forward_flops(given) == count_with_torch(model, images()) == count_with_fvcore(model, images())


@pytest.mark.slow
@each_case
def test_a_training_step_costs_what_torch_counts(variant, settings):
    given = config(variant, **settings, dropout=0.1, drop_path=0.1)
    model = build(given).train()
    assert train_step_flops(given) == count_with_torch(model, images(), backward=True)


@pytest.mark.parametrize("variant", ["softmax_rope", "favor_general"])
def test_flops_are_of_one_image(variant):
    model = build(config(variant)).eval()
    alone = forward_flops(model.config)
    # What belongs to the batch and not to an image, such as rotations, is no product here.
    assert count_with_torch(model, images(5)) == count_with_fvcore(model, images(5)) == 5 * alone


def test_the_closed_form_is_what_a_pencil_gives():
    given = ModelConfig(variant="softmax", image=(1, 4, 4), classes=2, patch=2, width=4, depth=1, heads=1)
    n, c = 4, 4
    embed = 2 * n * 4 * c  # four pixels to c channels
    linear = 2 * n * c * (3 * c + c + 4 * c + 4 * c)  # q k v, out, both layers of the MLP
    attention = 2 * (2 * n * n * c)  # scores, then values
    head = 2 * c * 2
    assert forward_flops(given) == embed + linear + attention + head == 1936
    # The images need no gradient; everything else is two products backward for one forward.
    assert train_step_flops(given) == 2 * embed + 3 * (linear + attention + head) == 5680
    relu = given.model_copy(update={"variant": "relu"})
    # phi_k^T v, then phi_q times it; the denominators are sums of single entries
    assert forward_flops(relu) == embed + linear + 2 * (2 * n * c * c) + head


@each_variant
def test_blocks_cost_the_same_and_images_do_not_matter(variant):
    one, two, three = (forward_flops(config(variant, depth=depth)) for depth in (1, 2, 3))
    assert three - two == two - one > 0
    assert isinstance(one, int) and isinstance(train_step_flops(config(variant)), int)


@each_variant
def test_position_and_regularisation_are_not_counted(variant):
    plain = forward_flops(config(variant))
    assert plain == forward_flops(config(variant, position="sincos2d", dropout=0.5, drop_path=0.5))


@pytest.mark.parametrize("variant", ["softmax", "favor_general"])
def test_the_tools_alone_leave_work_out_without_a_word(variant):
    """Fused attention and FFTs count nothing in torch's counter: why ours unfuses and adds."""
    given = config(variant, method="fft")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        build(given).eval()(images())
    assert counter.get_total_flops() < 0.95 * forward_flops(given)


# What is not known is an error


class Holds(nn.Module):
    """A module around one function."""

    def __init__(self, function):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.randn(4, 4))
        self.conv = nn.Conv1d(4, 4, 3, groups=4)

    def forward(self, x):
        return self.function(self, x)


UNKNOWN = {
    "solve": lambda self, x: torch.linalg.solve(self.weight, x),
    "inverse": lambda self, x: torch.linalg.inv(self.weight) @ x,
    "matrix_exp": lambda self, x: torch.matrix_exp(self.weight) @ x,
    "addbmm": lambda self, x: torch.addbmm(self.weight, x, x),
    "dot": lambda self, x: torch.dot(self.weight[0], self.weight[1]),
    "bilinear": lambda self, x: nn.functional.bilinear(x, x, self.weight.expand(4, 4, 4)),
    "cdist": lambda self, x: torch.cdist(x, x),
    "sort": lambda self, x: x.sort()[0],
    "fft of one axis": lambda self, x: torch.fft.rfft(x).abs(),
    "cumulative sum": lambda self, x: x.cumsum(1),
}


@each_counter
@pytest.mark.parametrize("name", UNKNOWN)
def test_an_operator_that_nobody_counts_is_an_error_of_one_line(name, count):
    with pytest.raises(ErpeError, match="are not counted") as refused:
        count(Holds(UNKNOWN[name]), torch.randn(2, 4, 4))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("count", "function"),
    [
        (count_with_torch, lambda self, x: self.conv(x)),
        (count_with_torch, lambda self, x: x[0] @ self.weight[0]),
        (count_with_fvcore, lambda self, x: torch.baddbmm(x, x, x)),
        (count_with_fvcore, lambda self, x: torch.einsum("bij,bjk->bik", x, x)),
        (count_with_fvcore, lambda self, x: torch.tensordot(x, self.weight, 1)),
        (count_with_fvcore, lambda self, x: torch.linalg.multi_dot([self.weight] * 3)),
    ],
)
def test_what_one_tool_cannot_count_is_an_error_there(count, function):
    with pytest.raises(ErpeError, match="not counted"):
        count(Holds(function), torch.randn(2, 4, 4))


@each_counter
@pytest.mark.parametrize("function", [lambda self, x: x @ self.weight, lambda self, x: torch.bmm(x, x)])
def test_products_outside_of_erpe_are_counted(count, function):
    assert count(Holds(function), torch.randn(2, 4, 4)) == 2 * 2 * 4 * 4 * 4


def test_inference_mode_hides_nothing():
    model = build(config("favor_general", method="fft")).eval()
    with torch.inference_mode(), pytest.raises(ErpeError, match="fft_rfft2"):
        count_with_torch(model, images())
    with torch.inference_mode():
        assert count_with_fvcore(model, images()) == forward_flops(model.config)
