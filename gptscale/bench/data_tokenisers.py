"""Who makes ids of text, and how fast."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from gptscale.bench.data_turns import OURS, Say, Turns
from gptscale.bench.readers.tokenisers import Encoded
from gptscale.config.schema import BenchDataConfig

TOKENISERS = {
    "gptscale": "gptscale prepare, one process: reading, hashing and writing included",
    "gptscale×2": "the same, two processes",
    "sentencepiece": "sentencepiece alone, the same model: encode(documents, return_type='numpy', num_threads=1)",
    "tokenizers": "Hugging Face tokenizers, byte-level BPE: encode_batch_fast, RAYON_NUM_THREADS=1",
    "tiktoken": "tiktoken, the same byte-level BPE: encode_to_numpy",
}
_BYTE_LEVEL = ("tokenizers", "tiktoken")


def measure_tokenisers(
    turns: Turns, bench: BenchDataConfig, folder: Path, texts: list[str], names: Sequence[str], say: Say
) -> dict[str, list[Encoded]]:
    """`texts` are JSON lines, and `folder` has the `tokenizer.model`. Raises NotAvailableError where ours fails."""
    found: dict[str, list[Encoded]] = {name: [] for name in names}
    for name in turns.taking_part([name for name in names if name in _BYTE_LEVEL]):
        if not (folder / "tokenizer.json").exists():
            say("training a byte-level tokenizer of the same size")
            with turns.leaving_out(name):
                turns.take(
                    "tokenisers",
                    "tokenisers",
                    "train_byte_level",
                    text_files=texts[:1],
                    vocab_size=bench.vocab_size,
                    target=str(folder / "tokenizer.json"),
                )
    for number in range(bench.rounds):
        say(f"tokenizers: round {number + 1} of {bench.rounds}")
        for name in turns.taking_part(names, number):
            with turns.leaving_out(name):
                found[name].append(_encoded(turns, name, folder, texts))
    return {name: samples for name, samples in found.items() if name not in turns.left_out}


def _encoded(turns: Turns, name: str, folder: Path, texts: list[str]) -> Encoded:
    answer: Encoded
    if name.startswith(OURS):
        target, workers = folder / "prepared", 2 if name.endswith("×2") else 1
        shutil.rmtree(target, ignore_errors=True)
        model = str(folder / "tokenizer.model")
        answer = turns.take(None, "ours", "prepare", texts=texts, tokenizer=model, target=str(target), workers=workers)
    else:
        model = str(folder / ("tokenizer.json" if name in _BYTE_LEVEL else "tokenizer.model"))
        answer = turns.take("tokenisers", "tokenisers", "encode", kind=name, model=model, text_files=texts)
    return answer
