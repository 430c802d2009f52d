"""A public model's kind of vocabulary, from text to text: prepared, trained with, resumed, generated with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gptscale.config.schema import DataConfig, SourceConfig, TokenizerConfig
from gptscale.data.prepare import prepare
from tests.helpers.training import exact_part, read_metrics, run_training, small_run, write_corpus

GPTSCALE = str(Path(sys.executable).parent / "gptscale")


def test_a_tokenizer_json_goes_the_whole_way(tmp_path: Path) -> None:
    text = write_corpus(tmp_path)
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=384, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    library.train([str(text)], trainer)
    library.save(str(tmp_path / "tokenizer.json"))
    data = DataConfig((SourceConfig(path=str(text)),), heldout_fraction=0.1, workers=1)
    done = prepare(data, TokenizerConfig(path=str(tmp_path / "tokenizer.json")), tmp_path / "corpus")
    assert done.train.vocab_size == library.get_vocab_size()
    assert done.train.end_of_text == 0
    kept = (tmp_path / "tokenizer.json").read_bytes()
    assert (tmp_path / "corpus/tokenizer.json").read_bytes() == kept

    settings = small_run(tmp_path / "corpus", tmp_path / "whole")
    run_training(settings, 1, tmp_path)
    half = small_run(tmp_path / "corpus", tmp_path / "half")
    run_training([*half, "train.steps=8", "schedule.total_steps=12"], 1, tmp_path)
    run_training(half, 1, tmp_path)
    assert exact_part(read_metrics(tmp_path / "half")[-5:]) == exact_part(read_metrics(tmp_path / "whole")[-5:])
    assert all(line["eval/bits_per_byte"] > 0 for line in read_metrics(tmp_path / "whole") if "eval/loss" in line)
    assert (tmp_path / "whole/tokenizer.json").read_bytes() == kept
    generated = subprocess.run(
        [GPTSCALE, "generate", f"source={tmp_path}/whole", "prompt=the model", "generate.max_new_tokens=8"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert generated.stdout.strip()
    library.add_special_tokens(["<|other|>"])
    library.save(str(tmp_path / "whole/tokenizer.json"))
    refused = subprocess.run(
        [GPTSCALE, "generate", f"source={tmp_path}/whole", "prompt=the"], capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert "tokenizer.json is not the tokenizer that this model was trained with" in refused.stderr
