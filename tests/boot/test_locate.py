"""Where files are found, what is preferred, and what a missing one's message tells."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from app.boot.folders import COUNTED, Nearby
from app.boot.locate import Found, Missing, converted_path, locate, locate_file
from app.boot.manifest import Manifest, read_manifest
from app.errors import ConfigError
from tests.boot.volumes import (
    open_folder,
    origin_of,
    put,
    put_in_hub_cache,
    put_models,
    safetensors,
    sparse,
    without_rights,
)

OTHER = "1" * 40


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return read_manifest()


@pytest.fixture
def roots(tmp_path: Path) -> list[Path]:
    roots = [tmp_path / "workspace", tmp_path / "runpod-volume"]
    for root in roots:
        root.mkdir()
    return roots


def part(
    manifest: Manifest, roots: list[Path], name: str = "dit", model: str = "seedvr2-7b"
) -> Found | Missing:
    return locate(manifest, manifest.models[model], roots)[name]


def found(place: Found | Missing) -> Found:
    assert isinstance(place, Found), place
    return place


def missing(place: Found | Missing) -> Missing:
    assert isinstance(place, Missing), place
    return place


def test_each_part_in_its_own_folder(manifest: Manifest, roots: list[Path]) -> None:
    put_models(roots[0], manifest, "seedvr2-3b", "seedvr2-7b")
    for model, folder in [("seedvr2-3b", "SeedVR2-3B"), ("seedvr2-7b", "SeedVR2-7B")]:
        places = locate(manifest, manifest.models[model], roots)
        assert found(places["vae"]).path == roots[0] / "SeedVR/ckpts" / folder / "ema_vae.pth"
        assert found(places["positive"]).path == roots[0] / "SeedVR/ckpts/SeedVR2-3B/pos_emb.pt"


def test_both_roots_the_first_one_first(manifest: Manifest, roots: list[Path]) -> None:
    put(roots[1], manifest, "seedvr2_ema_7b.pth")
    assert found(part(manifest, roots)).root == roots[1]
    put(roots[0], manifest, "seedvr2_ema_7b.pth")
    assert found(part(manifest, roots)).root == roots[0]


def test_a_16_bit_file_is_preferred_over_all_roots(manifest: Manifest, roots: list[Path]) -> None:
    put(roots[0], manifest, "seedvr2_ema_7b.pth", "SeedVR2-7B/ema_vae.pth")
    put(roots[1], manifest, "seedvr2_ema_7b_fp16.safetensors", "SeedVR2-7B/ema_vae_fp16.safetensors")
    dit = found(part(manifest, roots))
    assert (dit.entry.name, dit.root) == ("seedvr2_ema_7b_fp16.safetensors", roots[1])
    assert (dit.entry.format, dit.entry.stage) == ("safetensors", True)
    assert found(part(manifest, roots, "vae")).entry.name == "SeedVR2-7B/ema_vae_fp16.safetensors"


def test_the_3bs_16_bit_file_is_never_taken(manifest: Manifest, roots: list[Path]) -> None:
    """It is made from the superseded weights."""
    put(roots[0], manifest, "seedvr2_ema_3b_fp16.safetensors")
    place = missing(part(manifest, roots, model="seedvr2-3b"))
    assert "seedvr2_ema_3b_fp16.safetensors (6.8 GB)" in place.tried[0].held
    assert "superseded" in str(place.entry.note)
    put(roots[0], manifest, "seedvr2_ema_3b.pth")
    assert found(part(manifest, roots, model="seedvr2-3b")).entry.name == "seedvr2_ema_3b.pth"


def test_the_3bs_vae_is_not_taken_for_the_7bs(manifest: Manifest, roots: list[Path]) -> None:
    put(roots[0], manifest, "SeedVR2-3B/ema_vae.pth", "SeedVR2-3B/ema_vae_fp16.safetensors")
    place = missing(part(manifest, roots, "vae"))
    # but it is the same file, and the message says where it is
    assert roots[0] / "SeedVR/ckpts/SeedVR2-3B/ema_vae.pth" in place.nearby


@pytest.mark.parametrize("root", [0, 1])
def test_runpods_cached_model_is_found(manifest: Manifest, roots: list[Path], root: int) -> None:
    entry = manifest.files["seedvr2_ema_7b.pth"]
    link = put_in_hub_cache(roots[root], origin_of(entry), str(entry.sha256), entry.size or 0)
    place = found(part(manifest, roots))
    assert (place.path, place.revision) == (link, None)
    assert str(link).endswith(
        "huggingface-cache/hub/models--ByteDance-Seed--SeedVR2-7B/snapshots/"
        "eb0c4281d41ba3767d4f14370f0e37e9e9180c16/seedvr2_ema_7b.pth"
    )
    assert place.leads_out() is None  # the cache is made of links, which stay inside the root


def test_another_revision_counts_if_it_holds_the_same_file(manifest: Manifest, roots: list[Path]) -> None:
    entry = manifest.files["seedvr2_ema_7b.pth"]
    put_in_hub_cache(roots[0], origin_of(entry), str(entry.sha256), entry.size or 0, OTHER)
    assert found(part(manifest, roots)).revision == OTHER
    put_in_hub_cache(roots[1], origin_of(entry), str(entry.sha256), entry.size or 0)
    assert found(part(manifest, roots)).revision is None  # the pinned one first, in whatever root


@pytest.mark.parametrize(
    ("blob", "extra", "why"),
    [("2" * 64, 0, "sha256 222222"), ("sha", 5, "bytes, not 32,958,774,606")],
    ids=["hash", "size"],
)
def test_another_revision_with_another_file_does_not_count(
    manifest: Manifest, roots: list[Path], blob: str, extra: int, why: str
) -> None:
    entry = manifest.files["seedvr2_ema_7b.pth"]
    link = put_in_hub_cache(roots[0], origin_of(entry), blob, (entry.size or 0) + extra, OTHER)
    (held,) = [tried.held for tried in missing(part(manifest, roots)).tried if tried.path == link]
    assert why in held
    assert OTHER in held


def test_an_unpinned_file_is_found_in_any_revision(manifest: Manifest, roots: list[Path]) -> None:
    entry = manifest.files["seedvr2_ema_7b_fp16.safetensors"]
    link = put_in_hub_cache(roots[0], origin_of(entry), str(entry.sha256), entry.size or 0, OTHER)
    assert found(part(manifest, roots)).path == link


def test_what_convert_made_comes_first(manifest: Manifest, roots: list[Path]) -> None:
    put(roots[0], manifest, "seedvr2_ema_7b.pth", "seedvr2_ema_7b_fp16.safetensors")
    master = roots[0] / manifest.files["seedvr2_ema_7b.pth"].path
    safetensors(converted_path(master, "fp16"), {})
    assert found(part(manifest, roots)).path.name == "seedvr2_ema_7b.fp16.safetensors"
    path = safetensors(converted_path(master, "bf16"), {})
    place = found(part(manifest, roots))
    assert place.path == path
    assert place.converted_from == manifest.files["seedvr2_ema_7b.pth"]
    assert place.entry.name == "seedvr2_ema_7b.bf16.safetensors"
    assert (place.entry.format, place.entry.size, place.entry.stage) == ("safetensors", None, True)
    assert place.entry.sha256 == path.with_name(f"{path.name}.sha256").read_text()[:64]


def test_a_converted_file_needs_no_master_and_may_lack_its_hash(
    manifest: Manifest, roots: list[Path]
) -> None:
    path = safetensors(roots[1] / "SeedVR/ckpts/SeedVR2-7B/ema_vae.bf16.safetensors", {})
    path.with_name(f"{path.name}.sha256").write_text("not a hash")
    place = found(part(manifest, roots, "vae"))
    assert (place.path, place.entry.sha256) == (path, None)
    assert place.entry.name == "SeedVR2-7B/ema_vae.bf16.safetensors"


def test_a_converted_file_in_the_hub_cache(manifest: Manifest, roots: list[Path]) -> None:
    entry = manifest.files["seedvr2_ema_7b.pth"]
    link = put_in_hub_cache(roots[1], origin_of(entry), str(entry.sha256), entry.size or 0)
    path = safetensors(converted_path(link, "bf16"), {})
    assert found(part(manifest, roots)).path == path


def test_the_master_itself_for_convert(manifest: Manifest, roots: list[Path]) -> None:
    put(roots[0], manifest, "seedvr2_ema_7b.pth", "seedvr2_ema_7b_fp16.safetensors")
    entry = manifest.files["seedvr2_ema_7b.pth"]
    assert found(locate_file(entry, roots)).path == roots[0] / entry.path
    assert len(missing(locate_file(manifest.files["seedvr2_ema_7b_sharp.pth"], roots)).tried) == 4


def test_a_link_out_of_the_root_is_known(manifest: Manifest, roots: list[Path], tmp_path: Path) -> None:
    entry = manifest.files["pos_emb.pt"]
    target = sparse(tmp_path / "secret", 595100)
    link = roots[0] / entry.path
    link.parent.mkdir(parents=True)
    link.symlink_to(target)
    assert found(part(manifest, roots, "positive")).leads_out() == target


def test_a_folder_that_is_a_link_out_of_the_root_is_known(
    manifest: Manifest, roots: list[Path], tmp_path: Path
) -> None:
    put(tmp_path / "other", manifest, "pos_emb.pt")
    (roots[0] / "SeedVR").symlink_to(tmp_path / "other" / "SeedVR")
    assert found(part(manifest, roots, "positive")).leads_out() is not None


def test_links_inside_a_root_and_a_root_that_is_a_link(
    manifest: Manifest, roots: list[Path], tmp_path: Path
) -> None:
    put(roots[0], manifest, "seedvr2_ema_7b.pth")
    (roots[0] / "SeedVR").rename(roots[0] / "models")
    (roots[0] / "SeedVR").symlink_to("models")
    (tmp_path / "linked").symlink_to(roots[0])
    assert found(part(manifest, [tmp_path / "linked"])).leads_out() is None


def test_a_master_that_leads_out_is_not_given_to_convert(
    manifest: Manifest, roots: list[Path], tmp_path: Path
) -> None:
    entry = manifest.files["seedvr2_ema_7b.pth"]
    target = sparse(tmp_path / "elsewhere", 1000)
    path = roots[0] / entry.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
    with pytest.raises(ConfigError, match=str(target)) as caught:
        locate_file(entry, roots)
    assert caught.value.code == "checkpoint_link_outside"


def test_a_pipe_beside_a_converted_file_is_no_hash(manifest: Manifest, roots: list[Path]) -> None:
    path = converted_path(roots[0] / manifest.files["seedvr2_ema_7b.pth"].path, "bf16")
    sparse(path, 10)
    os.mkfifo(path.with_name(f"{path.name}.sha256"))
    assert found(part(manifest, roots)).entry.sha256 is None


def test_missing_tells_every_path_and_what_is_there(manifest: Manifest, roots: list[Path]) -> None:
    folder = roots[0] / "SeedVR/ckpts/SeedVR2-7B"
    sparse(folder / "seedvr2_ema_7b.pth.part", 1_000_000)
    (folder / "old").mkdir()
    sparse(roots[1] / "readme.txt", 5)
    place = missing(part(manifest, roots))
    held = {tried.path: tried.held for tried in place.tried}
    for root in roots:
        for name in (
            "seedvr2_ema_7b.pth",
            "seedvr2_ema_7b_fp16.safetensors",
            "seedvr2_ema_7b.bf16.safetensors",
            "seedvr2_ema_7b.fp16.safetensors",
        ):
            assert root / "SeedVR/ckpts/SeedVR2-7B" / name in held
        assert any("models--numz--SeedVR2_comfyUI" in str(path) for path in held)
    texts = list(held.values())
    assert texts[0] == "the folder holds old/, seedvr2_ema_7b.pth.part (1.0 MB)"
    assert texts[1] == f"the folder does not exist; {roots[1]} holds readme.txt (5 bytes)"
    assert f"the folder does not exist; {roots[0]} holds SeedVR/" in texts
    assert texts.count("as above") > 0


def test_what_stands_in_the_way(manifest: Manifest, roots: list[Path], tmp_path: Path) -> None:
    shutil.rmtree(roots[1])
    sparse(roots[0] / "SeedVR", 3)
    texts = [tried.held for tried in missing(part(manifest, roots)).tried]
    assert texts[0] == f"the folder does not exist; {roots[0] / 'SeedVR'} is a file, not a folder"
    assert texts[1] == f"the root {roots[1]} does not exist"


def test_a_long_folder_is_cut_short(manifest: Manifest, roots: list[Path]) -> None:
    for i in range(25):
        sparse(roots[0] / "SeedVR/ckpts/SeedVR2-7B" / f"{i:02}", 0)
    held = missing(part(manifest, roots)).tried[0].held
    assert held.startswith("the folder holds 00 (0 bytes), 01")
    assert held.endswith("09 (0 bytes) and 15 more")


def test_a_link_to_nothing(manifest: Manifest, roots: list[Path]) -> None:
    path = roots[0] / manifest.files["pos_emb.pt"].path
    path.parent.mkdir(parents=True)
    path.symlink_to("gone.pt")
    tried = {t.path: t.held for t in missing(part(manifest, roots, "positive")).tried}
    assert tried[path] == "it is a link to gone.pt, which is not there"


def test_a_folder_that_may_not_be_entered(manifest: Manifest) -> None:
    with open_folder() as root:
        put(root, manifest, "pos_emb.pt")
        (root / "SeedVR").chmod(0)
        with without_rights():
            place = missing(part(manifest, [root], "positive"))
        (root / "SeedVR").chmod(0o755)
    assert "cannot be" in place.tried[0].held
    assert "Permission denied" in place.tried[0].held


@pytest.mark.parametrize(
    "where", ["seedvr2_ema_7b.pth", "SeedVR2-7B/seedvr2_ema_7b.pth", "a/b/c/d/seedvr2_ema_7b.pth"]
)
def test_a_file_in_the_wrong_folder_is_pointed_at(manifest: Manifest, roots: list[Path], where: str) -> None:
    path = sparse(roots[1] / where, 10)
    assert missing(part(manifest, roots)).nearby == (path,)


def test_the_nano_models_files_are_not_offered_for_the_real_ones(
    manifest: Manifest, roots: list[Path]
) -> None:
    put_models(roots[0], manifest, "nano")
    assert missing(part(manifest, roots, "positive")).nearby == ()


def test_the_search_is_bounded(roots: list[Path]) -> None:
    sparse(roots[0] / "a/b/c/d/e/deep.pth", 1)
    for i in range(COUNTED):
        (roots[1] / f"{i:05}").touch()
    sparse(roots[1] / "later/many.pth", 1)
    nearby = Nearby(roots)
    assert nearby.named("deep.pth") == nearby.named("many.pth") == ()


def test_an_optional_part_is_there_or_left_out(manifest: Manifest, roots: list[Path]) -> None:
    model = replace(manifest.models["seedvr2-3b"], optional={"pose": "neg_emb.pt"})
    assert "pose" not in locate(manifest, model, roots)
    assert isinstance(locate(manifest, model, roots, every=True)["pose"], Missing)
    put(roots[0], manifest, "neg_emb.pt")
    pose = found(locate(manifest, model, roots)["pose"])
    assert pose.path.name == "neg_emb.pt"
