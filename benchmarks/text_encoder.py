#!/usr/bin/env python3
"""How soon the text encoder is ready: Seedpod's own module against transformers' UMT5.

    python benchmarks/text_encoder.py [--repeat 5] [--quick]

Each run is a process of its own, the two taking turns on the same machine. Measured is what comes before
the weights, which both read alike: torch is imported first (whoever runs a model has it), then the
module's own imports, then the build of UMT5-XXL on the meta device, then the tokenizer (nano's, as the
published one is not in the repository); "ready" is their sum. "encode" is one pass of a small encoder of
the same shape over 512 tokens, in seconds of one core: the clock would count what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

COMMON = """
import json, sys, time
import torch
from pathlib import Path
torch.set_grad_enabled(False)
torch.set_num_threads(1)
clock = time.perf_counter
at = [clock()]
"""
OWN = """
from app.models.wan.umt5 import UMT5Encoder
from app.models.wan.umt5_config import UMT5_XXL, UMT5Config
at.append(clock())
with torch.device("meta"):
    model = UMT5Encoder(UMT5_XXL)
at.append(clock())
from app.models.wan.tokenizer import Tokenizer
Tokenizer(Path(sys.argv[1]))
at.append(clock())
small = UMT5Encoder(UMT5Config(vocab=768, dim=512, attention_dim=512, hidden_dim=1024, heads=8, layers=8))
encode = lambda ids, mask: small(ids, mask)
"""
TRANSFORMERS = """
from transformers import UMT5Config, UMT5EncoderModel
at.append(clock())
sizes = dict(feed_forward_proj="gated-gelu", d_kv=64)
with torch.device("meta"):
    model = UMT5EncoderModel(
        UMT5Config(vocab_size=256384, d_model=4096, d_ff=10240, num_layers=24, num_heads=64, **sizes))
at.append(clock())
from transformers import PreTrainedTokenizerFast
PreTrainedTokenizerFast(tokenizer_file=sys.argv[1], pad_token="<pad>", eos_token="</s>")
at.append(clock())
small = UMT5EncoderModel(
    UMT5Config(vocab_size=768, d_model=512, d_ff=1024, num_layers=8, num_heads=8, **sizes)).eval()
encode = lambda ids, mask: small(input_ids=ids, attention_mask=mask).last_hidden_state
"""
END = """
ids = torch.zeros(1, 512, dtype=torch.int64)
mask = (torch.arange(512) < 40).long()[None]
encode(ids, mask)
begin = time.process_time()
for _ in range(3):
    encode(ids, mask)
took = (time.process_time() - begin) / 3
seconds = [end - start for start, end in zip(at, at[1:])]
print(json.dumps(dict(zip(["import", "build", "tokenizer", "encode"], [*seconds, took]))))
"""
SIDES = {"own": OWN, "transformers": TRANSFORMERS}
STEPS = ("import", "build", "tokenizer", "encode")


def main(repeat: int) -> None:
    """Print the median seconds of each step and side, and their ratio."""
    from tools.nano_tokenizer import nano_tokenizer

    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tokenizer.json"
        tokenizer.write_text(nano_tokenizer())
        for turn in range(repeat + 1):
            for side, code in SIDES.items():
                found = _run(COMMON + code + END, tokenizer)
                if turn:  # the first fills the page cache
                    runs[side].append(found)
    print(
        f"{platform.machine()}, Python {platform.python_version()}, {repeat} processes each, median seconds"
    )
    print(f"{'':10} {'own':>9} {'transformers':>13} {'ratio':>7}")
    for step in STEPS:
        _row(step, {side: [run[step] for run in runs[side]] for side in SIDES})
    _row("ready", {side: [sum(run[step] for step in STEPS[:3]) for run in runs[side]] for side in SIDES})


def _row(label: str, seconds: dict[str, list[float]]) -> None:
    own, theirs = (statistics.median(seconds[side]) for side in SIDES)
    print(f"{label:10} {own:9.4f} {theirs:13.4f} {theirs / own:7.1f}")


def _run(code: str, tokenizer: Path) -> dict[str, float]:
    command = [sys.executable, "-c", code, str(tokenizer)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    arguments.add_argument("--repeat", type=int, default=5)
    arguments.add_argument("--quick", action="store_true", help="once: see that it runs")
    options = arguments.parse_args()
    main(1 if options.quick else options.repeat)
