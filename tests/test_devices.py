"""Every pipeline from its files on a card that is not there: see `card.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from app.boot.manifest import Format
from app.device import place
from app.errors import ConfigError, UnavailableError
from app.memory import KERNELS
from app.models.latents.autoencode import Session
from app.models.latents.codec import Codec
from app.models.latents.edit_request import Noise, Smooth
from app.models.latents.load import load_sd_codec, load_seedvr2_codec, load_vqvae_codec, load_wan_codec
from app.models.latents.pixels import to_bytes
from app.models.latents.weights import parse as parse_changes
from app.models.seedvr2.load import load_restorer
from app.models.seedvr2.restore import RestoreOptions, Restorer
from app.models.source import Loading, Source
from app.models.wan.generate import Generator, Guide
from app.models.wan.load import load_generator
from app.progress import Silent
from tests import seeded
from tests.card import card, on_card
from tests.models.nano import moving
from tests.models.wan import nano
from tests.models.wan.nano import SIZE, at_once, clip, options

DTYPES = ("float32", "bfloat16", "float16")


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with card(monkeypatch):
        yield


@pytest.mark.usefixtures("there")
def test_the_card_refuses_what_a_card_refuses() -> None:
    here, x = torch.ones(2, 4), torch.ones(2, 4, device="cuda")
    halves = x.half()
    refused = [
        lambda: x + here,
        lambda: torch.cat([x, here]),
        lambda: x.numpy(),
        lambda: here[torch.zeros(1, dtype=torch.int64, device="cuda")],
        lambda: F.linear(halves, x),
        lambda: F.layer_norm(halves, (4,), x[0]),
        lambda: torch.randn(2, generator=torch.Generator(), device="cuda"),
    ]
    for number, wrong in enumerate(refused):
        with pytest.raises((RuntimeError, TypeError, AssertionError)):
            pytest.fail(f"{number} passed: {wrong()}")
    x[0] = here[0]
    x[1].copy_(here[1])
    moved = torch.nn.Linear(4, 4).to("cuda")
    assert moved(x * torch.tensor(2.0)).is_cuda and not moved.to("cpu")(here).is_cuda
    assert x.cpu().numpy().shape == (2, 4) and x.sum().item() == 8


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_float32_on_the_card_is_float32(dtype: str) -> None:
    torch.backends.cudnn.allow_tf32 = True
    assert place("cuda", dtype).device.type == "cuda"
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_a_card_with_an_old_driver_is_not_passed_over(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 12040). Please update it."
        )

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # the driver's own count
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(UnavailableError, match=r"too old \(found version 12040\); use a machine") as caught:
        place(device, "auto")
    assert caught.value.code == "device_unavailable"


def test_metal_has_no_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="which Metal does not have") as caught:
        place("mps", "float8")
    assert caught.value.code == "float8_unavailable"


def seedvr2(volume: Path, dtype: str) -> Restorer:
    folder = volume / "nano/seedvr2"
    names = {
        "dit": "seedvr2_ema_nano.pth",
        "vae": "ema_vae.pth",
        "positive": "pos_emb.pt",
        "negative": "neg_emb.pt",
    }
    files = {part: Source(folder / name, "torch", folder / name) for part, name in names.items()}
    return load_restorer("nano", files, Loading(place("cuda", dtype), 2, Silent()))


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize(
    ("dtype", "color"), [("bfloat16", "lab"), ("float16", "wavelet"), ("float32", "adain")]
)
def test_restore(nano_volume: Path, dtype: str, color: str) -> None:
    restorer = seedvr2(nano_volume, dtype)
    assert restorer.device.type == "cuda" and all(on_card(p) for p in restorer.dit.parameters())
    asked = RestoreOptions(
        height=48,
        width=64,
        window=6,
        color=color,
        guidance=2.0,
        rescale=0.5,
        condition_noise=0.1,
        steps=2,
        fit="crop" if color == "adain" else "pad",
    )
    with torch.inference_mode():
        frames = torch.cat(list(restorer.restore_shot(iter(moving(26)), 26, asked)))
    assert not on_card(frames) and frames.dtype == torch.float32 and frames.isfinite().all()


def wan(volume: Path, dtype: str, variant: str = "nano", **loading: Any) -> Generator:
    spot = place("cuda", dtype)
    return load_generator(variant, nano.sources(volume), Loading(spot, 2, Silent(), eager=True, **loading))


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("dtype", DTYPES)
def test_generate(wan_volume: Path, dtype: str) -> None:
    """Poses, prompts that change, guidance; T5 goes to the host and comes back; other weights; a start."""
    made = wan(wan_volume, dtype)
    poses = torch.full((21, 3, *SIZE), 128, dtype=torch.uint8)
    frames = clip(made, options(21, guidance=3.0, prompts={0: "a cat", 12: "a dog"}), Guide(poses=poses))
    assert on_card(frames) and frames.isfinite().all()
    made.text.offload()
    assert made.text.nbytes == 0
    begun = options(13, "image", prompts={0: "another"}, section="generator", seed=2)
    assert clip(made, begun, Guide(start=torch.zeros(1, 3, *SIZE))).isfinite().all()
    assert made.text.nbytes > 0


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("stays", ["auto", "host", "release"])
def test_t5_makes_room_even_in_inference_mode(
    wan_volume: Path, stays: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = wan(wan_volume, "bfloat16", text_encoder=stays)
    assert made.stays[-1] == {"auto": "nowhere", "host": "host", "release": "nowhere"}[stays]
    for prompt in ("a cat", "a dog"):
        asked = options(9, prompts={0: prompt}, text="host" if stays == "auto" else None)
        assert made.task(asked).reads
        with torch.inference_mode():
            clip(made, asked)
        assert made.text.nbytes == 0 and made.text.knows(prompt)
        assert made.text.loaded == (stays != "release")


@pytest.mark.usefixtures("there")
def test_t5_computes_on_the_host_where_the_card_has_no_room_for_it(
    wan_volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = clip(wan(wan_volume, "bfloat16"), options(9))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (KERNELS, 80 << 30))
    made = wan(wan_volume, "bfloat16")
    assert made.text.device.type == "cpu" and made.stays == ("host", "nowhere")
    frames = clip(made, options(9))
    assert on_card(frames) and (frames.float() - usual.float()).abs().max() < 0.02  # in 16 bits
    assert made.text.nbytes_on("cuda") == 0 < made.text.nbytes_on("cpu") == made.text.weights


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize(("dtype", "variant"), [("bfloat16", "nano"), ("float16", "nano-many")])
def test_generate_from_an_image(wan_volume: Path, tmp_path: Path, dtype: str, variant: str) -> None:
    pytest.importorskip("transformers")
    files = nano.sources(wan_volume, transformer=nano.image_transformer(tmp_path / "i2v.pt"))
    made = load_generator(variant, files, Loading(place("cuda", dtype), 2, Silent()))
    poses = torch.full((9, 3, *SIZE), 128, dtype=torch.uint8)
    guide = Guide(start=torch.zeros(1, 3, *SIZE), poses=poses, reference=poses[0])
    asked = options(9) if variant == "nano" else at_once(9, steps=2, guidance=2.0)
    assert clip(made, asked, guide).isfinite().all()


def codec(name: str, folder: Path, dtype: str) -> Codec:
    loading = Loading(place("cuda", dtype), 2, Silent())
    load, parts = {
        "seedvr2": (load_seedvr2_codec, {"vae": "seedvr2/ema_vae.pth"}),
        "wan": (load_wan_codec, {"vae": "wan/Wan_VAE.pth"}),
        "vqvae": (load_vqvae_codec, {"vae": "latents/vqvae.safetensors"}),
        "sd": (
            load_sd_codec,
            {
                "vae": "latents/sd-vae/diffusion_pytorch_model.safetensors",
                "config": "latents/sd-vae/config.json",
            },
        ),
    }[name]
    formats: dict[str, Format] = {".pth": "torch", ".json": "data", ".safetensors": "safetensors"}
    paths = {part: folder / "nano" / file for part, file in parts.items()}
    return load(
        "nano", {part: Source(path, formats[path.suffix], path) for part, path in paths.items()}, loading
    )


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("name", ["seedvr2", "wan", "vqvae", "sd"])
def test_autoencode(latents_volume: Path, tmp_path: Path, name: str) -> None:
    """A clip through each codec and back, edited; the changed weights are a copy on the card, too."""
    if name == "sd":
        pytest.importorskip("diffusers")
    used = codec(name, latents_volume, "bfloat16")
    assert all(on_card(parameter) for parameter in used.module.parameters())
    frames = seeded.randn("devices/clip", 5, 3, 20, 24).clamp(-1, 1)
    session = Session(used, lambda: iter(frames.split(4)), (20, 24), tmp_path)
    edits = [Noise(kind="noise", strength=0.1), Smooth(kind="smooth", sigma=1)]
    changes = parse_changes([{"kind": "noise", "strength": 0.01, "layers": ["decoder*"]}])
    made = list(session.moments(session.latents(edits, changes)))
    assert len(made) == 5
    for moment in made:
        assert moment.edited is not None
        assert (
            to_bytes(moment.edited[None]).shape
            == to_bytes(moment.reconstructed[None]).shape
            == (1, 20, 24, 3)
        )
