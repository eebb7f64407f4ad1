"""What a manifest may say, and what is refused with the line that says it."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.boot.manifest import BUILTIN, read_manifest
from app.errors import ConfigError

FILE = '[file."x.pth"]\npath = "a/x.pth"\nformat = "torch"\n'
SHA = "0123456789abcdef" * 4


@pytest.fixture
def own(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "own.toml"
        path.write_text(text)
        return path

    return write


def test_the_builtin_manifest_holds_what_was_published() -> None:
    manifest = read_manifest()
    dit = manifest.files["seedvr2_ema_7b.pth"]
    assert (dit.size, str(dit.path)) == (32958774606, "SeedVR/ckpts/SeedVR2-7B/seedvr2_ema_7b.pth")
    assert dit.origin is not None
    assert dit.origin.revision == "eb0c4281d41ba3767d4f14370f0e37e9e9180c16"
    assert dit.stage
    assert manifest.files["models_t5_umt5-xxl-enc-bf16.pth"].stage
    unknown = [name for name, entry in manifest.files.items() if entry.sha256 is None]
    assert [name for name in unknown if not name.startswith("nano/")] == [
        "UniAnimate-Wan2.1-14B-Lora-12000.ckpt",
        "sd-vae-ft-mse/config.json",
    ]


def test_each_seedvr2_uses_its_own_vae_and_all_share_the_3bs_prompts() -> None:
    manifest = read_manifest()
    for name, folder in [("seedvr2-3b", "3B"), ("seedvr2-7b", "7B"), ("seedvr2-7b-sharp", "7B")]:
        paths = {part: str(manifest.files[file].path) for part, file in manifest.models[name].parts.items()}
        assert paths["vae"] == f"SeedVR/ckpts/SeedVR2-{folder}/ema_vae.pth"
        assert paths["positive"] == "SeedVR/ckpts/SeedVR2-3B/pos_emb.pt"
        assert paths["negative"] == "SeedVR/ckpts/SeedVR2-3B/neg_emb.pt"


def test_the_3bs_published_16_bit_file_stands_in_for_nothing() -> None:
    """It was made from the superseded weights: taking it for the 3B would be a wrong result."""
    manifest = read_manifest()
    used = {other for entry in manifest.files.values() for other in entry.alternatives}
    parts = {file for model in manifest.models.values() for file in model.parts.values()}
    assert "seedvr2_ema_3b_fp16.safetensors" not in used | parts
    assert "seedvr2_ema_7b_fp16.safetensors" in used
    assert "superseded" in next(iter(manifest.files["seedvr2_ema_3b.pth"].superseded.values()))


def test_an_own_manifest_extends_and_overrides_whole_entries(own) -> None:
    path = own('[file."seedvr2_ema_7b.pth"]\npath = "mine/7b.pth"\nformat = "torch"\n' + FILE)
    manifest = read_manifest([path])
    assert str(manifest.files["seedvr2_ema_7b.pth"].path) == "mine/7b.pth"
    assert manifest.files["seedvr2_ema_7b.pth"].sha256 is None  # nothing of the old entry is left
    assert "x.pth" in manifest.files
    assert "seedvr2-3b" in manifest.models


def test_an_own_manifest_can_replace(own) -> None:
    model = '[model.mine]\ntask = "restore"\nfamily = "seedvr2"\n[model.mine.parts]\ndit = "x.pth"\n'
    manifest = read_manifest([own("replace = true\n" + FILE + model)])
    assert list(manifest.files) == ["x.pth"]
    assert list(manifest.models) == ["mine"]
    assert manifest.models["mine"].variant is None


REFUSED = {
    "not toml": ("[file.\n", "manifest_toml", ["line 1"]),
    "a table twice": (FILE + FILE, "manifest_toml", ["line 4", "x.pth"]),
    "unknown table": ('[files."x"]\npath = "x"\n', "manifest_key", ["line 1", "did you mean file?"]),
    "unknown key": (FILE + "sha265 = 1\n", "manifest_key", ["line 4", "sha265", "did you mean sha256?"]),
    "no path": ('\n[file."x"]\nformat = "torch"\n', "manifest_key", ["line 2", "lacks path"]),
    "no format": ('[file."x"]\npath = "x"\n', "manifest_key", ["line 1", "lacks format"]),
    "absolute": (FILE.replace("a/x", "/a/x"), "manifest_path", ["line 2", "'/a/x.pth'", "absolute"]),
    "drive": (FILE.replace("a/x", "C:/x"), "manifest_path", ["line 2", "absolute"]),
    "parent": (FILE.replace("a/x", "a/../../x"), "manifest_path", ["line 2", "'..'"]),
    "backslash": (FILE.replace('"a/x.pth"', "'a\\x.pth'"), "manifest_path", ["line 2", "backslash"]),
    "empty segment": (FILE.replace("a/x", "a//x"), "manifest_path", ["line 2", "empty segment"]),
    "trailing slash": (FILE.replace("a/x.pth", "a/"), "manifest_path", ["line 2", "empty segment"]),
    "dot": (FILE.replace("a/x", "./x"), "manifest_path", ["line 2", "'.'"]),
    "no name": (FILE.replace("a/x.pth", ""), "manifest_path", ["line 2", "empty segment"]),
    "control": (FILE.replace("a/x", "a\\u0000x"), "manifest_path", ["line 2", "control"]),
    "parent on the hub": (
        FILE + 'repo = "a/b"\nfilename = "../x"\n',
        "manifest_path",
        ["line 5", "filename", "'..'"],
    ),
    "sha in capitals": (FILE + f'sha256 = "{SHA.upper()}"\n', "manifest_value", ["line 4", "lower-case"]),
    "short sha": (FILE + 'sha256 = "abc"\n', "manifest_value", ["line 4", "'abc'", "64"]),
    "negative size": (FILE + "size = -1\n", "manifest_value", ["line 4", "-1", "bytes"]),
    "size zero": (FILE + "size = 0\n", "manifest_value", ["line 4", "1 or more"]),
    "size in words": (FILE + 'size = "12 GB"\n', "manifest_value", ["line 4", "'12 GB'"]),
    "format": (FILE.replace('"torch"', '"pickle"'), "manifest_value", ["line 3", "'pickle'", "safetensors"]),
    "branch": (
        FILE + 'repo = "a/b"\nrevision = "main"\nfilename = "x"\n',
        "manifest_value",
        ["line 5", "'main'", "full commit"],
    ),
    "repo": (FILE + 'repo = "https://x/a/b"\nfilename = "x"\n', "manifest_value", ["line 4", "owner/name"]),
    "half an origin": (FILE + 'repo = "a/b"\n', "manifest_value", ["line 1", "filename"]),
    "stage": (FILE + 'stage = "yes"\n', "manifest_value", ["line 4", "'yes'"]),
    "superseded key": (FILE + 'superseded = { abc = "old" }\n', "manifest_value", ["line 4", "64"]),
    "superseded itself": (
        FILE + f'sha256 = "{SHA}"\nsuperseded = {{ {SHA} = "old" }}\n',
        "manifest_value",
        ["line 1", "its own sha256"],
    ),
    "same path": (
        FILE + '[file."y"]\npath = "a/x.pth"\nformat = "data"\n',
        "manifest_same_path",
        ["line 5", '[file."y"]', '[file."x.pth"]', "line 1"],
    ),
    "same path as ours": (
        FILE.replace("a/x.pth", "checkpoints/ode_init.pt"),
        "manifest_same_path",
        ["line 2", "models.toml", "ode_init.pt"],
    ),
    "unknown alternative": (
        FILE + 'alternatives = ["y.pth"]\n',
        "manifest_unknown_file",
        ["line 4", "'y.pth'", "did you mean 'x.pth'?"],
    ),
    "alternative of itself": (FILE + 'alternatives = ["x.pth"]\n', "manifest_cycle", ["line 4", "'x.pth'"]),
    "alternatives in a circle": (
        FILE
        + 'alternatives = ["y"]\n[file.y]\npath = "y"\nformat = "torch"\nalternatives = ["z"]\n'
        + '[file.z]\npath = "z"\nformat = "torch"\nalternatives = ["x.pth"]\n',
        "manifest_cycle",
        ["line 4", "line 8", "line 12"],
    ),
    "unknown part": (
        '[model.m]\ntask = "restore"\nfamily = "f"\n[model.m.parts]\ndit = "seedvr2_ema_7b"\n',
        "manifest_unknown_file",
        ["line 5", "[model.m] parts.dit", "did you mean 'seedvr2_ema_7b.pth'?"],
    ),
    "no parts": (
        '[model.m]\ntask = "restore"\nfamily = "f"\nparts = {}\n',
        "manifest_value",
        ["line 4", "part"],
    ),
    "task": ('[model.m]\ntask = "upscale"\nfamily = "f"\nparts = {a = "x"}\n', "manifest_value", ["line 2"]),
    "model name": (
        '[model."a,b"]\ntask = "restore"\nfamily = "f"\nparts = {a = "x"}\n',
        "manifest_value",
        ["line 1", "letters"],
    ),
    "deep": (f"x = {'[' * 100_000}\n", "manifest_toml", []),
    "a number without end": (f"x = 1{'0' * 5000}\n", "manifest_toml", []),
    "a hexadecimal number without end": (f"{FILE}size = 0x1{'0' * 5000}\n", "manifest_value", ["line 4"]),
    "an empty file name": ('[file.""]\npath = "x"\nformat = "data"\n', "manifest_path", ["line 1"]),
    "a folder's name": ('[file."."]\npath = "x"\nformat = "data"\n', "manifest_path", ["line 1"]),
    "the root's name": ('[file."/"]\npath = "x"\nformat = "data"\n', "manifest_path", ["line 1"]),
    "a file named as pydantic marks keys": (
        '[file."[key]"]\npath = "x"\nformat = "data"\nsatge = true\n',
        "manifest_key",
        ["line 4", "did you mean stage?"],
    ),
    "a key named as pydantic marks keys": (FILE + '"[key]" = 1\n', "manifest_key", ["line 4", "[key]"]),
    "replace": ("replace = 1\n", "manifest_value", ["line 1", "replace"]),
    "replaced what a part needs": (
        'replace = true\n[model.m]\ntask = "restore"\nfamily = "f"\nparts = {a = "pos_emb.pt"}\n',
        "manifest_unknown_file",
        ["line 5", "'pos_emb.pt'"],
    ),
}


@pytest.mark.parametrize(("text", "code", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_with_the_line(own, text: str, code: str, words: list[str]) -> None:
    path = own(text)
    with pytest.raises(ConfigError) as caught:
        read_manifest([path])
    assert caught.value.code == code
    for word in [str(path), *words]:
        assert word in caught.value.message, caught.value.message


def test_every_wrong_key_is_told_at_once(own) -> None:
    with pytest.raises(ConfigError) as caught:
        read_manifest([own(FILE + 'size = -1\nsha256 = "x"\nsatge = true\n')])
    assert [word in caught.value.message for word in ("line 4", "line 5", "line 6")] == [True] * 3


def test_a_manifest_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml.*No such file") as caught:
        read_manifest([tmp_path / "nowhere.toml"])
    assert caught.value.code == "manifest_unreadable"


def test_a_manifest_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_bytes(b"# fine\n\xff\xfe")
    with pytest.raises(ConfigError, match="line 2: not UTF-8"):
        read_manifest([path])


def test_the_builtin_manifest_is_at_the_repository_root() -> None:
    assert BUILTIN.name == "models.toml"
    assert (BUILTIN.parent / "pyproject.toml").exists()


def test_a_part_is_optional_or_not(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    files = '[file.a]\npath = "a"\nformat = "torch"\n'
    model = '[model.m]\ntask = "generate"\nfamily = "wan"\nparts = {t5 = "a"}\noptional = {%s = "%s"}\n'
    path.write_text(files + model % ("pose", "a"))
    assert read_manifest([path]).models["m"].optional == {"pose": "a"}
    path.write_text(files + model % ("t5", "a"))
    with pytest.raises(ConfigError, match="names t5 among its parts and as optional"):
        read_manifest([path])
    path.write_text(files + model % ("pose", "b"))
    with pytest.raises(ConfigError, match=r"optional.pose names 'b', which no manifest lists"):
        read_manifest([path])
