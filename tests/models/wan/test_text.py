"""The text encoder: a prompt is encoded once, alone and whole; T5 is there only when it is needed."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from app.boot.checkpoint import load
from app.errors import ConfigError, UsageError
from app.models.source import Source
from app.models.wan import embeddings, text
from app.models.wan.embeddings import EmbeddingCache
from app.models.wan.text import TextEncoder, text_encoder
from app.models.wan.tokenizer import LENGTH
from app.models.wan.umt5 import UMT5Encoder
from app.models.wan.umt5_config import UMT5_NANO, UMT5Config
from app.progress import Silent
from tests.golden import draw
from tools.nano_tokenizer import nano_tokenizer

CPU = torch.device("cpu")
HASH = "5" * 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "tokenizer.json").write_text(nano_tokenizer())
    model = draw(UMT5Encoder(UMT5_NANO), "text/").bfloat16()
    torch.save(model.state_dict(), folder / "t5.pth")
    return folder


class Loads:
    """Makes encoders of a folder's files; counts how often T5 is loaded."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.count = 0
        monkeypatch.setattr(text, "load", self._load)

    def _load(self, *arguments: Any, **settings: Any) -> Any:
        self.count += 1
        return load(*arguments, **settings)

    def encoder(self, cache: EmbeddingCache | None = None, **changes: Any) -> TextEncoder:
        weights = self.folder / "t5.pth"
        settings: dict[str, Any] = {
            "config": UMT5_NANO,
            "source": Source(weights, "torch", weights),
            "weights_sha256": HASH,
        }
        return text_encoder(
            tokenizer=self.folder / "tokenizer.json", device=CPU, cache=cache or EmbeddingCache(None),
            readers=2, progress=Silent(), **settings | changes,
        )  # fmt: skip


@pytest.fixture
def loads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Loads:
    return Loads(folder, monkeypatch)


@torch.inference_mode()
def test_an_embedding_is_what_the_padded_model_gives(loads: Loads, folder: Path) -> None:
    encoder = loads.encoder()
    prompts = ["A cat walks in the snow.", "", "x " * 700]
    found = encoder.encode(prompts)
    assert found.shape == (3, LENGTH, UMT5_NANO.dim)
    assert found.dtype == torch.bfloat16
    model = draw(UMT5Encoder(UMT5_NANO), "text/").bfloat16().float()
    for row, prompt in zip(found, prompts, strict=True):
        ids = encoder.tokens(prompt).ids
        padded = torch.zeros(1, LENGTH, dtype=torch.int64)
        padded[0, : len(ids)] = torch.tensor(ids)
        whole = model(padded, (torch.arange(LENGTH) < len(ids))[None])[0]
        assert ((row.float() - whole).norm() / whole.norm()) < 0.03
        assert row[len(ids) - 1].any()
        assert not row[len(ids) :].any()


def test_a_prompt_is_the_same_whatever_stands_beside_it(loads: Loads) -> None:
    together = loads.encoder().encode(["a cat", "a dog in the rain " * 20, "a cat"])
    alone = loads.encoder().encode(["a cat"])
    assert torch.equal(together[0], alone[0])
    assert torch.equal(together[2], alone[0])
    assert not torch.equal(together[1], alone[0])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32])
def test_what_t5_will_take_is_known_from_its_file(
    loads: Loads, folder: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    """In 8 bits, in which nothing computes, a file is half of what it becomes."""
    weights = torch.load(folder / "t5.pth", weights_only=True)
    torch.save({name: x.to(dtype) for name, x in weights.items()}, tmp_path / "t5.pth")
    encoder = loads.encoder(source=Source(tmp_path / "t5.pth", "torch", tmp_path / "t5.pth"))
    told = encoder.weights
    encoder.prepare()
    assert told == encoder.weights == encoder.nbytes > 0


def test_nothing_is_loaded_before_the_first_prompt(loads: Loads) -> None:
    encoder = loads.encoder()
    assert encoder.tokens("a cat").total == 3
    assert loads.count == 0
    assert encoder.nbytes == 0
    encoder.encode(["a cat"])
    assert loads.count == 1
    assert encoder.nbytes > 100_000


def test_a_repeated_prompt_never_touches_t5(loads: Loads, tmp_path: Path) -> None:
    encoder = loads.encoder(EmbeddingCache(tmp_path))
    first = encoder.encode(["a cat", ""])
    encoder.release()
    assert torch.equal(encoder.encode(["  a  cat\n", ""]), first)
    gone = Source(tmp_path / "gone.pth", "torch", tmp_path / "gone.pth")
    again = loads.encoder(EmbeddingCache(tmp_path), source=gone)
    assert torch.equal(again.encode(["", "a cat"]), first.flip(0))
    assert loads.count == 1


@pytest.mark.parametrize("change", ["prompt", "weights", "tokenizer", "version", "unknown weights"])
def test_whatever_changes_asks_t5_again(
    loads: Loads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    loads.encoder(EmbeddingCache(tmp_path)).encode(["a cat"])
    prompt = "a cat"
    weights: str | None = HASH
    if change == "prompt":
        prompt = "a Cat"
    elif change == "weights":
        weights = "6" * 64
    elif change == "tokenizer":
        changed = tmp_path / "changed"
        changed.mkdir()
        (changed / "tokenizer.json").write_text(nano_tokenizer().replace('"fire"', '"fires"') + "\n")
        (changed / "t5.pth").symlink_to(loads.folder / "t5.pth")
        loads.folder = changed
    elif change == "version":
        monkeypatch.setattr(embeddings, "VERSION", "umt5 2")
    else:
        weights = None
    loads.encoder(EmbeddingCache(tmp_path), weights_sha256=weights).encode([prompt])
    assert loads.count == 2


def test_unknown_weights_are_remembered_in_memory_alone(loads: Loads, tmp_path: Path) -> None:
    encoder = loads.encoder(EmbeddingCache(tmp_path), weights_sha256=None)
    encoder.encode(["a cat"])
    encoder.release()
    encoder.encode(["a cat"])
    assert loads.count == 1
    assert not list(tmp_path.iterdir())


def test_what_came_out_may_be_changed(loads: Loads) -> None:
    encoder = loads.encoder()
    first = encoder.encode(["a cat"])
    kept = first.clone()
    first.zero_()
    assert torch.equal(encoder.encode(["a cat"]), kept)


def test_release_gives_back_and_the_original_is_read_when_the_copy_is_gone(
    loads: Loads, tmp_path: Path
) -> None:
    staged = tmp_path / "t5.pth"
    shutil.copy(loads.folder / "t5.pth", staged)
    encoder = loads.encoder(source=Source(staged, "torch", loads.folder / "t5.pth"))
    encoder.encode(["a cat"])
    staged.unlink()
    encoder.release()
    assert encoder.nbytes == 0
    assert torch.equal(encoder.encode(["a dog"]), loads.encoder().encode(["a dog"]))


def test_offload_on_the_cpu_changes_nothing(loads: Loads) -> None:
    encoder = loads.encoder()
    encoder.offload()
    encoder.encode(["a cat"])
    before = encoder.nbytes
    encoder.offload()
    assert encoder.nbytes == before
    encoder.encode(["a dog"])
    assert loads.count == 1


def test_loaded_within_inference_mode_weights_can_still_be_moved(loads: Loads) -> None:
    encoder = loads.encoder()
    with torch.inference_mode():
        encoder.encode(["a cat"])
    assert encoder._model is not None
    encoder._model.float()
    assert encoder.encode(["a dog"]).dtype == torch.float32


def test_a_long_prompt_says_what_is_cut(loads: Loads) -> None:
    tokens = loads.encoder().tokens("snow " * 511 + "a FIRE burns")
    assert tokens.note is not None
    assert "12 characters" in tokens.note
    assert "a FIRE burns" in tokens.note
    assert loads.encoder().tokens("snow").note is None


@pytest.mark.parametrize(
    ("prompt", "code"),
    [("a\0", "prompt_invalid"), ("\udcff", "prompt_invalid"), ("a" * 30_000, "prompt_too_long")],
)
def test_bad_prompts_are_refused_before_t5_is_loaded(loads: Loads, prompt: str, code: str) -> None:
    for call in (loads.encoder().tokens, lambda bad: loads.encoder().encode([bad])):
        with pytest.raises(UsageError) as refused:
            call(prompt)
        assert refused.value.code == code
    assert loads.count == 0


def test_a_tokenizer_of_a_larger_model_is_refused(loads: Loads) -> None:
    small = UMT5Config(vocab=300, dim=64, attention_dim=64, hidden_dim=160, heads=4, layers=2)
    with pytest.raises(ConfigError, match=r"651 ids.*300") as refused:
        loads.encoder(config=small)
    assert refused.value.code == "tokenizer_wrong"


def test_damaged_weights_are_told_and_not_remembered(loads: Loads, tmp_path: Path) -> None:
    damaged = torch.load(loads.folder / "t5.pth", weights_only=True)
    damaged["norm.weight"][3] = torch.nan
    torch.save(damaged, tmp_path / "t5.pth")
    (tmp_path / "tokenizer.json").write_text(nano_tokenizer())
    loads.folder = tmp_path
    encoder = loads.encoder(EmbeddingCache(tmp_path / "cache"))
    for _ in range(2):
        with pytest.raises(ConfigError) as refused:
            encoder.encode(["a cat"])
        assert refused.value.code == "embedding_not_finite"
    assert not (tmp_path / "cache").exists()


def test_another_models_weights_are_refused(loads: Loads, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "t5.pth")
    (tmp_path / "tokenizer.json").write_text(nano_tokenizer())
    loads.folder = tmp_path
    with pytest.raises(ConfigError) as refused:
        loads.encoder().encode(["a cat"])
    assert refused.value.code == "checkpoint_tensors"


def test_the_same_bits_on_every_run(loads: Loads) -> None:
    prompt = "A cat walks slowly across the snow at sunset."
    assert torch.equal(loads.encoder().encode([prompt]), loads.encoder().encode([prompt]))
