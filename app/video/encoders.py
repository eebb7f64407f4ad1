"""What frames become on their way into an encoder: its options, and the pixels it is given.

Knows nothing of files or processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from app.errors import InternalError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

Codec = Literal["h264", "hevc10", "h264_10", "lossless", "png"]
CODECS: tuple[Codec, ...] = get_args(Codec)


@dataclass(frozen=True)
class Encoder:
    """Options of an encoder, the pixel format it stores (None: RGB as it is), and its usual crf, if any."""

    options: tuple[str, ...]
    pixel_format: str | None
    crf: int | None

    def video_options(self, odd: bool, crf: int | None) -> list[str]:
        """Output options; `odd`: a side is, so that chroma cannot be halved."""
        quality = crf if crf is not None else self.crf
        chosen = [*self.options, *(("-crf", str(quality)) if self.crf is not None else ())]
        if self.pixel_format is None:
            return chosen
        # BT.709 for real, not only by tag: swscale would convert by BT.601
        stored = self.pixel_format.replace("420", "444") if odd else self.pixel_format
        convert = (
            "format=gbrp16le,zscale=matrixin=gbr:rangein=full:primariesin=bt709:transferin=bt709"
            ":matrix=bt709:range=limited:primaries=bt709:transfer=bt709:filter=bicubic"
        )
        return [*chosen, "-vf", f"{convert},format={stored}"]


_QUIET_X265 = ("-x265-params", "log-level=error")
ENCODERS: dict[Codec, Encoder] = {
    "h264": Encoder(("-c:v", "libx264", "-preset", "medium"), "yuv420p", 16),
    "h264_10": Encoder(("-c:v", "libx264", "-preset", "medium"), "yuv420p10le", 16),
    "hevc10": Encoder(
        ("-c:v", "libx265", "-preset", "medium", "-tag:v", "hvc1", *_QUIET_X265), "yuv420p10le", 18
    ),
}
FFV1 = Encoder(("-c:v", "ffv1", "-level", "3", "-slicecrc", "1", "-pix_fmt", "bgr0"), None, None)
RGB_H264 = Encoder(("-c:v", "libx264rgb", "-preset", "medium", "-qp", "0", "-pix_fmt", "rgb24"), None, None)


def picture_of(frame: Tensor | NDArray[np.uint8], deep: bool) -> NDArray[Any]:
    """One frame as (height, width, 3): uint16 when `deep`, else uint8; rounded and clipped."""
    import numpy as np

    if isinstance(frame, np.ndarray):
        assert frame.dtype == np.uint8, frame.dtype
        return np.ascontiguousarray(frame).astype("<u2") * 257 if deep else np.ascontiguousarray(frame)
    values = frame.float()
    if not values.isfinite().all():
        raise InternalError("not_finite", "A frame holds values that are not numbers; nothing is written.")
    half = 65535 / 2 if deep else 255 / 2
    levels = values.clamp(-1, 1).add(1).mul(half).round()
    return np.ascontiguousarray(levels.permute(1, 2, 0).cpu().numpy(), "<u2" if deep else np.uint8)
