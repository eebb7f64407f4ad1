"""What is wrong with checkpoints: found, told once, told all at once."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import pytest

from app.boot import verify as module
from app.boot.hashes import HashRecord
from app.boot.locate import converted_path
from app.boot.manifest import Manifest, ModelEntry, read_manifest
from app.boot.tensorfile import TensorIndex, read_index
from app.boot.verify import Problem, Report, Selection, select_models, verify
from app.errors import ConfigError
from tests.boot.volumes import (
    anything,
    empty_index,
    open_folder,
    put,
    put_models,
    safetensors,
    sparse,
    without_rights,
)

OLD_3B = "91627bba45175e1f5913378bc16151dc9c28c78fd608913546238ac13041d97d"
DIT, VAE, POSITIVE = "seedvr2_ema_7b.pth", "SeedVR2-7B/ema_vae.pth", "pos_emb.pt"


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return read_manifest()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "workspace"
    root.mkdir()
    return root


class Check:
    """A volume and a record of hashes, and `verify` with them. Nothing is read as a tensor file unless
    a test says so, because the files are sparse."""

    def __init__(self, manifest: Manifest, root: Path) -> None:
        self.manifest, self.root = manifest, root
        self.hashes = HashRecord(root / ".seedpod")
        self.reads: list[Path] = []

    def __call__(self, *models: str, depth: str = "quick", contents=anything, read=empty_index) -> Report:
        def counted(path: Path, format: str) -> TensorIndex:
            self.reads.append(path)
            return read(path, format)

        selection = select_models(self.manifest, models, [self.root])
        return verify(
            self.manifest, selection, depth=depth, hashes=self.hashes, contents=contents, read=counted
        )

    def path(self, name: str) -> Path:
        return self.root / self.manifest.files[name].path

    def remember(self, name: str, sha256: str) -> None:
        self.hashes.remember(self.path(name), sha256, self.path(name).stat())

    def one(self, *models: str, **options) -> Problem:
        (problem,) = self(*models, **options).problems
        return problem


@pytest.fixture
def check(manifest: Manifest, root: Path) -> Check:
    return Check(manifest, root)


@pytest.fixture
def volume(check: Check) -> Check:
    put_models(check.root, check.manifest, "seedvr2-3b", "seedvr2-7b", "seedvr2-7b-sharp")
    return check


def test_a_whole_volume_has_no_problem(volume: Check) -> None:
    report = volume("seedvr2-3b", "seedvr2-7b", "seedvr2-7b-sharp")
    assert report.ok
    assert len(report.files) == 12
    assert {file.state for file in report.files} == {"present"}
    assert len(volume.reads) == len(set(volume.reads)) == 7  # what models share is read once
    report.require_ok()


def test_remembered_hashes_verify(volume: Check) -> None:
    for name in (DIT, VAE, POSITIVE):
        volume.remember(name, str(volume.manifest.files[name].sha256))
    states = {file.part: file.state for file in volume("seedvr2-7b").files}
    assert states == {"dit": "verified", "vae": "verified", "positive": "verified", "negative": "present"}


def test_every_problem_of_every_model_at_once(volume: Check) -> None:
    volume.path(DIT).unlink()
    sparse(volume.path("seedvr2_ema_3b.pth"), 5)
    sparse(volume.path("SeedVR2-3B/ema_vae.pth"), 0)
    volume.path(POSITIVE).unlink()
    report = volume("seedvr2-3b", "seedvr2-7b")
    assert {(problem.code, problem.file, problem.model) for problem in report.problems} == {
        ("checkpoint_size", "seedvr2_ema_3b.pth", "seedvr2-3b"),
        ("checkpoint_empty", "SeedVR2-3B/ema_vae.pth", "seedvr2-3b"),
        ("checkpoint_missing", POSITIVE, "seedvr2-3b, seedvr2-7b"),
        ("checkpoint_missing", DIT, "seedvr2-7b"),
    }
    with pytest.raises(ConfigError) as caught:
        report.require_ok()
    assert all(problem.message in caught.value.message for problem in report.problems)
    assert caught.value.exit_status == 78


def test_missing(volume: Check) -> None:
    volume.path(POSITIVE).unlink()
    message = volume.one("seedvr2-3b", "seedvr2-7b").message
    assert "pos_emb.pt (595.1 kB), the positive of seedvr2-3b, the positive of seedvr2-7b" in message
    assert "SeedVR/ckpts/SeedVR2-3B/pos_emb.pt under a root" in message
    assert "`entrypoint.py fetch seedvr2-3b seedvr2-7b`" in message
    tried = f"\n  tried {volume.path(POSITIVE)}: the folder holds ema_vae.pth (1.0 GB), neg_emb.pt (656.5 kB)"
    assert tried in message
    hub = "huggingface-cache/hub/models--ByteDance-Seed--SeedVR2-3B/snapshots/37255ff8cccfb01071b87f635a5948"
    assert hub in message


def test_missing_but_in_the_wrong_folder(volume: Check) -> None:
    wrong = volume.root / "SeedVR2-7B" / DIT
    wrong.parent.mkdir()
    volume.path(DIT).rename(wrong)
    assert (
        f"A file of that name and size is at {wrong}: if it is the one, move it."
        in volume.one("seedvr2-7b").message
    )
    sparse(wrong, 12)
    assert "but of 12 bytes instead of 32,958,774,606" in volume.one("seedvr2-7b").message


def test_the_3bs_superseded_16_bit_file_is_explained(volume: Check) -> None:
    volume.path("seedvr2_ema_3b.pth").unlink()
    put(volume.root, volume.manifest, "seedvr2_ema_3b_fp16.safetensors")
    problem = volume.one("seedvr2-3b")
    assert problem.code == "checkpoint_missing"
    assert "comes from the superseded first weights" in problem.message


def test_a_half_downloaded_file(volume: Check) -> None:
    """One cause, one problem: that the zip is cut off too is not told again."""
    os.truncate(volume.path(DIT), 12_000_000_000)

    def cut_off(path: Path, format: str) -> TensorIndex:
        if path == volume.path(DIT):
            raise ConfigError("checkpoint_truncated", "no end of the zip")
        return empty_index(path, format)

    problem = volume.one("seedvr2-7b", read=cut_off)
    assert problem.code == "checkpoint_size"
    assert problem.message == (
        f"{volume.path(DIT)} has 12,000,000,000 bytes of the 32,958,774,606 expected of seedvr2_ema_7b.pth, "
        "36.4%: half-downloaded or half-copied. Copy it again, or move it away and run "
        "`entrypoint.py fetch seedvr2-7b`."
    )


def test_a_file_without_its_last_byte_is_not_100_percent(volume: Check) -> None:
    os.truncate(volume.path(DIT), 32958774605)
    assert "99.9%" in volume.one("seedvr2-7b").message


def test_a_file_that_is_too_long(volume: Check) -> None:
    os.truncate(volume.path(POSITIVE), 595101)
    assert "1 too many" in volume.one("seedvr2-7b").message


def test_the_3b_file_in_the_7bs_place_by_its_size(volume: Check) -> None:
    os.truncate(volume.path(DIT), 13566090228)
    problem = volume.one("seedvr2-7b")
    assert problem.code == "checkpoint_size"
    assert "which is what seedvr2_ema_3b.pth has: another file is in its place" in problem.message


def test_another_file_by_its_remembered_hash(volume: Check) -> None:
    """A file of the 7B's size may be the sharp one: a hash that is known says which."""
    os.truncate(volume.path("seedvr2_ema_3b.pth"), 32958774606)
    assert "seedvr2_ema_7b.pth or seedvr2_ema_7b_sharp.pth has" in volume.one("seedvr2-3b").message
    volume.remember("seedvr2_ema_3b.pth", str(volume.manifest.files["seedvr2_ema_7b_sharp.pth"].sha256))
    assert "is what seedvr2_ema_7b_sharp.pth has" in volume.one("seedvr2-3b").message


def test_the_sharp_file_in_the_7bs_place_by_its_hash(volume: Check) -> None:
    """Same size, same tensors: only the hash tells."""
    volume.remember(DIT, str(volume.manifest.files["seedvr2_ema_7b_sharp.pth"].sha256))
    problem = volume.one("seedvr2-7b")
    assert problem.code == "checkpoint_hash"
    assert f"expected {volume.manifest.files[DIT].sha256} for {DIT}: it is seedvr2_ema_7b_sharp.pth" in (
        problem.message
    )


def test_the_superseded_3b(volume: Check) -> None:
    volume.remember("seedvr2_ema_3b.pth", OLD_3B)
    problem = volume.one("seedvr2-3b")
    assert problem.code == "checkpoint_superseded"
    assert "is the superseded first weights of the 3B" in problem.message
    assert OLD_3B in problem.message
    assert "`entrypoint.py fetch seedvr2-3b`" in problem.message


@pytest.mark.parametrize(
    ("head", "name", "code"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:", DIT, "checkpoint_lfs_pointer"),
        (b"<!DOCTYPE html><title>Not found</title>", DIT, "checkpoint_html"),
        (b"GGUF" + b"\1" * 100, DIT, "checkpoint_not_torch"),
        (b"PK\x03\x04" + b"\1" * 100, DIT, "checkpoint_size"),
        (b"", DIT, "checkpoint_empty"),
    ],
)
def test_what_it_is_says_more_than_its_size(volume: Check, head: bytes, name: str, code: str) -> None:
    volume.path(name).write_bytes(head)

    def read(path: Path, format: str) -> TensorIndex:
        return read_index(path, format) if path == volume.path(name) else empty_index(path, format)

    problem = volume.one("seedvr2-7b", read=read)
    assert problem.code == code
    assert str(volume.path(name)) in problem.message


def test_a_pointer_in_place_of_a_data_file(root: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text(
        '[model.words]\ntask = "generate"\nfamily = "t5"\nparts = {tokenizer = "umt5-xxl/tokenizer.json"}\n'
    )
    check = Check(read_manifest([own]), root)
    path = check.path("umt5-xxl/tokenizer.json")
    sparse(path, 10).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert check.one("words").code == "checkpoint_lfs_pointer"
    path.write_bytes(b'{"version": "1.0"}')
    assert check.one("words").code == "checkpoint_size"
    path.write_bytes(b"{" + b" " * 16837415 + b"}")
    assert check("words").ok
    assert check.one("words", depth="full").code == "checkpoint_hash"
    assert check.reads == []  # it holds no tensors


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_not_a_file(volume: Check, kind: str) -> None:
    volume.path(DIT).unlink()
    if kind == "folder":
        volume.path(DIT).mkdir()
    else:
        os.mkfifo(volume.path(DIT))  # opening it would wait for ever
    problem = volume.one("seedvr2-7b")
    assert problem.code == "checkpoint_not_file"
    assert kind in problem.message


def test_a_file_that_may_not_be_read(manifest: Manifest) -> None:
    with open_folder() as root:
        check = Check(manifest, root)
        put_models(root, manifest, "seedvr2-7b")
        check.path(DIT).chmod(0o000)
        with without_rights():
            problem = check.one("seedvr2-7b")
    assert problem.code == "checkpoint_unreadable"
    assert "Permission denied" in problem.message


def test_a_link_out_of_the_root(volume: Check, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere.pth"
    volume.path(DIT).rename(target)
    volume.path(DIT).symlink_to(target)
    problem = volume.one("seedvr2-7b")
    assert problem.code == "checkpoint_link_outside"
    assert str(target) in problem.message
    assert "SEEDPOD_ROOTS" in problem.message


def test_tensors_are_told_by_the_model(volume: Check) -> None:
    def contents(model: ModelEntry, part: str, index: TensorIndex) -> list[str]:
        return ["2 tensors missing: a, b."] if (model.variant, part) == ("3b", "dit") else []

    problem = volume.one("seedvr2-3b", "seedvr2-7b", contents=contents)
    assert (problem.code, problem.model) == ("checkpoint_tensors", "seedvr2-3b")
    assert "does not hold the tensors of seedvr2-3b's dit: 2 tensors missing: a, b." in problem.message


def test_a_model_that_cannot_name_the_tensors(volume: Check) -> None:
    def contents(model: ModelEntry, part: str, index: TensorIndex) -> list[str]:
        raise ConfigError("checkpoint_section", f"{index.path} has no section x")

    assert {p.code for p in volume("seedvr2-7b", contents=contents).problems} == {"checkpoint_section"}


# ------------------------------------------------------------------ hashes


@pytest.fixture
def small(root: Path, tmp_path: Path) -> Check:
    """One model of two small real files whose hashes are known."""
    one, two = (safetensors(root / name, {}, n) for n, name in [(1, "one"), (2, "two")])
    own = tmp_path / "own.toml"
    own.write_text(
        "".join(
            f'[file.{p.name}]\npath = "{p.name}"\nformat = "safetensors"\nsize = {p.stat().st_size}\n'
            f'sha256 = "{hashlib.sha256(p.read_bytes()).hexdigest()}"\n'
            for p in (one, two)
        )
        + '[model.small]\ntask = "restore"\nfamily = "f"\nparts = {dit = "one", vae = "two"}\n'
        + '[model.other]\ntask = "restore"\nfamily = "f"\nparts = {dit = "one"}\n'
    )
    return Check(read_manifest([own]), root)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are hashed, as they are."""
    names = []
    real = module.sha256_file
    monkeypatch.setattr(
        module, "sha256_file", lambda path, **options: names.append(path.name) or real(path, **options)
    )
    return names


def test_quick_never_hashes(small: Check, hashed: list[str]) -> None:
    assert {file.state for file in small("small", read=read_index).files} == {"present"}
    assert hashed == []


def test_full_hashes_once(small: Check, hashed: list[str]) -> None:
    for _ in range(2):
        report = small("small", "other", depth="full", read=read_index)
        assert {file.state for file in report.files} == {"verified"}
    assert hashed == ["one", "two"]
    assert {file.state for file in small("small").files} == {"verified"}  # and quick knows them now


def test_a_changed_file_is_hashed_again(small: Check, hashed: list[str]) -> None:
    small("small", depth="full")
    path = small.path("one")
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"\2")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert {file.state for file in small("small").files} == {"present", "verified"}
    problem = small.one("small", depth="full")
    assert (problem.code, problem.file) == ("checkpoint_hash", "one")
    assert "it is damaged, or another version" in problem.message
    assert hashed == ["one", "two", "one"]
    assert small.one("small").code == "checkpoint_hash"  # a wrong hash is remembered as well
    assert path.read_bytes() == data[:-1] + b"\2"  # and the file is left as it is


def test_what_is_wrong_already_is_not_hashed(small: Check, hashed: list[str]) -> None:
    small.path("one").write_bytes(b"short")
    small("small", depth="full", contents=lambda model, part, index: ["1 tensor missing: x."])
    assert hashed == []


def test_a_hash_that_cannot_be_written_down_is_a_note(small: Check) -> None:
    (small.root / ".seedpod").write_text("in the way")
    report = small("small", depth="full")
    assert report.ok
    assert len(report.notes) == 2
    assert "could not be written" in report.notes[0]


# ------------------------------------------------------------------ what `convert` made


@pytest.fixture
def converted(volume: Check) -> Check:
    sha256 = str(volume.manifest.files[DIT].sha256)
    safetensors(converted_path(volume.path(DIT), "bf16"), {"source_sha256": sha256})
    return volume


def real_safetensors(path: Path, format: str) -> TensorIndex:
    return read_index(path, format) if format == "safetensors" else empty_index(path, format)


def test_a_converted_file_is_verified_by_the_hash_beside_it(converted: Check) -> None:
    report = converted("seedvr2-7b", depth="quick", read=real_safetensors)
    assert report.files[0].file == "seedvr2_ema_7b.bf16.safetensors"
    assert report.files[0].note == "converted from seedvr2_ema_7b.pth"
    assert (report.ok, report.files[0].state) == (True, "present")
    path = converted_path(converted.path(DIT), "bf16")
    converted.hashes.remember(path, hashlib.sha256(path.read_bytes()).hexdigest(), path.stat())
    assert converted("seedvr2-7b", read=real_safetensors).files[0].state == "verified"
    converted.hashes.remember(path, "0" * 64, path.stat())
    problem = converted.one("seedvr2-7b", read=real_safetensors)
    assert problem.code == "checkpoint_hash"
    assert "`entrypoint.py convert seedvr2-7b`" in problem.message


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"source_sha256": "0" * 64}, "was made from the file with sha256 000000"),
        ({}, "was made from a file it does not name"),
    ],
)
def test_a_converted_file_of_another_master_is_refused_not_passed_over(
    converted: Check, metadata: dict[str, str], words: str
) -> None:
    safetensors(converted_path(converted.path(DIT), "bf16"), metadata)
    problem = converted.one("seedvr2-7b", read=real_safetensors)
    assert problem.code == "checkpoint_converted_stale"
    assert words in problem.message
    assert "move it away so that seedvr2_ema_7b.pth is used" in problem.message


def test_a_file_converted_from_the_superseded_3b(volume: Check) -> None:
    safetensors(converted_path(volume.path("seedvr2_ema_3b.pth"), "fp16"), {"source_sha256": OLD_3B})
    problem = volume.one("seedvr2-3b", read=real_safetensors)
    assert problem.code == "checkpoint_converted_stale"
    assert "was made from the superseded first weights of the 3B" in problem.message


def test_a_converted_file_without_its_hash_is_refused(converted: Check) -> None:
    path = converted_path(converted.path(DIT), "bf16")
    path.with_name(f"{path.name}.sha256").unlink()
    assert converted.one("seedvr2-7b", read=real_safetensors).code == "checkpoint_converted_unproven"


# ------------------------------------------------------------------ which models


def test_models_by_name(volume: Check) -> None:
    selection = select_models(volume.manifest, ["seedvr2-7b", "nano"], [volume.root])
    assert list(selection.located) == ["seedvr2-7b", "nano"]  # nano's files are missing: verify says so
    with pytest.raises(ConfigError) as caught:
        select_models(volume.manifest, ["seedvr2-7", "x"], [volume.root])
    assert caught.value.code == "model_unknown"
    assert "'seedvr2-7', 'x'" in caught.value.message
    assert "Did you mean seedvr2-7b instead of 'seedvr2-7'?" in caught.value.message
    assert "known models: seedvr2-3b, seedvr2-7b, seedvr2-7b-sharp, nano" in caught.value.message


def test_every_complete_model_without_a_name(volume: Check) -> None:
    volume.path("seedvr2_ema_3b.pth").unlink()
    selection = select_models(volume.manifest, None, [volume.root])
    assert list(selection.located) == ["seedvr2-7b", "seedvr2-7b-sharp"]
    report = verify(
        volume.manifest, selection, depth="quick", hashes=volume.hashes, contents=anything, read=empty_index
    )
    assert report.ok
    assert report.incomplete["seedvr2-3b"] == ("SeedVR/ckpts/SeedVR2-3B/seedvr2_ema_3b.pth",)


def test_a_wrong_file_does_not_make_a_model_incomplete(volume: Check) -> None:
    """Dropping the model would hide what is wrong with it."""
    os.truncate(volume.path(DIT), 5)
    assert "seedvr2-7b" in select_models(volume.manifest, None, [volume.root]).located


def test_no_complete_model(check: Check) -> None:
    put(check.root, check.manifest, "seedvr2_ema_3b.pth")
    with pytest.raises(ConfigError) as caught:
        select_models(check.manifest, None, [check.root])
    assert caught.value.code == "models_incomplete"
    assert "seedvr2-3b lacks SeedVR/ckpts/SeedVR2-3B/ema_vae.pth, SeedVR" in caught.value.message
    assert str(check.root) in caught.value.message
    everything = select_models(check.manifest, None, [check.root], all_if_none=True)
    assert everything == Selection(everything.located, {})
    assert list(everything.located) == [m.name for m in check.manifest.models.values() if not m.by_name]


def test_one_problem_of_several_models_is_told_once(volume: Check) -> None:
    sparse(volume.path(VAE), 5)
    report = volume("seedvr2-7b", "seedvr2-7b-sharp")
    assert [problem.model for problem in report.problems] == ["seedvr2-7b, seedvr2-7b-sharp"]
    assert "`entrypoint.py fetch seedvr2-7b seedvr2-7b-sharp`" in report.problems[0].message
    assert [file.state for file in report.files if file.part == "vae"] == ["wrong", "wrong"]


def test_a_manifest_without_hashes_says_so(volume: Check) -> None:
    files = dict(volume.manifest.files)
    files[DIT] = replace(files[DIT], sha256=None)
    check = Check(replace(volume.manifest, files=files), volume.root)
    dit = check("seedvr2-7b").files[0]
    assert (dit.state, dit.note) == ("present", "no hash is known for it")


@pytest.fixture
def unhashed(root: Path, tmp_path: Path) -> Check:
    """A model of one master, whose hash no manifest knows, and its converted file."""
    master = safetensors(root / "m.safetensors", {})
    own = tmp_path / "own.toml"
    own.write_text(
        'replace = true\n[file.m]\npath = "m.safetensors"\nformat = "safetensors"\n'
        '[model.m]\ntask = "restore"\nfamily = "f"\nparts = {dit = "m"}\n'
    )
    sha256 = hashlib.sha256(master.read_bytes()).hexdigest()
    size = str(master.stat().st_size)
    safetensors(converted_path(master, "bf16"), {"source_sha256": sha256, "source_size": size})
    return Check(read_manifest([own]), root)


@pytest.mark.parametrize("change", ["none", "gone", "longer", "newer", "another hash", "newer, same hash"])
def test_a_master_without_a_hash_that_was_replaced_is_noticed(unhashed: Check, change: str) -> None:
    master = unhashed.path("m")
    made = converted_path(master, "bf16").stat().st_mtime_ns
    if change == "gone":
        master.unlink()
    elif change == "longer":
        master.write_bytes(master.read_bytes() + b"more")
        os.utime(master, ns=(made, made - 1))
    elif change.startswith("newer"):
        os.utime(master, ns=(made, made + 1))
    if change.endswith("hash"):
        data = b"another" if change == "another hash" else master.read_bytes()
        unhashed.hashes.remember(master, hashlib.sha256(data).hexdigest(), master.stat())
    if change in ("none", "gone", "newer, same hash"):
        assert unhashed("m", read=real_safetensors).ok
    else:
        assert unhashed.one("m", read=real_safetensors).code == "checkpoint_converted_stale"


def test_an_optional_part_that_is_not_there_is_no_problem(root: Path) -> None:
    manifest = read_manifest()
    optional = {"pose": "UniAnimate-Wan2.1-14B-Lora-12000.ckpt"}
    models = {"seedvr2-7b": replace(manifest.models["seedvr2-7b"], optional=optional)}
    put_models(root, manifest, "seedvr2-7b")
    report = Check(replace(manifest, models=models), root)("seedvr2-7b")
    assert report.ok
    assert report.notes == (
        "seedvr2-7b does without its optional pose: checkpoints/UniAnimate-Wan2.1-14B-Lora-12000.ckpt is not "
        "there.",
    )
