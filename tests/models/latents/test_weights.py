"""Weights change as said, on the layers named, and come back bit for bit."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from app.errors import UsageError
from app.models.latents.weights import (
    Interpolate,
    Manipulator,
    Noise,
    Prune,
    Quantise,
    Scale,
    changed,
    parse,
)
from tests.models.latents.small import CODECS, clip, codec, decoded, encoded

CHANGES = [
    Scale(factor=1.5),
    Noise(strength=0.3, seed=4),
    Prune(share=0.5),
    Quantise(bits=3),
    Interpolate(amount=0.25),
]


def network(dtype=torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3, bias=False)).to(dtype)


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def after(change, values):
    module = nn.Module()
    module.w = nn.Parameter(torch.tensor(values))
    other = {"w": torch.ones(len(values))}
    Manipulator(module, {"other": other}).apply(change)
    return module.w.tolist()


@pytest.mark.parametrize(
    ("change", "before", "expected"),
    [
        (Scale(factor=-2), [1.0, -3.0], [-2.0, 6.0]),
        (Noise(strength=0), [1.0, -3.0], [1.0, -3.0]),
        (Prune(share=0.5), [1.0, -3.0, 0.5, 2.0], [0.0, -3.0, 0.0, 2.0]),
        (Prune(share=0.5), [1.0, -1.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]),
        (Prune(share=1), [1.0, -3.0], [0.0, 0.0]),
        (Prune(share=0), [1.0, -3.0], [1.0, -3.0]),
        # Three bits: -3 to 3 steps of 1, the largest magnitude over 3.
        (Quantise(bits=3), [3.0, -1.4, 0.6, 0.2], [3.0, -1.0, 1.0, 0.0]),
        (Quantise(bits=2), [3.0, -1.4, 1.6, 0.2], [3.0, 0.0, 3.0, 0.0]),
        (Quantise(bits=1), [3.0, -1.0, 1.0, -3.0], [2.0, -2.0, 2.0, -2.0]),
        (Quantise(bits=4), [0.0, 0.0], [0.0, 0.0]),
        (Interpolate(amount=0.25), [1.0, -3.0], [1.0, -2.0]),
        (Interpolate(amount=1), [5.0, -3.0], [1.0, 1.0]),
    ],
    ids=str,
)
def test_by_hand(change, before, expected):
    assert after(change, before) == expected


def test_noise_is_relative_and_seeded():
    module = nn.Linear(400, 100, bias=False)
    old = module.weight.detach().clone()
    with changed(module, [Noise(strength=0.3, seed=4)]):
        drawn = (module.weight - old).detach()
        assert (drawn.std() / old.square().mean().sqrt()).item() == pytest.approx(0.3, rel=0.02)
        assert abs(drawn.mean().item()) < 0.01 * old.std().item()
    with changed(module, [Noise(strength=0.3, seed=4, layers=("weight",))]):
        assert torch.equal(module.weight - old, drawn)
    with changed(module, [Noise(strength=0.3, seed=5)]):
        assert not torch.equal(module.weight - old, drawn)


def test_quantised_weights_have_so_many_levels():
    module = nn.Linear(100, 100, bias=False)
    old = module.weight.detach().clone()
    for bits in (1, 2, 3, 5, 8):
        with changed(module, [Quantise(bits=bits)]):
            assert module.weight.unique().numel() <= 2**bits
            if bits > 1:
                step = old.abs().max() / (2 ** (bits - 1) - 1)
                assert (module.weight - old).abs().max() <= 0.5001 * step


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_change_is_taken_back(dtype):
    module = network(dtype)
    before, other = state(module), {"other": state(network(dtype))}
    manipulator = Manipulator(module, other)
    states = []
    for change in CHANGES:
        states.append(state(module))
        manipulator.apply(change)
    for expected in reversed(states):
        manipulator.undo()
        assert same(state(module), expected)
    manipulator.undo()  # nothing is left
    for change in CHANGES:
        manipulator.apply(change)
    manipulator.restore()
    assert same(state(module), before)


def test_restored_after_an_error_too():
    module = network()
    before = state(module)
    with (
        pytest.raises(UsageError, match="fits the pattern"),
        changed(module, [CHANGES[0], Scale(factor=2, layers=("x",))]),
    ):
        raise AssertionError("must not be reached")
    assert same(state(module), before)
    with pytest.raises(ZeroDivisionError), changed(module, CHANGES[:2]) as touched:
        assert not same(state(module), before) and len(touched) == 2
        raise ZeroDivisionError
    assert same(state(module), before)


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ("*", ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight"]),
        ("2", ["2.weight"]),
        ("[01].weight", ["0.weight", "1.weight"]),
        (["2.*", "0"], ["0.weight", "0.bias", "2.weight"]),
        (["*.bias"], ["0.bias", "1.bias"]),
    ],
)
def test_layers(patterns, names):
    module = network()
    before = state(module)
    with changed(module, [Scale(factor=2, layers=patterns)]) as touched:
        assert touched == [names]
        assert [
            name for name, tensor in module.named_parameters() if not torch.equal(tensor, before[name])
        ] == [name for name in names if before[name].any()]


def test_changes_compose_in_order():
    assert after(Scale(factor=2), [1.0]) == [2.0]
    module = nn.Module()
    module.w = nn.Parameter(torch.tensor([1.0]))
    with changed(module, [Scale(factor=3), Interpolate(amount=0.5)], {"other": {"w": torch.ones(1)}}):
        assert module.w.item() == 2
    with changed(module, [Interpolate(amount=0.5), Scale(factor=3)], {"other": {"w": torch.ones(1)}}):
        assert module.w.item() == 3


@pytest.mark.parametrize("name", CODECS)
def test_a_codec_changes_and_comes_back(name):
    own = codec(name)
    x = clip(own.facts.frames_for(2))
    z, y = encoded(own, x), decoded(own, encoded(own, x))
    other = {"b": {key: value.flip(0) for key, value in own.module.state_dict().items()}}
    with changed(own.module, [Noise(layers=("decoder",), strength=0.5)]):
        assert torch.equal(encoded(own, x), z) and not torch.equal(decoded(own, z), y)
    with changed(own.module, [Interpolate(layers=("decoder.*",), amount=0.5, other="b")], other):
        assert not torch.equal(decoded(own, z), y)
    assert torch.equal(encoded(own, x), z) and torch.equal(decoded(own, z), y)


def test_descriptions_travel():
    described = [change.to_dict() for change in CHANGES]
    assert parse(described) == tuple(CHANGES)
    assert parse([{"kind": "scale", "factor": 2, "layers": "decoder.*"}]) == (
        Scale(factor=2, layers=("decoder.*",)),
    )
    assert parse([]) == ()


def test_reading_descriptions_needs_no_torch():
    code = (
        "import sys; from app.models.latents import codec, parts, weights; "
        "weights.parse([{'kind': 'prune', 'share': 0.5}]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("scale", "expected an object whose kind is one of scale, noise"),
        ({}, "expected an object"),
        ({"kind": "melt"}, "expected an object"),
        ({"kind": ["scale"]}, "expected an object"),
        ({"kind": "scale"}, "lacks factor"),
        ({"kind": "scale", "factor": 1, "x": 2}, "unknown field 'x'"),
        ({"kind": "scale", "factor": "2"}, "expected a number from -100 to 100"),
        ({"kind": "scale", "factor": True}, "factor"),
        ({"kind": "scale", "factor": math.nan}, "factor"),
        ({"kind": "scale", "factor": 101}, "factor"),
        ({"kind": "noise", "strength": -0.1}, "strength"),
        ({"kind": "noise", "strength": 1, "seed": 1.5}, "seed"),
        ({"kind": "noise", "strength": 1, "seed": -1}, "seed"),
        ({"kind": "prune", "share": 1.01}, "expected a number from 0 to 1"),
        ({"kind": "quantise", "bits": 0}, "expected a whole number from 1 to 16"),
        ({"kind": "quantise", "bits": 8.0}, "bits"),
        ({"kind": "interpolate", "amount": 2}, "amount"),
        ({"kind": "interpolate", "amount": 1, "other": ""}, "other"),
        ({"kind": "interpolate", "amount": 1, "other": 3}, "other"),
        ({"kind": "prune", "share": 1, "layers": []}, "layers"),
        ({"kind": "prune", "share": 1, "layers": [""]}, "layers"),
        ({"kind": "prune", "share": 1, "layers": [1]}, "layers"),
        ({"kind": "prune", "share": 1, "layers": None}, "layers"),
    ],
    ids=str,
)
def test_refuses_wrong_descriptions(change, words):
    with pytest.raises(UsageError) as caught:
        parse([change])
    assert caught.value.code == "weights_invalid" and words in caught.value.message


@pytest.mark.parametrize("changes", [None, "scale", {"kind": "scale"}, [{"kind": "prune", "share": 0}] * 65])
def test_refuses_what_is_no_list(changes):
    with pytest.raises(UsageError, match="expected a list of at most 64"):
        parse(changes)


def test_refuses_layers_and_models_that_are_not_there():
    module = network()
    before, manipulator = state(module), Manipulator(module, {"b": {"0.weight": torch.zeros(2, 2)}})
    for change, code, words in [
        (Scale(factor=2, layers=("0.wieght",)), "weights_layer_unknown", "such as 0.weight"),
        (Scale(factor=2, layers=("0", "9")), "weights_layer_unknown", "'9'"),
        (Interpolate(amount=1, other="c"), "weights_other_unknown", "given are: b"),
        (Interpolate(amount=1, other="b"), "weights_other_differs", "is (2, 2); expected (7, 5)"),
        (Interpolate(amount=1, other="b", layers=("0.bias",)), "weights_other_differs", "is missing"),
    ]:
        with pytest.raises(UsageError) as caught:
            manipulator.apply(change)
        assert caught.value.code == code and words in caught.value.message
    assert same(state(module), before)
