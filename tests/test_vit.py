"""The Vision Transformers around the twelve attentions."""

import pytest
import torch
from sklearn.datasets import load_digits

from erpe.config import ModelConfig
from erpe.errors import ConfigError, ShapeError
from erpe.model import VARIANTS, build, build_attention

each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_pooling = pytest.mark.parametrize("pooling", ["mean", "cls"])
RANDOM_FEATURES = [name for name in VARIANTS if name.startswith("favor")]


def config(variant, **settings):
    """3 x 5 patches of two channels, 3 heads of 8."""
    return ModelConfig(
        **{"variant": variant, "image": (2, 12, 20), "classes": 7, "width": 24, "depth": 2, "heads": 3} | settings
    )


def random_model(variant, seed=0, **settings):
    """A model in evaluation mode whose every parameter is random, those that start at zero too."""
    model = build(config(variant, **settings), seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def images(batch=4, seed=0, size=(2, 12, 20)):
    return torch.randn(batch, *size, generator=torch.Generator().manual_seed(seed))


def patches_permuted(x, order, patch=4):
    """The image with its patches in another order."""
    b, c, height, width = x.shape
    h, w = height // patch, width // patch
    tokens = x.view(b, c, h, patch, w, patch).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)[:, order]
    return tokens.unflatten(1, (h, w)).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


# The network


@each_pooling
@each_variant
def test_images_become_logits(variant, pooling):
    logits = build(config(variant, pooling=pooling))(images())
    assert logits.shape == (4, 7)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("position", ["learned", "sincos2d", "none"])
@each_pooling
def test_tokens_are_the_patches_row_by_row(pooling, position):
    model = random_model("softmax", pooling=pooling, position=position)
    x = images()
    tokens = model.tokens(x)
    if pooling == "cls":
        torch.testing.assert_close(tokens[:, 0], model.cls[0].expand(4, -1))
        tokens = tokens[:, 1:]
    assert tokens.shape == (4, 15, 24)
    for i in range(3):
        for j in range(5):
            expected = model.embed(x[:, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].flatten(1))
            if position != "none":
                expected = expected + model.position[0, 5 * i + j]
            torch.testing.assert_close(tokens[:, 5 * i + j], expected)


@each_pooling
@each_variant
def test_the_network_is_pre_norm_blocks_written_out(variant, pooling):
    model = random_model(variant, pooling=pooling)
    x = model.tokens(images())
    tokens = x.shape[1]
    for block in model.blocks:
        q, k, v = block.qkv(block.norm1(x)).split(24, dim=-1)
        q, k, v = (part.view(4, tokens, 3, 8).transpose(1, 2) for part in (q, k, v))
        y = block.attention.weights(q, k) @ v
        x = x + block.out(y.transpose(1, 2).reshape(4, tokens, 24))
        x = x + block.mlp(block.norm2(x))
    x = model.norm(x)
    expected = model.head(x[:, 0] if pooling == "cls" else x.mean(1))
    torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-4)


@each_pooling
@each_variant
def test_blocks_attend_on_the_grid_of_patches(variant, pooling):
    model = random_model(variant, pooling=pooling)
    layer = build_attention(variant, grid=(3, 5), heads=3, head_dim=8, cls=pooling == "cls")
    layer.load_state_dict(model.blocks[1].attention.state_dict())
    q, k, v = model.blocks[1].split(model.tokens(images()))
    assert torch.equal(model.blocks[1].attention(q, k, v), layer(q, k, v))


@each_pooling
@each_variant
def test_attention_maps_are_the_weights_of_each_block(variant, pooling):
    model = random_model(variant, pooling=pooling)
    tokens = 15 + (pooling == "cls")
    maps = model.attention_maps(images())
    assert maps.shape == (4, 2, 3, tokens, tokens)
    torch.testing.assert_close(maps.sum(-1), torch.ones(4, 2, 3, tokens))
    q, k, _ = model.blocks[0].split(model.tokens(images()))
    torch.testing.assert_close(maps[:, 0], model.blocks[0].attention.weights(q, k))


@each_pooling
@each_variant
def test_patches_can_be_permuted_exactly_if_nothing_encodes_their_place(variant, pooling):
    order = torch.randperm(15, generator=torch.Generator().manual_seed(1))
    x = images()
    for position in ("none", "learned", "sincos2d"):
        model = random_model(variant, pooling=pooling, position=position).double()
        difference = (model(patches_permuted(x, order).double()) - model(x.double())).abs().amax()
        if position == "none" and "_" not in variant:
            assert difference < 1e-10
        else:
            assert difference > 1e-4


@pytest.mark.parametrize("wild", [1e4, 0.0, 1.0])
@each_variant
def test_logits_of_an_image_ignore_its_batch_neighbours(variant, wild):
    model = random_model(variant).double()
    x = images().double()
    alone = model(x[1:2])
    x[[0, 2, 3]] *= wild
    torch.testing.assert_close(model(x)[1:2], alone, rtol=0, atol=1e-10)


@each_pooling
@each_variant
def test_every_parameter_gets_a_gradient(variant, pooling):
    model = random_model(variant, pooling=pooling).train()
    model(images()).square().sum().backward()
    for name, parameter in model.named_parameters():
        if pooling == "cls" and name == "blocks.1.attention.encoding.bias":
            continue  # of the last block only the class token is read, and that has scalars of its own
        assert parameter.grad is not None, name
        assert parameter.grad.abs().amax() > 1e-7, name


def test_no_two_variants_are_one_model():
    # One set of weights for all, position parameters random.
    shared = build(config("softmax")).state_dict()
    logits = {}
    for variant in VARIANTS:
        model = random_model(variant)
        model.load_state_dict(shared, strict=False)
        logits[variant] = model(images())
    for i, one in enumerate(VARIANTS):
        for other in VARIANTS[:i]:
            assert (logits[one] - logits[other]).abs().mean() > 1e-3, f"{one} is {other}"


@each_pooling
def test_variants_differ_in_position_parameters_only(pooling):
    shapes = {}
    for variant in VARIANTS:
        named = build(config(variant, pooling=pooling)).named_parameters()
        shapes[variant] = {name: p.shape for name, p in named if ".encoding." not in name}
    assert "position" in shapes["softmax"]
    assert all(shapes[variant] == shapes["softmax"] for variant in VARIANTS)


@each_variant
def test_the_absolute_embedding_is_an_axis_of_every_variant(variant):
    learned, fixed, none = (build(config(variant, position=name)) for name in ("learned", "sincos2d", "none"))
    assert config(variant).position == "learned"
    assert isinstance(learned.position, torch.nn.Parameter) and learned.position.abs().amax() > 0
    assert none.position is None
    assert "position" not in dict(fixed.named_parameters())
    distances = torch.cdist(fixed.position[0], fixed.position[0]) + torch.eye(15)
    assert distances.amin() > 0.1  # every place has its own


# Drawing, saving, evaluating


@each_pooling
@each_variant
def test_the_seed_alone_decides_the_model(variant, pooling):
    settings = config(variant, pooling=pooling)
    torch.manual_seed(0)
    model = build(settings, seed=3)
    torch.manual_seed(1)
    again, other = build(settings, seed=3), build(settings, seed=4)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert not torch.equal(model(images()), other(images()))


@pytest.mark.parametrize(
    "settings", [{}, {"pooling": "cls", "position": "sincos2d"}, {"rope": "mixed", "relu_projection": "orthogonal"}]
)
@each_variant
def test_a_state_dict_makes_another_seed_the_same_model(variant, settings):
    model, other = random_model(variant, **settings), random_model(variant, seed=9, **settings)
    assert not torch.equal(other(images()), model(images()))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images()), model(images()))


@each_variant
def test_evaluation_is_deterministic_and_training_mode_leaves_the_state_alone(variant):
    model = random_model(variant, dropout=0.3, drop_path=0.3)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = model(images())
    model.train()
    assert not torch.equal(model(images()), model(images()))
    model.eval()
    assert torch.equal(model(images()), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@each_variant
def test_redraw_changes_the_projections_and_nothing_else(variant):
    model = random_model(variant)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = model(images())
    model.redraw(torch.Generator().manual_seed(5))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, state[name])}
    expected = {f"blocks.{i}.attention.features.projection" for i in range(2)} if variant in RANDOM_FEATURES else set()
    assert changed == expected
    assert torch.equal(model(images()), before) == (not expected)


@pytest.mark.parametrize("variant", RANDOM_FEATURES)
def test_blocks_have_projections_of_their_own(variant):
    first, second = (block.attention.features.projection for block in build(config(variant)).blocks)
    assert not torch.equal(first, second)


@each_variant
def test_training_works_after_inference_mode(variant):
    # A head size in float64 that no other test has, so that constants are first made, and perhaps kept, in this mode.
    model = build(config(variant, width=84)).double()
    x = images().double()
    with torch.inference_mode():
        model(x)
    optimizer = torch.optim.AdamW(model.decay_groups(0.05), lr=1e-5)
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    assert model(x).square().mean() < loss


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-4), (torch.bfloat16, 0.2)], ids=str)
@each_variant
def test_a_converted_model_gives_nearly_the_same_logits(variant, dtype, atol):
    model = random_model(variant)
    expected = model(images())
    converted = model.to(dtype)(images().to(dtype))
    assert converted.dtype == dtype
    torch.testing.assert_close(converted.float(), expected, rtol=0, atol=atol)


@each_variant
def test_autocast_gives_nearly_the_same_logits(variant):
    model = random_model(variant)
    expected = model(images())
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images())
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.1)


# Optimisation


@pytest.mark.parametrize("settings", [{}, {"pooling": "cls"}, {"rope": "mixed"}, {"position": "sincos2d"}])
@each_variant
def test_matrices_decay_and_position_parameters_biases_and_norms_do_not(variant, settings):
    model = build(config(variant, **settings))
    moving, still = model.decay_groups(0.05)
    assert (moving["weight_decay"], still["weight_decay"]) == (0.05, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, free = ([names[id(parameter)] for parameter in group["params"]] for group in (moving, still))
    assert sorted(decayed + free) == sorted(names.values())  # each once
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(decayed) == {f"{name}.weight" for name in linear}
    if variant.endswith(("general", "circulant")):
        assert any(".encoding." in name for name in free)


def test_stochastic_depth_keeps_the_mean_and_whole_images():
    blocks = build(config("relu", drop_path=0.4, depth=3)).blocks
    assert [branch[-1].rate for b in blocks for branch in (b.out, b.mlp)] == pytest.approx([0, 0, 0.2, 0.2, 0.4, 0.4])
    last = blocks[2].mlp[-1].train()
    torch.manual_seed(0)
    kept = last(torch.ones(20_000, 2, 3))
    assert torch.equal(kept, kept[:, :1, :1].expand_as(kept))
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert kept.mean().item() == pytest.approx(1, abs=4 * (0.4 / 0.6 / 20_000) ** 0.5)
    assert torch.equal(last.eval()(kept), kept)


@pytest.fixture(scope="module")
def thirty_two_digits():
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))[:32]
    x = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 16
    return x - x.mean(), torch.tensor(digits.target)[order]


@pytest.mark.slow
@each_variant
def test_thirty_two_images_can_be_memorised(variant, thirty_two_digits):
    x, y = thirty_two_digits
    model = build(ModelConfig(variant=variant, image=(1, 8, 8), classes=10, patch=2, width=32, depth=2, heads=2))
    optimizer = torch.optim.AdamW(model.decay_groups(0.0), lr=3e-3)
    for _ in range(150):
        logits = model(x)
        loss = torch.nn.functional.cross_entropy(logits, y)
        if loss < 0.05 and torch.equal(logits.argmax(1), y):
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pytest.fail(f"loss {loss.item():.3f} after 150 steps")


# What is refused


@pytest.mark.parametrize("shape", [(4, 2, 12, 16), (4, 1, 12, 20), (2, 12, 20), (4, 2, 20, 12)])
def test_images_of_another_shape_are_refused_in_one_line(shape):
    with pytest.raises(ShapeError, match=r"takes \(B, .*2, 12, 20") as refused:
        build(config("relu_general"))(torch.zeros(shape))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("variant", "settings", "said"),
    [
        ("softmax", {"patch": 5}, "patch 5 does not divide the 12 x 20 image"),
        ("softmax", {"heads": 5}, "heads 5 does not divide width 24"),
        ("softmax", {"width": 42, "heads": 3, "position": "sincos2d"}, "sincos2d needs a width that 4 divides, not 42"),
        ("relu_rope", {"heads": 4}, "rope needs 4 to divide the head size, got 6"),
        ("favor_circulant", {"heads": 12}, "circulant needs blocks of 3 or more"),
        ("softmax", {"dropout": 1.0}, "dropout: 1.0 given"),
        ("softmax", {"depth": 0}, "depth: 0 given"),
        ("softmax", {"heads": -3}, "heads: -3 given"),
        ("softmax", {"poolng": "cls"}, "poolng: unknown key; did you mean pooling"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused_in_one_line(variant, settings, said):
    with pytest.raises(ConfigError) as refused:
        config(variant, **settings)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
