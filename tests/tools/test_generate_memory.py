"""The tables of memory are what the modules really hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from app.models.wan.cache import KVCache
from app.models.wan.config import TransformerConfig
from app.models.wan.transformer import Transformer
from app.models.wan.umt5 import UMT5Encoder
from app.models.wan.umt5_config import UMT5_XXL
from tools.generate_memory import lengths_table, parts_table

TOOL = Path(__file__).resolve().parents[2] / "tools" / "generate_memory.py"


def test_the_tables_hold_what_the_modules_take() -> None:
    config = TransformerConfig()
    with torch.device("meta"):
        models = {"transformer": Transformer(config), "text encoder (T5)": UMT5Encoder(UMT5_XXL)}
        caches = {n: KVCache(config, config.tokens(60, 104), n, dtype=torch.bfloat16) for n in (12, 21)}
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in parts_table().splitlines()]
    sizes = {row[0]: row[1] for row in rows}
    for name, model in models.items():
        numbers = sum(parameter.numel() for parameter in model.parameters())
        assert sizes[name] == f"{2 * numbers / 1e9:.1f} GB"
    lengths = {row.split("|")[1].strip(): row.split("|") for row in lengths_table(480, 832).splitlines()}
    cross = 2 * 2 * config.layers * config.text_length * config.dim  # keys and values of a prompt
    for frames, seen in (("45", 12), ("81", 21), ("237", 21)):
        assert lengths[frames][3].strip() == str(seen)
        assert lengths[frames][4].strip() == f"{(caches[seen].nbytes + cross) / 1e9:.1f} GB"


def test_a_size_that_no_model_has_is_refused() -> None:
    ran = subprocess.run([sys.executable, TOOL, "--height", "481"], capture_output=True, text=True)
    assert ran.returncode == 2 and "multiples of 16" in ran.stderr
