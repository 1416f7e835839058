"""RandAugment and TrivialAugment in batches: torchvision's operations and strengths, equally likely."""

import math
from collections import Counter

import pytest
import torch
from scipy.stats import chisquare

from erpe.config import DataConfig
from erpe.training.data import load_training
from erpe.training.policies import OPERATIONS, Policy
from erpe.training.vision import torchvision

each_policy = pytest.mark.parametrize("name", ["rand", "trivial"])
each_size = pytest.mark.parametrize("size", [(3, 32, 32), (1, 28, 28), (1, 8, 8), (3, 9, 14)])


def expected(image, operation, strength):
    """What torchvision makes of a single image, in the words of its functional interface."""
    functional, still = torchvision().transforms.v2.functional, {"angle": 0.0, "translate": [0, 0], "scale": 1.0}
    straight, slope = still | {"shear": [0.0, 0.0]}, math.degrees(math.atan(strength))
    calls = {
        "identity": lambda: image,
        "shear_x": lambda: functional.affine(image, **still, shear=[slope, 0.0], center=[0, 0]),
        "shear_y": lambda: functional.affine(image, **still, shear=[0.0, slope], center=[0, 0]),
        "translate_x": lambda: functional.affine(image, **straight | {"translate": [int(strength), 0]}),
        "translate_y": lambda: functional.affine(image, **straight | {"translate": [0, int(strength)]}),
        "rotate": lambda: functional.rotate(image, strength),
        "brightness": lambda: functional.adjust_brightness(image, 1 + strength),
        "color": lambda: functional.adjust_saturation(image, 1 + strength),
        "contrast": lambda: functional.adjust_contrast(image, 1 + strength),
        "sharpness": lambda: functional.adjust_sharpness(image, 1 + strength),
        "posterize": lambda: functional.posterize(image, int(strength)),
        "solarize": lambda: functional.solarize(image, 255.0 * strength),
        "autocontrast": lambda: functional.autocontrast(image),
        "equalize": lambda: functional.equalize(image),
    }
    return calls[operation]()


def images(size):
    """Noise, dim noise, two levels, a ramp, a single colour."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, size, dtype=torch.uint8, generator=generator)
    ramp = torch.arange(noise.numel()).view(size) * 255 // noise.numel()
    return [noise, noise // 3 + 40, noise // 128 * 200, ramp.to(torch.uint8), torch.full_like(noise, 90)]


def every_move(policy, image):
    """The image after each move of the policy: (moves, channels, height, width)."""
    each = torch.arange(len(policy.moves), device="cpu")
    return policy.apply(image.expand(len(each), -1, -1, -1), each[None])


@pytest.mark.slow
@each_size
@each_policy
def test_each_operation_at_each_strength_makes_the_pixels_of_torchvision(name, size):
    policy = Policy(name, size[1:])
    for image in images(size):
        for found, (operation, strength) in zip(every_move(policy, image), policy.moves, strict=True):
            wrong = (found != expected(image, operation, strength)).any(0).sum().item()
            # at 45 degrees the source of a diagonal lies halfway between pixels, and rounding decides
            assert wrong <= (min(size[1:]) if operation == "rotate" else 0), (operation, strength)


def photo():
    """Digits in three colours of a narrow range, which every operation changes; odd sides: see above."""
    digits = load_training(DataConfig(dataset="digits")).train.pixels[:3, 0]
    dim = digits // 2 + torch.tensor([20, 60, 90], dtype=torch.uint8)[:, None, None]
    return dim.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :31, :31]


def counted(pictures):
    return Counter(picture.numpy().tobytes() for picture in pictures)


@each_policy
def test_moves_are_those_of_torchvision_and_as_likely(name):
    image, transforms = photo(), torchvision().transforms.v2
    theirs = transforms.RandAugment(num_ops=1) if name == "rand" else transforms.TrivialAugmentWide()
    torch.manual_seed(0)
    drawn = counted(theirs(image) for _ in range(3000))
    ours = counted(every_move(policy := Policy(name, image.shape[1:]), image))  # in how many moves of all
    assert drawn.keys() <= ours.keys() and len(drawn) > 0.9 * len(ours)
    often = {picture: n for picture, n in ours.items() if 3000 * n / len(policy.moves) >= 10}
    counts = [drawn[picture] for picture in often] + [sum(n for picture, n in drawn.items() if picture not in often)]
    chances = [n / len(policy.moves) for n in often.values()]
    chances.append(1 - sum(chances))
    used = [k for k, chance in enumerate(chances) if chance > 1e-9]
    assert len(used) >= (14 if name == "rand" else 3)
    assert chisquare([counts[k] for k in used], [3000 * chances[k] for k in used]).pvalue > 1e-4


@each_policy
def test_operations_are_equally_likely_and_signs_too(name):
    moves = Policy(name, (32, 32)).moves
    assert set(Counter(operation for operation, _ in moves).values()) == {len(moves) // len(OPERATIONS)}
    assert sum(strength for operation, strength in moves if operation not in ("posterize", "solarize")) == 0


@pytest.mark.parametrize(("name", "rounds"), [("rand", 2), ("trivial", 1)])
def test_all_moves_are_drawn_as_often(name, rounds):
    policy = Policy(name, (8, 8))
    drawn = policy.draw(20_000, torch.Generator().manual_seed(0))
    assert len(drawn) == rounds
    for moves in drawn:
        assert chisquare(moves.bincount(minlength=len(policy.moves))).pvalue > 1e-4


@each_policy
def test_an_image_is_varied_by_its_own_moves_whatever_the_others_are(name):
    policy, generator = Policy(name, (32, 32)), torch.Generator().manual_seed(0)
    batch = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8, generator=generator)
    drawn = policy.draw(40, generator)
    together = policy.apply(batch, drawn)
    assert torch.equal(policy.apply(batch, drawn, gather=False), together)  # as on a GPU
    for k in range(40):
        assert torch.equal(policy.apply(batch[k, None], drawn[:, k, None])[0], together[k])
        image = batch[k]
        for move in drawn[:, k]:  # the second operation follows the first
            image = expected(image, *policy.moves[move])
        assert (together[k] != image).any(0).sum() <= 64


@pytest.mark.parametrize(("dtype", "device"), [("bfloat16", "cpu"), ("float64", "cpu"), ("float32", "meta")])
def test_pixels_do_not_depend_on_the_defaults_of_torch(dtype, device):
    image = images((3, 9, 14))[0]
    usual = every_move(Policy("trivial", (9, 14)), image)
    torch.set_default_dtype(getattr(torch, dtype))
    torch.set_default_device(device)
    try:
        other = every_move(Policy("trivial", (9, 14)), image)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(usual, other)
