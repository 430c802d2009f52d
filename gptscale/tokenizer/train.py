"""Train a byte-fallback BPE vocabulary on text.

The flags are the ones under which Hugging Face's `LlamaTokenizer` gives the same ids as sentencepiece, so that a model
exports with its tokenizer unchanged: BPE, no normalisation, no added prefix, no removed spaces, bytes for the rest.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from gptscale.runtime.errors import UserError
from gptscale.runtime.files import write_bytes_atomically
from gptscale.tokenizer.sentencepiece_model import SentencePieceTokenizer
from gptscale.tokenizer.special import END_OF_TEXT, FIM_TOKENS, PAD, SPECIAL_TOKENS, UNKNOWN
from gptscale.tokenizer.tokenizer import Tokenizer

_PASSAGE = 4096
"""Characters of a training passage. Passages end with a line where they can, so that pieces may span line ends."""
_NOT_LEARNT = str.maketrans("", "", "\u2581\u2585\x00")
"""sentencepiece writes spaces as U+2581, and drops a whole passage that holds U+2585 or NUL."""


def train_tokenizer(documents: Iterable[str], vocab_size: int, target: Path, fim: bool = False) -> Tokenizer:
    """Train on `documents` and write the model to `target`; the same documents give the same file.

    `vocab_size` counts everything: special tokens, the 256 byte pieces, learnt pieces. With `fim` the special tokens
    are those to fill in the middle, too. Raises UserError where the text
    cannot give that many, or has more different characters than fit, naming the nearest size that works.
    """
    special = SPECIAL_TOKENS + (FIM_TOKENS if fim else ())
    smallest = len(special) + 256  # and byte pieces: sentencepiece fails without sense below this
    model = io.BytesIO()
    failures: list[Exception] = []
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_noting(failures, _passages(documents)),
            model_writer=model,
            model_type="bpe",
            vocab_size=max(vocab_size, smallest),
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            unk_id=SPECIAL_TOKENS.index(UNKNOWN),
            unk_piece=UNKNOWN,
            bos_id=-1,
            eos_id=SPECIAL_TOKENS.index(END_OF_TEXT),
            eos_piece=END_OF_TEXT,
            pad_id=SPECIAL_TOKENS.index(PAD),
            pad_piece=PAD,
            control_symbols=[token for token in special if token not in (UNKNOWN, END_OF_TEXT, PAD)],
            max_sentence_length=16 * _PASSAGE,
            # Threads change neither the pieces nor (much) the time, but their number is written into the model.
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if failures:
            raise failures[0] from None
        raise _explained(error, vocab_size) from error
    if vocab_size < smallest:
        raise _too_small(vocab_size, smallest)
    write_bytes_atomically(target, model.getvalue())
    return SentencePieceTokenizer(model.getvalue(), str(target))


def _noting(failures: list[Exception], passages: Iterator[str]) -> Iterator[str]:
    """Keep what reading the text raises: sentencepiece makes a RuntimeError of it, its message within its own."""
    try:
        yield from passages
    except Exception as error:
        failures.append(error)
        raise


def _passages(documents: Iterable[str]) -> Iterator[str]:
    for document in documents:
        text = document.translate(_NOT_LEARNT)
        start = 0
        while start < len(text):
            stop = start + _PASSAGE
            if stop < len(text):
                line_end = text.rfind("\n", start, stop) + 1
                stop = line_end if line_end > start else stop
            yield text[start:stop]
            start = stop


def _explained(error: RuntimeError, vocab_size: int) -> Exception:
    """What sentencepiece says when the text and the vocabulary size do not go together, as the user's error it is."""
    message = str(error)
    if too_large := re.search(r"Vocabulary size too high.*value <= (\d+)", message):
        return UserError(
            f"tokenizer.vocab_size={vocab_size} is more than the text can fill\n"
            f"set tokenizer.vocab_size={too_large[1]} or less, or train on more text"
        )
    if too_small := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return _too_small(vocab_size, int(too_small[1]))
    if "sentences_.empty()" in message:
        return UserError(
            "data.sources: no text to train a tokenizer on\nname sources that hold text, and that data.filters leave"
        )
    return error


def _too_small(vocab_size: int, enough: int) -> UserError:
    return UserError(
        f"tokenizer.vocab_size={vocab_size} has no room for the text's characters\n"
        f"set tokenizer.vocab_size={enough} or more"
    )
