"""A sentencepiece model with byte fallback.

sentencepiece writes a space as U+2581 ("▁") inside its pieces and cannot tell a real U+2581 from a space. So text is
cut at each U+2581 before it reaches sentencepiece, and the character is written as the three byte pieces of its UTF-8.
What is left is encoded word by word where that gives the same ids (`gptscale.tokenizer.words`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from gptscale.runtime.errors import UserError
from gptscale.tokenizer.special import END_OF_TEXT
from gptscale.tokenizer.tokenizer import LONGEST_RUN, PROBE, Ids, Tokenizer
from gptscale.tokenizer.words import WordEncoder, word_pattern

_FORMAT: Any = sentencepiece_model_pb2
"""Its classes are made as it is imported, and so nothing is known of them beforehand."""
_SPACE_MARK = "\u2581"


class SentencePieceTokenizer(Tokenizer):
    file_name = "tokenizer.model"

    def __init__(self, model: bytes, name: str) -> None:
        """`name` is what errors call the model. Raises UserError for a model that does not give text back exactly."""
        try:
            if not model:
                raise RuntimeError("empty")
            processor: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(
                f"{name}: not a sentencepiece model\nname a tokenizer.model that gptscale trained, or a tokenizer.json"
            ) from error
        self._processor = processor
        special = {
            processor.id_to_piece(token): token
            for token in range(processor.get_piece_size())
            if processor.is_control(token) or processor.is_unknown(token)
        }
        if END_OF_TEXT not in special or processor.piece_to_id("<0x00>") == processor.unk_id():
            raise UserError(
                f"{name}: the model lacks the control token {END_OF_TEXT} or the 256 byte pieces\n"
                "use a tokenizer.model that gptscale trained (`gptscale prepare` without tokenizer.path trains one)"
            )
        described = _FORMAT.ModelProto.FromString(model)
        if described.normalizer_spec.precompiled_charsmap:
            raise _refusal(name)
        # The ids of a word do not depend on what is around it. Of the other kind, unigram, scores are added up over the
        # whole text, and a tie might be decided by how a sum was rounded.
        merges_pairs = described.trainer_spec.model_type == _FORMAT.TrainerSpec.BPE
        pattern = word_pattern(_learnt(processor)) if merges_pairs else None
        self._encode_runs: Callable[[Sequence[str]], Sequence[npt.NDArray[Any]]] = (
            self._encode_whole if pattern is None else WordEncoder(pattern, self._encode_whole)
        )
        super().__init__(model, _bytes_of_pieces(processor), special, special[END_OF_TEXT])
        self._space_mark_ids = np.array(
            [processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()], dtype=np.uint32
        )
        if self.decode(self.encode(PROBE)) != PROBE:
            raise _refusal(name)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        runs: list[str] = []
        plans: list[list[int]] = []
        """For each text the indices of its runs; -1 stands for a U+2581 between them."""
        for text in texts:
            plan: list[int] = []
            for between, stretch in enumerate(text.split(_SPACE_MARK)):
                if between:
                    plan.append(-1)
                for run in _runs(stretch):
                    plan.append(len(runs))
                    runs.append(run)
            plans.append(plan)
        try:
            encoded = self._encode_runs(runs) if runs else []
        except TypeError:
            for run in runs:
                run.encode()  # says what is wrong and where: sentencepiece does not
            raise
        return [self._joined(plan, encoded) for plan in plans]

    def _encode_whole(self, texts: Sequence[str]) -> Sequence[npt.NDArray[np.int32]]:
        found: Sequence[npt.NDArray[np.int32]] = self._processor.encode(texts, return_type="numpy", num_threads=1)
        return found

    def _joined(self, plan: list[int], encoded: Sequence[npt.NDArray[Any]]) -> Ids:
        if len(plan) == 1 and plan[0] >= 0:
            return encoded[plan[0]].view(np.uint32)
        parts = [self._space_mark_ids if run < 0 else encoded[run].view(np.uint32) for run in plan]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint32)


def _runs(text: str) -> list[str]:
    """`text` in stretches short enough for sentencepiece, each ending with a line where there is one; [] if empty."""
    if len(text) <= LONGEST_RUN:
        return [text] if text else []
    runs = []
    start = 0
    while start < len(text):
        stop = min(len(text), start + LONGEST_RUN)
        if stop < len(text):
            line_end = text.rfind("\n", start, stop) + 1
            stop = line_end if line_end > start else stop
        runs.append(text[start:stop])
        start = stop
    return runs


def _learnt(processor: Any) -> list[str]:
    """The text of every piece that text can be made of, bytes aside."""
    return [
        processor.id_to_piece(token).replace(_SPACE_MARK, " ")
        for token in range(processor.get_piece_size())
        if not (processor.is_control(token) or processor.is_unknown(token) or processor.is_byte(token))
    ]


def _refusal(name: str) -> UserError:
    return UserError(
        f"{name}: the model changes text (it normalises, adds or drops spaces)\n"
        "train with normalization_rule_name=identity, add_dummy_prefix=false, remove_extra_whitespaces=false"
    )


def _bytes_of_pieces(processor: Any) -> list[bytes]:
    def of(token: int) -> bytes:
        if processor.is_control(token) or processor.is_unknown(token):
            return b""
        piece: str = processor.id_to_piece(token)
        if processor.is_byte(token):
            return bytes([int(piece[1:-1], 16)])  # "<0x41>"
        return piece.replace(_SPACE_MARK, " ").encode()

    return [of(token) for token in range(processor.get_piece_size())]
