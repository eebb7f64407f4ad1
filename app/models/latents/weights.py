"""What happens to a codec when its weights change: scale, noise, prune, quantise, interpolate; and restore.

    changes = parse([{"kind": "noise", "layers": ["decoder.*"], "strength": 0.1, "seed": 7}])
    with changed(codec.module, changes):
        ...                                  # encode, decode
    # every weight is what it was, bit for bit

or step by step: `Manipulator(module)`, then `apply`, `undo` and `restore`. Descriptions are plain
dataclasses, so that a request can carry them; reading and checking them needs no torch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar, Final

from app.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

MOST_CHANGES: Final = 64
_WHOLE = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Change:
    """One change of the weights whose names fit a shell pattern of `layers`.

    A pattern fits a tensor ("decoder.conv_out.weight"), or a layer that holds it ("decoder.*", "encoder").
    """

    kind: ClassVar[str]
    bounds: ClassVar[Mapping[str, tuple[float, float]]] = {}

    layers: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        if isinstance(self.layers, str):
            object.__setattr__(self, "layers", (self.layers,))
        if (
            not isinstance(self.layers, list | tuple)
            or not self.layers
            or not all(isinstance(pattern, str) and pattern for pattern in self.layers)
        ):
            raise self._wrong("layers", self.layers, 'a list of patterns such as "decoder.*"')
        object.__setattr__(self, "layers", tuple(self.layers))
        for name, (least, most) in self.bounds.items():
            value = getattr(self, name)
            whole = type(self).__dataclass_fields__[name].type == "int"
            fine = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
            if not fine or not math.isfinite(value) or not least <= value <= most:
                kind = "a whole number" if whole else "a number"
                raise self._wrong(name, value, f"{kind} from {least:g} to {most:g}")

    def to_dict(self) -> dict[str, Any]:
        """As `parse` reads it."""
        return {"kind": self.kind, **asdict(self), "layers": list(self.layers)}

    def _wrong(self, name: str, value: object, expected: str) -> UsageError:
        return UsageError(
            "weights_invalid",
            f"{name} of the change of weights {self.kind!r} is {value!r}; expected {expected}.",
        )


@dataclass(frozen=True, kw_only=True)
class Scale(Change):
    """Times `factor`."""

    kind = "scale"
    bounds: ClassVar = {"factor": (-100, 100)}
    factor: float


@dataclass(frozen=True, kw_only=True)
class Noise(Change):
    """Plus Gaussian noise of `strength` times each tensor's own root mean square.

    Drawn from the seed and the tensor's name: the same on every device, whichever other layers are named.
    """

    kind = "noise"
    bounds: ClassVar = {"strength": (0, 100), "seed": (0, _WHOLE)}
    strength: float
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Prune(Change):
    """The `share` of each tensor's numbers that are smallest in magnitude become 0."""

    kind = "prune"
    bounds: ClassVar = {"share": (0, 1)}
    share: float


@dataclass(frozen=True, kw_only=True)
class Quantise(Change):
    """Each tensor rounded to 2**bits - 1 levels, evenly spread between plus and minus its largest magnitude;
    for 1 bit to plus and minus its mean magnitude (XNOR-Net, arXiv:1603.05279)."""

    kind = "quantise"
    bounds: ClassVar = {"bits": (1, 16)}
    bits: int


@dataclass(frozen=True, kw_only=True)
class Interpolate(Change):
    """(1 - amount) times these weights plus `amount` times those of the checkpoint called `other`."""

    kind = "interpolate"
    bounds: ClassVar = {"amount": (0, 1)}
    amount: float
    other: str = field(default="other")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.other, str) or not self.other:
            raise self._wrong("other", self.other, "the name of a second model")


KINDS: Final[Mapping[str, type[Change]]] = {
    kind.kind: kind for kind in (Scale, Noise, Prune, Quantise, Interpolate)
}


def parse(changes: object) -> tuple[Change, ...]:
    """Changes from a request: a list of objects, each with a `kind` and that kind's fields. Torch-free.

    Raises:
        UsageError: `weights_invalid`: not a list, an unknown kind or field, one missing, or out of range.
    """
    if not isinstance(changes, list | tuple) or len(changes) > MOST_CHANGES:
        shown = f"{len(changes)} long" if isinstance(changes, list | tuple) else repr(changes)[:80]
        raise UsageError(
            "weights_invalid", f"weights is {shown}; expected a list of at most {MOST_CHANGES} changes."
        )
    return tuple(_parse(change) for change in changes)


def _parse(change: object) -> Change:
    kind = change.get("kind") if isinstance(change, Mapping) else None
    if not isinstance(change, Mapping) or not isinstance(kind, str) or kind not in KINDS:
        raise UsageError(
            "weights_invalid",
            f"A change of weights is {repr(change)[:120]}; expected an object whose kind is one of "
            f"{', '.join(KINDS)}.",
        )
    known = {each.name: each for each in fields(KINDS[kind])}
    given = {key: value for key, value in change.items() if key != "kind"}
    for name in given:
        if name not in known:
            raise UsageError(
                "weights_invalid",
                f"The change of weights {kind!r} has the unknown field {str(name)[:80]!r}; expected "
                f"{', '.join(known)}.",
            )
    for name, each in known.items():
        if each.default is MISSING and name not in given:
            raise UsageError("weights_invalid", f"The change of weights {kind!r} lacks {name}; add it.")
    return KINDS[kind](**given)


class Manipulator:
    """Changes a module's weights in place, and remembers what they were: every change can be taken back.

    What it remembers is on the CPU, only of tensors that were changed. Buffers are left alone.
    """

    def __init__(self, module: nn.Module, others: Mapping[str, Mapping[str, Tensor]] | None = None) -> None:
        """others: state dicts of other models of the same shape, by the names that `Interpolate` gives."""
        self._weights: dict[str, Tensor] = dict(module.named_parameters())
        self._others = others or {}
        self._past: list[dict[str, Tensor]] = []

    def names(self, patterns: Sequence[str]) -> list[str]:
        """The weights that fit one of `patterns`, in the module's order.

        Raises:
            UsageError: `weights_layer_unknown`: a pattern fits none.
        """
        chosen: set[str] = set()
        for pattern in patterns:
            found = {name for name in self._weights if _fits(name, pattern)}
            if not found:
                near = get_close_matches(pattern, [*self._weights, *_layers(self._weights)], 3, 0.3)
                raise UsageError(
                    "weights_layer_unknown",
                    f"No weight fits the pattern {pattern!r}; expected a layer's name or a shell pattern"
                    f"{', such as ' + ', '.join(near) if near else ''}.",
                )
            chosen |= found
        return [name for name in self._weights if name in chosen]

    def apply(self, change: Change) -> list[str]:
        """Change the weights; gives the names of those that were. All of them or, after an error, none.

        Raises:
            UsageError: `weights_layer_unknown`, `weights_other_unknown` or `weights_other_differs`.
        """
        import torch

        names = self.names(change.layers)
        other = self._other(change, names) if isinstance(change, Interpolate) else {}
        with torch.no_grad():
            self._past.append({name: self._weights[name].detach().to("cpu", copy=True) for name in names})
            for name in names:
                weight = self._weights[name]
                # In float32 on the CPU: the same numbers on every device, in every type.
                old = self._past[-1][name].float()
                weight.copy_(_changed(change, name, old, other.get(name)))
        return names

    def undo(self) -> None:
        """Take back the last change, bit for bit; nothing where there is none."""
        import torch

        if self._past:
            with torch.no_grad():
                for name, old in self._past.pop().items():
                    self._weights[name].copy_(old)

    def restore(self) -> None:
        """Take back every change."""
        while self._past:
            self.undo()

    def _other(self, change: Interpolate, names: Sequence[str]) -> dict[str, Tensor]:
        if change.other not in self._others:
            known = ", ".join(self._others) or "none"
            raise UsageError(
                "weights_other_unknown",
                f"Weights are to be interpolated with {change.other!r}; those given are: {known}.",
            )
        other = self._others[change.other]
        for name in names:
            shape, own = tuple(other[name].shape) if name in other else None, tuple(self._weights[name].shape)
            if shape != own:
                held = "is missing" if shape is None else f"is {shape}"
                raise UsageError(
                    "weights_other_differs",
                    f"{name} of the second model {change.other!r} {held}; expected {own}: only models of one "
                    "shape can be interpolated.",
                )
        return {name: other[name] for name in names}


@contextmanager
def changed(
    module: nn.Module, changes: Sequence[Change], others: Mapping[str, Mapping[str, Tensor]] | None = None
) -> Iterator[list[list[str]]]:
    """`module` with these changes in order, one upon the other, and afterwards exactly as it was. Gives the
    names of the weights that each change touched. Raises as `Manipulator.apply`."""
    manipulator = Manipulator(module, others)
    try:
        yield [manipulator.apply(change) for change in changes]
    finally:
        manipulator.restore()


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _layers(names: Mapping[str, object]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names if "." in name))


def _changed(change: Change, name: str, old: Tensor, other: Tensor | None) -> Tensor:
    """What `old`, float32 on the CPU, becomes."""
    if isinstance(change, Scale):
        return old * change.factor
    if isinstance(change, Noise):
        return old + _noise(name, old, change.seed) * (change.strength * old.square().mean().sqrt())
    if isinstance(change, Prune):
        return _pruned(old, change.share)
    if isinstance(change, Quantise):
        return _quantised(old, change.bits)
    assert isinstance(change, Interpolate) and other is not None
    return old.lerp(other.detach().to("cpu", old.dtype), change.amount)


def _noise(name: str, like: Tensor, seed: int) -> Tensor:
    import torch

    # A hash of both: torch's generator heeds only the lowest 32 bits of its seed.
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    drawn = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
    return torch.randn(like.shape, generator=drawn)


def _pruned(old: Tensor, share: float) -> Tensor:
    """Exactly round(share * n) zeros more; of equal magnitudes the first are taken."""
    flat = old.flatten().clone()
    smallest = flat.abs().argsort(stable=True)[: round(share * flat.numel())]
    flat[smallest] = 0
    return flat.view_as(old)


def _quantised(old: Tensor, bits: int) -> Tensor:
    if bits == 1:
        return old.sign() * old.abs().mean()
    step = old.abs().amax() / (2 ** (bits - 1) - 1)
    return (old / step).round() * step if step else old
