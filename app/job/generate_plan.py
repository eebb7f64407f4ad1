"""What is refused of a generate job before any costly work, and what is decided of it.

Knows of requests, pictures, and what a model can do; nothing is loaded here.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from app.errors import InputError, UsageError
from app.job.generate_request import GenerateRequest
from app.job.result import Limits
from app.models.wan.config import TRAINED_FRAMES
from app.models.wan.generate import NEGATIVE, GenerateOptions
from app.models.wan.length import FACTOR, Length, Start, length, usable
from app.models.wan.parts import Abilities
from app.models.wan.prompt import clean, clean_prompt
from app.video.fragments import FragmentWriter
from app.video.probe import ClipInfo, probe
from app.video.rates import exact_rate
from app.video.read import read_frames
from app.video.write import VideoWriter

Writer = VideoWriter | FragmentWriter
TRAINED = 81  # frames of the clips that the models were trained with
GUIDANCE = 5.0  # of undistilled models
MOST_POSES = 1024  # frames; their tokens are all in memory


@dataclass(frozen=True)
class GenerateJob:
    """A job that was looked at and can begin: nothing is computed or written yet."""

    request: GenerateRequest
    options: GenerateOptions
    frames: int
    rate: Fraction
    writer: Writer
    start: ClipInfo | None
    used: int  # frames of `start`, its last ones
    pose: ClipInfo | None
    reference: ClipInfo | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Pictures:
    """Files that a clip is made from: an image or a clip to begin with, rendered poses, and the pose of the
    image."""

    start: Path | None = None
    pose: Path | None = None
    reference: Path | None = None


def plan_generate(
    request: GenerateRequest,
    able: Abilities,
    pictures: Pictures,
    output: Path,
    limits: Limits,
    *,
    stream: bool = False,
) -> GenerateJob:
    """Everything that can be refused before any costly work; nothing is written yet.

    `stream`: the result is a video that plays as it arrives.

    Raises:
        UsageError: The request makes no sense, for this model.
        InputError: A picture cannot be read, or the result would be beyond the limits.
        FileError: `output` cannot be written.
    """
    _check_size(request, able, limits)
    prompt, negative = clean_prompt(request.prompt), clean(request.negative_prompt or "")
    start, pose, reference = (
        None if path is None else look(path, limits)
        for path in (pictures.start, pictures.pose, pictures.reference)
    )
    for info in (start, pose, reference):
        if info is not None and output.exists() and info.path.samefile(output):
            raise UsageError(
                "output_is_input", f"{output.name} is what the clip is made from; name another output."
            )
    kind, used, notes = _kind(start, able)
    _refuse_unable(request, able, kind, pose, reference)
    rate = exact_rate(request.rate)
    poses = None if pose is None else _count(pose)
    made, frames = _length(request, able, kind, used, rate, poses)
    if frames > limits.frames:
        raise InputError(
            "output_too_large",
            f"The result would have {frames:,} frames, and the limit is {limits.frames:,}; ask for a shorter "
            "one, or raise SEEDPOD_MAX_FRAMES.",
        )
    if pose is not None and poses is not None:
        _check_pose(request, pose, poses, made)
    if reference is not None:
        _count(reference)
        _check_shape(request, reference, "the reference pose is")
    notes = (*notes, *_shape_note(request, start), *_long(made))
    options = GenerateOptions(
        prompts={0: prompt} | _changes(request, rate, frames),
        length=made,
        height=request.height,
        width=request.width,
        seed=request.seed,
        negative=NEGATIVE if request.negative_prompt is None else negative,
        steps=request.steps,
        shift=request.shift,
        guidance=_guidance(request, able),
        window=request.window,
        sink=request.sink,
        section=_section(request, able),
    )
    writer: Writer
    if stream:
        writer = FragmentWriter(output, request.width, request.height, rate, crf=request.quality)
    else:
        writer = VideoWriter(
            output, request.width, request.height, rate, codec=request.codec, crf=request.quality
        )
    return GenerateJob(request, options, frames, rate, writer, start, used, pose, reference, notes)


def look(path: Path, limits: Limits) -> ClipInfo:
    """What a picture is.

    Raises:
        InputError: It is not a clip or image that can be read, or is beyond the limits.
    """
    return probe(path, max_frames=limits.frames, max_pixels=4 * limits.pixels)


def _kind(start: ClipInfo | None, able: Abilities) -> tuple[Start, int, tuple[str, ...]]:
    """What the clip begins with, how many of its last frames are used, and what to tell of that."""
    if start is None:
        return "nothing", 0, ()
    frames = _count(start)
    if start.is_image:
        return "image", 1, start.notes
    used = 0 if able.image else usable(frames)
    if not used:
        why = "this model begins with one picture" if able.image else f"it has only {frames}"
        return "image", 1, (*start.notes, f"Of the clip to begin with, its last frame is used: {why}.")
    return "clip", used, (*start.notes, f"Of the clip to go on from, the last {used} frames are used.")


def _count(info: ClipInfo) -> int:
    """The frames of a clip or image, which no header tells for sure: that, and whether they are whole."""
    with closing(read_frames(info.path, info, size=(16, 16))) as frames:
        return sum(1 for _ in frames)


def _refuse_unable(
    request: GenerateRequest,
    able: Abilities,
    kind: Start,
    pose: ClipInfo | None,
    reference: ClipInfo | None,
) -> None:
    """Refuse what the model cannot do."""
    blocks = able.sampling == "few"
    if able.image and kind == "nothing":
        raise UsageError(
            "image_missing", "This model makes videos of an image: give one to start with (start)."
        )
    if able.image and "clip" not in able.has:
        raise UsageError(
            "clip_missing",
            "This model sees its image through CLIP, whose file is not there: `entrypoint.py fetch MODEL "
            "--optional` downloads it.",
        )
    if kind != "nothing" and not able.image and not blocks:
        raise UsageError(
            "start_refused",
            "This model makes a clip at once, from a prompt alone; to start with an image or a clip, use a "
            "distilled or an image-conditioned one.",
        )
    if kind == "clip" and pose is not None:
        raise UsageError(
            "pose_refused", "Poses go with a prompt or an image; a clip that goes on has none for its past."
        )
    if pose is not None and not able.takes_pose:
        raise UsageError(
            "pose_refused",
            "The transformer's checkpoint has no pose_proj, the layer that takes poses in: without its "
            "trained weights poses would be noise. Leave pose out, or use a checkpoint trained with poses.",
        )
    if pose is not None and "pose" not in able.has:
        raise UsageError(
            "pose_missing",
            "The weights of the pose embedders are not there: `entrypoint.py fetch MODEL --optional` "
            "downloads them.",
        )
    if reference is not None and (pose is None or not able.image):
        raise UsageError(
            "pose_refused",
            "A reference pose goes with poses and an image-conditioned model; leave pose_reference out.",
        )
    if not blocks and (request.window is not None or request.sink):
        raise UsageError(
            "window_refused",
            "This model makes a clip at once, so no window rolls; leave window and sink out, or use a "
            "distilled model.",
        )
    if not blocks and request.changes:
        raise UsageError(
            "changes_refused",
            "This model makes a clip at once, so the prompt cannot change; leave changes out, or use a "
            "distilled model.",
        )
    if request.negative_prompt is not None and _guidance(request, able) == 1:
        raise UsageError(
            "negative_refused",
            "A negative prompt works through guidance, which is 1 (none); set guidance above 1, or leave it "
            "out.",
        )
    if blocks and request.steps is not None and request.steps > 16:
        raise UsageError(
            "steps_refused",
            f"steps is {request.steps}; this model was made for 4 steps a block, and takes at most 16.",
        )


def _guidance(request: GenerateRequest, able: Abilities) -> float:
    if request.guidance is not None:
        return request.guidance
    return 1.0 if able.sampling == "few" else GUIDANCE


def _section(request: GenerateRequest, able: Abilities) -> str | None:
    """The state dict of the transformer's file that the request wants."""
    if request.use_ema is None:
        return None
    wanted = "generator_ema" if request.use_ema else "generator"
    if wanted in able.sections or (not able.sections and not request.use_ema):
        return wanted if able.sections else None
    have = f"it has {', '.join(able.sections)}" if able.sections else "it is one set of weights, without EMA"
    raise UsageError(
        "weights_missing",
        f"use_ema is {str(request.use_ema).lower()}, which needs {wanted} in the transformer's checkpoint, "
        f"and {have}; leave use_ema out.",
    )


def _check_size(request: GenerateRequest, able: Abilities, limits: Limits) -> None:
    multiple = able.multiple
    for name, value in (("height", request.height), ("width", request.width)):
        if value % multiple:
            down = value // multiple * multiple
            near = f"{down} or {down + multiple}" if down else str(multiple)
            raise UsageError(
                "size_invalid",
                f"{name} is {value}; expected a multiple of {multiple} for this model, such as {near}.",
            )
    if request.height * request.width > limits.pixels:
        raise InputError(
            "output_too_large",
            f"The result would be {request.width}x{request.height}, {request.height * request.width:,} "
            f"pixels a frame, and the limit is {limits.pixels:,}; ask for a smaller size, or raise "
            "SEEDPOD_MAX_PIXELS.",
        )


def _length(
    request: GenerateRequest,
    able: Abilities,
    kind: Start,
    used: int,
    rate: Fraction,
    poses: int | None,
) -> tuple[Length, int]:
    """Latents to make, and frames of the result: what is made beyond those is cut off."""
    blocks = able.sampling == "few"
    start: Start = "nothing" if able.image else kind  # the image is a condition then, and nothing is given
    given = (used + 3) // 4
    if request.seconds is not None:
        frames = max(1, round(Fraction(request.seconds) * rate))
        return length(frames, start, blocks=blocks, given=given, exact=False), frames
    wanted = request.frames if request.frames is not None else poses
    if wanted is None:
        made = length(TRAINED, start, blocks=blocks, given=given, exact=False)
        return made, made.frames
    try:
        made = length(wanted, start, blocks=blocks, given=given)
    except UsageError as error:
        if request.frames is not None:
            raise
        why = error.message.removeprefix(f"frames is {poses}, and ")
        raise InputError("pose_length", f"the poses have {poses} frames, and {why}") from None
    return made, made.frames


def _check_pose(request: GenerateRequest, pose: ClipInfo, poses: int, made: Length) -> None:
    if made.frames > MOST_POSES:
        raise InputError(
            "pose_length",
            f"a clip with poses may have {MOST_POSES} frames, and this one has {made.frames:,}; make it in "
            "parts.",
        )
    if poses != made.frames:
        raise InputError(
            "pose_length",
            f"there are {poses} pose frames, and the clip has {made.frames}; expected one pose for "
            "each frame: cut the poses, or ask for a clip of their length.",
        )
    _check_shape(request, pose, "the poses are")


def _check_shape(request: GenerateRequest, pose: ClipInfo, what: str) -> None:
    if not _same_shape(request, pose):
        raise InputError(
            "pose_size",
            f"{what} {pose.width}x{pose.height}, and the clip is {request.width}x{request.height}, of "
            "another shape; expected poses drawn for the clip's picture.",
        )


def _same_shape(request: GenerateRequest, info: ClipInfo) -> bool:
    """Whether the sides are in the same proportion, but for two pixels."""
    return abs(info.width * request.height - info.height * request.width) <= max(info.width, info.height) * 2


def _shape_note(request: GenerateRequest, start: ClipInfo | None) -> tuple[str, ...]:
    if start is None or _same_shape(request, start):
        return ()
    return (
        f"{start.path.name} is {start.width}x{start.height}, another shape than {request.width}x"
        f"{request.height}: its middle is used.",
    )


def _long(made: Length) -> tuple[str, ...]:
    """What to tell of a clip that is longer than those the model was trained with."""
    if made.given + made.made <= TRAINED_FRAMES:
        return ()
    frames = FACTOR * (made.given + made.made - 1) + 1
    how = "quality may suffer" if made.at_once else "the window rolls, and quality may drift"
    what = f"{frames} frames, those gone on from among them," if made.given > 1 else f"{frames} frames"
    return (f"{what} are more than the {TRAINED} that the model was trained with: {how}.",)


def _changes(request: GenerateRequest, rate: Fraction, frames: int) -> dict[int, str]:
    """Frame of the result -> prompt."""
    changes = {}
    for change in request.changes:
        frame = round(Fraction(change.at) * rate)
        if frame >= frames:
            raise UsageError(
                "change_too_late",
                f"a change of the prompt is at second {change.at:g}, and the result ends at "
                f"{float(frames / rate):.2f}; give an earlier second, or ask for a longer result.",
            )
        changes[max(1, frame)] = clean_prompt(change.prompt)
    return changes
