"""Settings → torch's switches, the data, the model."""

from __future__ import annotations

import inspect
import logging
import os
import platform
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from gptscale.checkpoint.trained import COMPUTE_TYPES
from gptscale.config.names import corpus_names
from gptscale.config.schema import CorpusConfig, DataConfig, PrecisionConfig, TrainRoot
from gptscale.config.stages import as_corpora, longest_sequence
from gptscale.config.step_plan import step_plan
from gptscale.data.block_order import shuffle_of
from gptscale.data.cache import ShardCache
from gptscale.data.heldout import HeldoutBatches, heldout_sources
from gptscale.data.prepare import corpus_folder
from gptscale.data.remote import cache_for, open_corpus
from gptscale.data.stages import StageText
from gptscale.data.stream import TrainingStream
from gptscale.data.transfer import Check, go_on
from gptscale.evaluate.heldout import HeldoutSet
from gptscale.model.compiling import compile_blocks
from gptscale.model.gpt import GPT
from gptscale.model.init import initialise
from gptscale.parallel.ranks import Ranks
from gptscale.runtime.errors import UserError
from gptscale.tokenizer import Tokenizer

LOG = logging.getLogger("gptscale.train")


def prepare_torch(settings: TrainRoot, ranks: Ranks) -> None:
    """Threads, the precision of fp32 products, and determinism where it is asked for.

    Raises UserError, on every rank, where the device cannot compute as `precision` says.
    """
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    use_precision(settings.precision, ranks)
    if settings.run.deterministic and torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def use_precision(precision: PrecisionConfig, ranks: Ranks) -> None:
    """Check the compute type against the device, and set whether fp32 products may use TF32."""
    on_gpu = ranks.device.type == "cuda"
    if precision.compute == "fp16" and not on_gpu:
        raise UserError(
            "precision.compute=fp16 needs a GPU: a CPU computes it slower than fp32\n"
            "use precision=bf16 or precision=fp32 on the CPU"
        )
    if precision.compute == "bf16" and not on_gpu and emulates_bf16() and ranks.rank == 0:
        LOG.warning("precision.compute=bf16 is emulated by this CPU, many times slower than precision=fp32")
    if precision.tf32 and not on_gpu and ranks.rank == 0:
        LOG.warning("precision.tf32 is ignored on a CPU: its fp32 products are fp32")
    if precision.tf32 and on_gpu:
        # Torch's newer switch, `backends.cuda.matmul.fp32_precision`, is not for mixing with code that reads the older.
        torch.set_float32_matmul_precision("high")


def emulates_bf16() -> bool:
    """Whether this CPU is an x86 one without instructions that multiply bf16."""
    return platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_avx512_bf16_supported()


def build_model(settings: TrainRoot, vocab_size: int, whole: bool = True) -> GPT:
    """The model on the CPU with its initial weights, the same on every layout. Blocks are compiled as they train.

    Not `whole`: on the meta device, for `gptscale.parallel.spread` to make the part that a rank keeps.
    """
    length = longest_sequence(settings.data)
    with nullcontext() if whole else torch.device("meta"):
        model = GPT(settings.model, vocab_size, length, COMPUTE_TYPES[settings.precision.compute])
    model.activation_checkpointing = settings.parallel.activation_checkpointing
    model.checkpoint_interval = settings.parallel.checkpoint_interval
    if whole:
        initialise(model, settings.run.seed)
    if settings.data.document_mask:
        check_blocks(model, settings.model.block)
    if settings.train.compile == "block":
        compile_blocks(model)
    return model


def check_blocks(model: GPT, name: str) -> None:
    """Raises UserError where a block of the user's own knows nothing of documents."""
    if any("documents" not in inspect.signature(block.forward).parameters for block in model.blocks):
        raise UserError(
            f"data.document_mask=true, but the block {name} takes no documents\n"
            "give its forward an argument `documents`, as gptscale.model.gpt.Block has, or set data.document_mask=false"
        )


@dataclass(frozen=True)
class Corpora:
    """The prepared text of a run, as one rank reads it."""

    folders: tuple[CorpusConfig, ...]
    stream: TrainingStream
    heldout: tuple[HeldoutSet, ...]
    """Of these folders, in their order, and then those that `evaluation.sets` names."""
    tokenizer: Tokenizer
    stages: tuple[StageText, ...] = ()
    cache: ShardCache | None = None
    """Of what lies in stores; None where nothing does."""

    @property
    def tokenizer_sha256(self) -> str:
        return self.tokenizer.sha256

    @property
    def vocab_size(self) -> int:
        return self.stream.vocab_size


def open_corpora(settings: TrainRoot, ranks: Ranks, check: Check = go_on) -> Corpora:
    """Open and check all prepared text. Raises UserError naming what is missing or damaged.

    `check` is asked, then and later, while something is fetched from a store.
    """
    folders = corpus_configs(settings)
    stream = open_stream(settings, check)
    stages, cache = stage_texts(settings, folders), stream.cache
    if cache is None:
        cache = cache_for(settings.data, [chosen.path for chosen in settings.evaluation.sets], check)
    if ranks.rank == 0:
        warn_of_little_room(settings.data, stream)
        if settings.model.depth is not None and stream.vocab_size != settings.tokenizer.vocab_size:
            LOG.warning(
                f"model.depth={settings.model.depth} found its tokens, batch and rate for "
                f"tokenizer.vocab_size={settings.tokenizer.vocab_size}, and the text has a vocabulary of "
                f"{stream.vocab_size}: set tokenizer.vocab_size={stream.vocab_size}"
            )
    heldout = tuple(open_heldout(settings, folders, stream, ranks, cache))
    return Corpora(folders, stream, heldout, Tokenizer.load(stream.tokenizer_path), stages, cache)


def warn_of_little_room(data: DataConfig, stream: TrainingStream) -> None:
    """Where an order that draws from all shards at once would fetch each of them again and again."""
    room, block, in_shard = data.cache_bytes, data.block_sequences, stream.sequences_in_remote_shard
    if room is None or stream.remote_bytes <= room:
        return
    if data.order == "full":
        LOG.warning(
            f"data.cache_bytes={room} holds a part of the {stream.remote_bytes:,} bytes of shards in stores, and "
            "data.order=full draws from all of them: each is fetched many times; set data.order=block, or more bytes"
        )
    elif 2 * block <= in_shard:  # shards are fetched whole, and each of its blocks has a time of its own
        LOG.warning(
            f"data.block_sequences={block} is a part of a shard in the store, which holds {in_shard} sequences: each "
            f"shard is fetched up to {in_shard // block} times an epoch; begin with data.block_sequences={in_shard}"
        )


def stage_texts(settings: TrainRoot, folders: tuple[CorpusConfig, ...]) -> tuple[StageText, ...]:
    """What each stage reads and from which sample on, where a run begins with `folders`."""
    corpora, seed = folders, settings.run.seed
    found = []
    for number, (stage, start) in enumerate(zip(settings.data.stages, step_plan(settings).stages, strict=True)):
        corpora = corpora if stage.path is None else as_corpora(stage.path)
        seed = seed if stage.seed is None else stage.seed
        found.append(StageText(start.samples, corpora, start.sequence_length, seed, f"data.stages[{number}]"))
    return tuple(found)


def open_stream(settings: TrainRoot, check: Check = go_on, few: bool = False) -> TrainingStream:
    """The training samples of a run: position → row, whatever the ranks. Of text in a store, `few` of them without
    their shards. Raises UserError.
    """
    data, folders = settings.data, corpus_configs(settings)
    stages = stage_texts(settings, folders)
    paths = [corpus.path for corpora in (folders, *(stage.corpora for stage in stages)) for corpus in corpora]
    return TrainingStream(
        folders,
        data.sequence_length,
        settings.run.seed,
        data.verify,
        data.document_mask,
        shuffle_of(data),
        stages,
        exact=data.mixture == "exact",
        packed=data.packing == "best_fit",
        boundary_loss=data.boundary_loss,
        cache=cache_for(data, paths, check),
        few=few,
    )


def open_heldout(
    settings: TrainRoot,
    folders: tuple[CorpusConfig, ...],
    stream: TrainingStream,
    ranks: Ranks,
    cache: ShardCache | None,
) -> Iterator[HeldoutSet]:
    """Held-out text as this rank evaluates it."""

    def batches(folder: str, sequences: int | None, source: str | None = None) -> HeldoutBatches:
        limit = settings.evaluation.sequences if sequences is None else sequences
        length, micro_batch = settings.data.sequence_length, settings.train.micro_batch
        documents, boundaries = settings.data.document_mask, settings.data.boundary_loss
        rank, size = ranks.at.data, ranks.topology.data
        return HeldoutBatches(folder, length, micro_batch, limit, rank, size, documents, source, boundaries, cache)

    if settings.data.verify:  # once a folder, however many sets it makes
        for path in dict.fromkeys(
            [*(corpus.path for corpus in folders), *(one.path for one in settings.evaluation.sets)]
        ):
            open_corpus(path, "heldout", verify=True, cache=cache)
    if len(folders) == 1:
        taken = yield from by_source(folders[0].path, batches, cache)
    else:
        taken = list(corpus_names(settings.data))
        for corpus, name, share in zip(folders, taken, stream.shares, strict=True):
            yield HeldoutSet(batches(corpus.path, None), name, share)
    for chosen in settings.evaluation.sets:
        if chosen.name in taken:
            raise UserError(
                f"evaluation.sets: {chosen.name} is the name of one of the run's own sources\ngive the set another name"
            )
        opened = batches(chosen.path, chosen.sequences)
        if opened.tokenizer_sha256 != stream.tokenizer_sha256:
            raise UserError(
                f"evaluation.sets: {chosen.path} was prepared with another tokenizer than {folders[0].path}\n"
                f"prepare it with tokenizer.path={stream.tokenizer_path}"
            )
        yield HeldoutSet(opened, chosen.name)


def by_source(
    folder: str, batches: Callable[[str, int | None, str | None], HeldoutBatches], cache: ShardCache | None
) -> Generator[HeldoutSet, None, list[str]]:
    """The held-out text of one folder: a set for each source, where it has several. Together they are what one set
    would be, and each weighs what it has of it. Returns the sources' names."""
    sources = heldout_sources(folder, cache)
    if len(sources) < 2:
        yield HeldoutSet(batches(folder, None, None), None, 1.0)
        return []
    opened = {name: batches(folder, None, name) for name in sources}
    loss_tokens = sum(part.loss_tokens for part in opened.values())
    for name, part in opened.items():
        if part.loss_tokens:
            yield HeldoutSet(part, name, part.loss_tokens / loss_tokens)
        else:
            LOG.warning(f"{name} has too little held-out text to be among the evaluated: evaluation.sequences is small")
    return list(sources)


def corpus_configs(settings: TrainRoot) -> tuple[CorpusConfig, ...]:
    """Where the prepared text is: `data.path`, else where `data.sources` were prepared."""
    data: DataConfig = settings.data
    if data.path is None:
        return (CorpusConfig(str(corpus_folder(data, settings.tokenizer))),)
    return as_corpora(data.path)
