"""The tokenizer of the nano text encoder: UMT5's kind and special tokens, with few pieces.

A Unigram vocabulary as in UMT5's tokenizer.json: the special tokens, a piece for each byte (so that no
text is unknown), the characters of English, and frequent words, so that a prompt has about as many
tokens as it has with the real one. Every run writes the same bytes.
"""

from __future__ import annotations

import string

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

WORDS = """
a about above across after against air all along among an and animal animals are around as at autumn back
background be beach beautiful behind big bird birds black blue boat body bright brown building buildings
by calm camera car cat child city clear close close-up cloud clouds cold color colors cinematic dancing
dark day deep desert detail detailed distance dog down dramatic drone dust early evening eye eyes face
fast field fire flag flight floor flower flowers flying foam focus fog forest frame from front garden
gentle glass glow glowing gold golden grass gray green ground hair hand hands head high hill hills his
her horse house ice in into is it its lake landscape large leaves left lens light lights like line long
looking low machine man medium moon morning mountain mountains movement moves moving near neon night
ocean of off old on one orange out over overhead people person pink plane plant portrait purple rain
red reflecting reflection right river road robot rock rocks room rose running sand scene sea shadow
shadows ship shore shot side silver sky slow slowly small smoke snow soft space standing star stars still
stone storm street style sun sunlight sunset surface swimming table tall that the their there through to
top towards train tree trees turning turns two under up view village walking walks wall warm water wave
waves white wide wild wind window windows winter with woman wood wooden yellow young
"""
ENDINGS = ("ed", "er", "es", "ing", "ly")


def nano_tokenizer() -> str:
    """The content of the nano tokenizer.json."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"<0x{byte:02X}>", 0.0) for byte in range(256)]
    pieces += [
        (character, -6.0) for character in f"▁{string.ascii_letters}{string.digits}{string.punctuation}"
    ]
    pieces += [(f"▁{letter}", -9.0) for letter in string.ascii_letters if letter != "a"]
    pieces += [(f"▁{word}", -7.0) for word in sorted(set(WORDS.split()))]
    pieces += [(ending, -8.0) for ending in ENDINGS]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace("▁", prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace("▁", prepend_scheme="always")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return tokenizer.to_str(pretty=False)
