"""The SeedVR2 diffusion transformer, both kinds (Wang et al., 2025, arXiv:2506.05301).

Attribute names are the checkpoints' names, so there is no key map. Video and text run side by side
through windowed joint attention: each window sees its own video tokens and the whole text; the text's
copies are averaged back. The model knows nothing of noise schedules, pixels or files.

Shape legend: T, H, W latent frames, height, width; N video tokens; L text tokens; D model width;
h heads; d head width. Layout of latents: (T, H, W, channels), channels last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from app.models.seedvr2.config import TIME_SINUSOIDS, DiTConfig, branches
from app.models.seedvr2.rope import frequencies, text_rotations, video_rotations
from app.models.seedvr2.steps import PLAIN, Steps, modulate, rms_norm
from app.models.seedvr2.windows import Partition, Run, Size, partition, transitions
from app.nn.linear import Linear
from app.nn.transfer import to_device

Heads = tuple[Tensor, Tensor, Tensor]  # q, k, v


@dataclass(frozen=True)
class Plan:
    """What a forward pass needs of a shape, computed once and shared by all layers and steps.

    Tokens stand in the order of each layer's windows; `moves` takes them from one layer's order to the
    next one's, the first from raster order and the last one back to it (`None`: nothing to move).
    """

    size: Size
    text_length: int
    partitions: tuple[Partition, ...]
    moves: tuple[Tensor | None, ...]
    rotations: dict[Size, Tensor]
    text_rotations: Tensor | None
    steps: Steps

    def moved(self, vid: Tensor, layer: int) -> Tensor:
        """Tokens in the order of the layer before (raster at first) -> in the order of this layer; behind
        the last layer, in raster order."""
        move = self.moves[layer]
        return vid if move is None else vid.index_select(0, move)

    def text_mean(self, windows: Partition) -> TextMean:
        """What collects the text of a layer."""
        return TextMean(windows.count)


class TextMean:
    """The mean over all windows of what the text became in each, summed in the order of the windows."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.total: Tensor | None = None

    def add(self, text: Tensor) -> None:
        """text (L, h d) float32: the sum over the windows of the next group."""
        self.total = text if self.total is None else self.total.add_(text)

    def mean(self) -> Tensor:
        """(L, h d) float32."""
        assert self.total is not None, "there is no window"
        return self.total / self.count


class Branches(nn.ModuleDict):
    """A module for video and one for text, or one for both: `vid` and `txt`, or `all`."""

    def __init__(self, make: Callable[[], nn.Module], names: Sequence[str]) -> None:
        super().__init__({name: make() for name in names})

    @property
    def video(self) -> nn.Module:
        return self["all"] if "all" in self else self["vid"]

    @property
    def text(self) -> nn.Module:
        return self["all"] if "all" in self else self["txt"]


class Scale(nn.Module):
    """The learned scale of an RMS norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class Frequencies(nn.Module):
    """Holds the rotary frequencies where checkpoints store them. Tables are computed from the
    configuration: 16-bit files store these rounded."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.rope = nn.Module()
        self.rope.register_buffer("freqs", torch.empty(config.rope_frequencies))
        if not self.rope.get_buffer("freqs").is_meta:  # arithmetic on meta costs a second of torch's imports
            self.reset_buffers()

    def reset_buffers(self) -> None:
        """Recompute the buffer, on the device it is to live on, after a build on meta."""
        self.rope.register_buffer("freqs", frequencies(self.config))


class Modulation(nn.Module):
    """Learned shift, scale and gate of each slot, added to those of the timestep ("adaptive single")."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        for slot in ("attn", "mlp"):
            for part in ("shift", "scale", "gate"):
                self.register_parameter(f"{slot}_{part}", nn.Parameter(torch.zeros(dim)))

    def forward(self, slot: str, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """time (3, D): the timestep's shift, scale, gate of this slot. Returns the three sums, (D,)."""
        shift, scale, gate = (
            time[i] + self.get_parameter(f"{slot}_{part}")
            for i, part in enumerate(("shift", "scale", "gate"))
        )
        return shift, scale, gate


class SwiGLU(nn.Module):
    """Gated MLP (Shazeer, 2020, arXiv:2002.05202)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj_in_gate = Linear(dim, hidden, bias=False)
        self.proj_out = Linear(hidden, dim, bias=False)
        self.proj_in = Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor, steps: Steps) -> Tensor:
        out: Tensor = self.proj_out(steps.gated(self.proj_in_gate(x), self.proj_in(x)))
        return out


class MLP(nn.Module):
    """MLP with the tanh approximation of GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj_in = Linear(dim, hidden)
        self.proj_out = Linear(hidden, dim)

    def forward(self, x: Tensor, steps: Steps) -> Tensor:
        out: Tensor = self.proj_out(F.gelu(self.proj_in(x), approximate="tanh"))
        return out


class TimeEmbedding(nn.Module):
    """Sinusoids of the timestep, then three linear layers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj_in = Linear(TIME_SINUSOIDS, dim)
        self.proj_hid = Linear(dim, dim)
        self.proj_out = Linear(dim, 6 * dim)

    def forward(self, timestep: float) -> Tensor:
        """Returns (2, 3, D): for each slot (attention, MLP) its shift, scale and gate."""
        weight = self.proj_in.weight
        half = TIME_SINUSOIDS // 2
        rates = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32))
        angles = timestep * rates
        x = to_device(torch.cat([angles.sin(), angles.cos()]), weight.device).to(weight.dtype)
        x = F.silu(self.proj_in(x))
        x = F.silu(self.proj_hid(x))
        # The original lays the six vectors out as (D, slot, part).
        six: Tensor = self.proj_out(x)
        return six.view(-1, 2, 3).permute(1, 2, 0).contiguous()


class Attention(nn.Module):
    """Joint attention of each window's video tokens and the text, over windows of a partition."""

    def __init__(self, config: DiTConfig, layer: int) -> None:
        super().__init__()
        names = branches(config, layer)
        dim, inner = config.dim, config.inner_dim
        self.config = config
        self.text_leaves = layer < config.layers - 1  # nothing reads the text after the last layer
        self.proj_qkv = Branches(lambda: Linear(dim, 3 * inner, bias=config.qk_bias), names)
        self.proj_out = Branches(lambda: Linear(inner, dim), names)
        self.norm_q = Branches(lambda: Scale(config.head_dim), names)
        self.norm_k = Branches(lambda: Scale(config.head_dim), names)
        self.rope = Frequencies(config)

    def text_heads(self, txt: Tensor, plan: Plan) -> Heads:
        """txt (L, D) -> its q, k, v, the same for every window: (h, L, d)."""
        scale = self._scale(self.norm_q.text, self.norm_k.text)
        return self._heads(self._split(self.proj_qkv.text(txt)), scale, plan.text_rotations, PLAIN)

    def forward(self, vid: Tensor, txt: Heads, plan: Plan, run: Run, texts: TextMean) -> Tensor:
        """vid (tokens of a run of windows, D). Returns it projected, and adds what the text became in each
        window to texts, except in the last layer."""
        qkv = self._split(self.proj_qkv.video(vid))
        scale = self._scale(self.norm_q.video, self.norm_k.video)
        out = vid.new_empty(len(vid), self.config.inner_dim)
        stop = 0
        for group in run:
            start, stop = stop, stop + group.tokens
            windows = qkv[start:stop].view(group.count, group.length, *qkv.shape[1:])
            heads = self._heads(windows, scale, plan.rotations[group.shape], plan.steps)
            mixed = self._attend(heads, txt)
            out[start:stop] = mixed[:, : group.length].flatten(0, 1)
            if self.text_leaves:
                texts.add(mixed[:, group.length :].sum(0, dtype=torch.float32))
        projected: Tensor = self.proj_out.video(out)
        return projected

    def _attend(self, vid: Heads, txt: Heads) -> Tensor:
        """Windows (count, h, length, d) and text (h, L, d) -> (count, length + L, h d); without the text's
        part where nothing reads it."""
        q, k, v = (torch.cat([x, t.expand(len(x), *t.shape)], dim=2) for x, t in zip(vid, txt, strict=True))
        if not self.text_leaves:
            q = vid[0]
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def _scale(self, norm_q: nn.Module, norm_k: nn.Module) -> Tensor:
        """The norms' scales side by side, (2, 1, d)."""
        return torch.stack([norm.get_parameter("weight") for norm in (norm_q, norm_k)]).unsqueeze(1)

    def _split(self, qkv: Tensor) -> Tensor:
        return qkv.view(-1, 3, self.config.heads, self.config.head_dim)

    def _heads(self, qkv: Tensor, scale: Tensor, rotations: Tensor | None, steps: Steps) -> Heads:
        """qkv (..., length, 3, h, d) -> (..., h, length, d) each; q and k RMS-normed per head and turned."""
        if rotations is None:
            qk = rms_norm(qkv[..., :2, :, :], None, self.config.norm_eps).mul_(scale)
        else:
            qk = steps.turn(qkv[..., :2, :, :], scale, rotations, self.config.norm_eps)
        q, k, v = *qk.unbind(-3), qkv[..., 2, :, :]
        return q.transpose(-3, -2), k.transpose(-3, -2), v.transpose(-3, -2)


class Block(nn.Module):
    """Attention and MLP, each normed and modulated before and gated after, on video and text."""

    def __init__(self, config: DiTConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.text_leaves = layer < config.layers - 1
        self.text_modulated = self.text_leaves or not config.last_video_only
        hidden = SwiGLU if config.mlp == "swiglu" else MLP
        names = branches(config, layer, video_only=not self.text_modulated)
        self.attn = Attention(config, layer)
        self.mlp = Branches(lambda: hidden(config.dim, config.mlp_dim), names)
        self.ada = Branches(lambda: Modulation(config.dim), names)

    def forward(
        self, vid: Tensor, txt: Tensor, time: Tensor, plan: Plan, windows: Partition
    ) -> tuple[Tensor, Tensor]:
        """vid (N, D) in window order, txt (L, D), time (2, 3, D). Updates vid in place.

        Video meets itself only inside windows, so a run of windows goes through the whole block before
        the next one: what a block needs besides vid does not grow with the clip.
        """
        eps, steps = self.config.norm_eps, plan.steps
        if self.text_modulated:
            txt_shift, txt_scale, txt_gate = self.ada.text("attn", time[0])
            txt_in = modulate(txt, txt_scale, txt_shift, eps)
        else:
            txt_in = rms_norm(txt, None, eps)
        txt_heads = self.attn.text_heads(txt_in, plan)
        shift, scale, gate = self.ada.video("attn", time[0])
        mlp_shift, mlp_scale, mlp_gate = self.ada.video("mlp", time[1])
        texts = plan.text_mean(windows)
        for run in windows.runs:
            part = vid[run[0].start : run[-1].stop]
            y = self.attn(steps.modulate(part, scale, shift, eps), txt_heads, plan, run, texts)
            y = steps.add_and_modulate(part, y, gate, mlp_scale, mlp_shift, eps)
            part.addcmul_(self.mlp.video(y, steps), mlp_gate)
            del y  # the next run begins without it
        if self.text_leaves:
            txt_out = self.attn.proj_out.text(texts.mean().to(txt.dtype))
            txt = txt + txt_out * txt_gate
            shift, scale, gate = self.ada.text("mlp", time[1])
            txt.addcmul_(self.mlp.text(modulate(txt, scale, shift, eps), PLAIN), gate)
        return vid, txt


class OutputModulation(nn.Module):
    """Learned shift and scale of the 3B's output, added to the timestep's *attention* slot."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.out_shift = nn.Parameter(torch.zeros(dim))
        self.out_scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (N, D), time (2, 3, D). There is no "1 +" in front of the scale."""
        return x.mul_(time[0, 1] + self.out_scale).add_(time[0, 0] + self.out_shift)


class Projection(nn.Module):
    """The linear layer of a patch embedding."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = Linear(dim_in, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(x)
        return out


class DiT(nn.Module):
    """The transformer. `forward` predicts the velocity noise - clean at a timestep in [0, 1000]."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        patch, dim = config.patch_volume, config.dim
        self.vid_in = Projection(config.in_channels * patch, dim)
        self.txt_in = Linear(config.text_dim, dim) if config.text_dim != dim else nn.Identity()
        self.emb_in = TimeEmbedding(dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        if config.output_norm:
            self.vid_out_norm = Scale(dim)
            self.vid_out_ada = OutputModulation(dim)
        self.vid_out = Projection(dim, config.out_channels * patch)
        self.steps: Steps = PLAIN

    def plan(self, frames: int, height: int, width: int, text_length: int) -> Plan:
        """The plan for latents of frames x height x width and `text_length` text tokens.

        Raises:
            ValueError: Height or width is not a multiple of the patch.
        """
        patch = self.config.patch_size
        if frames % patch[0] or height % patch[1] or width % patch[2]:
            raise ValueError(f"latents of {frames}x{height}x{width} do not divide into patches of {patch}")
        device = self.vid_out.proj.weight.device
        size = (frames // patch[0], height // patch[1], width // patch[2])
        kinds = list(zip(self.config.windows, self.config.shifted, strict=True))
        known = {kind: partition(size, *kind, device) for kind in dict.fromkeys(kinds)}
        partitions = tuple(known[kind] for kind in kinds)
        shapes = {group.shape for windows in known.values() for group in windows.groups}
        text = text_rotations(self.config, text_length)
        return Plan(
            size=size,
            text_length=text_length,
            partitions=partitions,
            moves=tuple(transitions([windows.order for windows in partitions])),
            rotations={
                shape: video_rotations(self.config, shape, text_length).to(device) for shape in shapes
            },
            text_rotations=None if text is None else text.to(device),
            steps=self.steps,
        )

    def forward(self, vid: Tensor, txt: Tensor, timestep: float, plan: Plan) -> Tensor:
        """Velocity of latents.

        Args:
            vid: (T, H, W, in_channels): noised latent, condition latent, mask.
            txt: (L, text_dim): prompt embedding.
            timestep: In [0, 1000].
            plan: `plan(T, H, W, L)`.

        Returns:
            (T, H, W, out_channels), of the model's type.
        """
        t, h, w = self.config.patch_size
        time = self.emb_in(timestep)
        txt = self.txt_in(txt)
        vid = self.vid_in(rearrange(vid, "(T t) (H h) (W w) c -> (T H W) (t h w c)", t=t, h=h, w=w))
        for layer, (block, windows) in enumerate(zip(self.blocks, plan.partitions, strict=True)):
            vid = plan.moved(vid, layer)  # a line of its own: the tokens before it are let go
            vid, txt = block(vid, txt, time, plan, windows)
        vid = plan.moved(vid, len(self.blocks))
        if self.config.output_norm:
            vid = rms_norm(vid, self.vid_out_norm.weight, self.config.norm_eps)
            vid = self.vid_out_ada(vid, time)
        frames, height, width = plan.size
        out: Tensor = rearrange(
            self.vid_out(vid), "(T H W) (t h w c) -> (T t) (H h) (W w) c",
            T=frames, H=height, W=width, t=t, h=h, w=w,
        )  # fmt: skip
        return out
