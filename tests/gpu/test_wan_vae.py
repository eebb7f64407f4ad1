"""Wan's VAE on a CUDA card: `python -m pytest -m gpu -s`. Random weights are enough."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import pytest
import torch

from app.models.wan.vae import WanVAE
from app.models.wan.vae_config import VAEConfig, decode_bytes, encode_bytes
from tests import seeded
from tests.golden import draw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="NO CUDA CARD HERE: nothing of the GPU path is tested"
    ),
]


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 6e-2)]
)
@torch.inference_mode()
def test_the_card_gives_the_cpus_numbers(dtype: torch.dtype, bound: float) -> None:
    here = draw(WanVAE(VAEConfig.nano()), "gpu/")
    there = copy.deepcopy(here).to("cuda", dtype)
    x = seeded.randn("gpu/clip", 1, 3, 17, 64, 96).clamp(-1, 1)
    torch.backends.cudnn.allow_tf32 = False  # as app.device does where float32 was asked for
    z = here.encode(x)
    assert error(there.encode(x.cuda()), z) < bound
    assert error(there.decode(z.cuda()), here.decode(z)) < bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.inference_mode()
def test_blocks_equal_the_whole_in_sixteen_bits(dtype: torch.dtype) -> None:
    vae = draw(WanVAE(VAEConfig.nano()), "gpu/").to("cuda", dtype)
    x = seeded.randn("gpu/clip", 1, 3, 17, 64, 96).clamp(-1, 1).cuda()
    z = vae.encode(x)
    assert error(torch.cat(list(vae.encode_stream([x])), 2), z) < 2e-2
    assert error(torch.cat(list(vae.decode_stream([z])), 2), vae.decode(z)) < 2e-2


def error(out: torch.Tensor, reference: torch.Tensor) -> float:
    assert out.shape == reference.shape
    return float((out.float() - reference.to(out.device).float()).norm() / reference.float().norm())


@pytest.mark.parametrize(("height", "width"), [(480, 832), (720, 1280)])
@torch.inference_mode()
def test_time_and_memory_of_the_published_size(
    height: int, width: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """21 latents, 81 frames: decoded in blocks of three as they come, and encoded; beside diffusers', which
    goes latent by latent too, where it is installed."""
    config = VAEConfig.published()
    with torch.device("cuda"):
        vae = WanVAE(config)
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    vae.half()
    x = torch.rand(1, 3, 81, height, width, device="cuda", dtype=torch.float16) * 2 - 1
    z = torch.randn(1, 16, 21, height // 8, width // 8, device="cuda")
    sentences = [f"{torch.cuda.get_device_name()}, {width}x{height}, 81 frames, float16"]
    for name, run, estimate in (
        ("decode", lambda: [None for _ in vae.decode_stream(z.split(3, 2))], decode_bytes),
        ("encode", lambda: [None for _ in vae.encode_stream([x])], encode_bytes),
    ):
        seconds, most = measured(run)
        expected = estimate(config, height, width)
        sentences.append(
            f"{name}: {seconds:.2f} s, {81 / seconds:.0f} frames/s; {most / 2**30:.2f} GiB, "
            f"estimated {expected / 2**30:.2f}"
        )
        assert most < 2 * expected + 2**30  # and cuDNN's workspace
    if (theirs := _diffusers()) is not None:
        seconds, most = measured(lambda: theirs.decode(z.half()))
        sentences.append(f"diffusers' decode: {seconds:.2f} s; {most / 2**30:.2f} GiB")
    with capsys.disabled():
        print("\n" + "\n    ".join(sentences))


def measured(run: Callable[[], object]) -> tuple[float, int]:
    """Seconds of the second run, and the most memory beyond what was there before."""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begin, torch.cuda.max_memory_allocated() - before


def _diffusers() -> torch.nn.Module | None:
    try:
        from diffusers import AutoencoderKLWan
    except ImportError:
        return None
    with torch.device("cuda"):
        return AutoencoderKLWan().half().eval()
