"""Every setting there is, typed: one dataclass a Hydra group. Values are checked in `build` and `rules`; no torch here.

A `None` default means "derived": the text below it says from what.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Option = bool | int | float | str | None
"""What a setting of a user's own part may be."""

Activation = Literal["gelu", "swiglu", "relu2"]

Checkpointing = Literal["none", "selective", "full"]

MIN_LOSS_SCALE = 1.0
"""No loss scale of fp16 falls below this: what overflows unscaled is a divergence, which the guard counts."""


@dataclass(frozen=True)
class RunConfig:
    name: str | None = None
    """Default: the chosen experiment's name. Never a time: starting a run again must find it again."""
    dir: str | None = None
    """Default: `runs/<name>`."""
    resume: str = "auto"
    """`auto`, `never`, or the path of a checkpoint."""
    seed: int = 0
    deterministic: bool = False
    """Refuse kernels whose result depends on timing (GPU; on a CPU everything is deterministic anyway)."""


@dataclass(frozen=True)
class ModelConfig:
    block: str = "gpt"
    """What a layer is: `gpt`, or one of your own."""
    block_options: dict[str, Option] = field(default_factory=dict)
    """Settings of a block of your own."""
    depth: int | None = None
    """One dial for a family of models: layers, width, heads, batch, learning rate, warm-up and tokens follow from it
    unless they are set (`gptscale.config.depth`). Goes with `model=depth`."""
    layers: int = 4
    width: int = 128
    heads: int = 4
    head_width: int | None = None
    """Features of a head. Default: width / heads."""
    kv_heads: int | None = None
    """Grouped-query attention: key/value heads. Default: `heads`."""
    attention_pattern: tuple[Literal["full", "window"], ...] = ("full",)
    """How far layers look back, repeated over the depth: `[full,window]` is GPT-3's alternation."""
    window: int | None = None
    """Tokens that a `window` layer sees, the current one included."""
    qk_norm: bool = False
    """RMSNorm over each head's queries and keys, before their rotation."""
    feedforward_width: int | None = None
    """Default: 4 · width for GELU and ReLU²; 8/3 · width for SwiGLU (equal parameters), up to a multiple of 32."""
    positions: Literal["learned", "rope"] = "learned"
    rope_theta: float = 10_000.0
    rope_scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    """How frequencies are changed for contexts `rope_factor` times as long as `rope_original_length`."""
    rope_factor: float = 1.0
    rope_original_length: int | None = None
    """The sequence length that the frequencies were trained with; `llama3` and `yarn` need it."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_epsilon: float = 1e-5
    feedforward: Activation = "gelu"
    experts: int = 0
    """Feed-forwards of a layer, of which each token passes a few. 0: one, for all tokens. Experts have no biases."""
    experts_per_token: int = 2
    """How many of them, chosen by a router."""
    shared_experts: int = 0
    """As many more that every token passes."""
    expert_width: int | None = None
    """Hidden features of an expert. Default: `feedforward_width`."""
    expert_layers: tuple[Literal["experts", "dense"], ...] = ("experts",)
    """Which layers have experts, repeated over the depth: `[dense,experts]` is every other one."""
    expert_capacity: float = 0.0
    """In training an expert takes the first tokens of a row that chose it, up to this many times an even share, and the
    others do without. 0: it takes all."""
    balance_loss: float = 0.01
    """Weight of the loss that spreads the tokens of a row over experts. Not part of the loss that is shown."""
    router_z_loss: float = 0.001
    """Weight of log² of the router's denominator, likewise."""
    bias: bool = True
    """Biases on projections (and on LayerNorm)."""
    qkv_bias: bool | None = None
    """Biases on queries, keys and values. Default: as `bias`."""
    tied_embeddings: bool = True
    embedding_scale: float = 1.0
    """Token embeddings are multiplied by this, before positions are added."""
    logit_softcap: float = 0.0
    """c: logits become c · tanh(logits / c). 0 turns it off."""
    z_loss: float = 0.0
    """Weight of log² of the softmax's denominator, which keeps logits near zero. Not part of the loss that is shown."""
    dropout: float = 0.0
    init_std: float = 0.02
    """Normal init; projections into the residual stream are scaled by 1/√(2·layers) (GPT-2, section 2.3)."""
    vocab_multiple: int = 128
    """The vocabulary is padded up to a multiple of this, in every layout; export cuts the padding off."""
    loss_chunk: int = 1024
    """Tokens whose logits exist at one time. Changes memory and speed, not the result beyond float order."""


@dataclass(frozen=True)
class TokenizerConfig:
    vocab_size: int = 4096
    """Pieces, special tokens and the 256 byte pieces included."""
    path: str | None = None
    """A trained `tokenizer.model`, or a public model's `tokenizer.json`, to use in place of training one."""
    training_bytes: int = 20_000_000
    """Most text to train the tokenizer on: documents are sampled evenly over the corpus until this much is taken."""


@dataclass(frozen=True)
class SourceConfig:
    """Text to prepare."""

    name: str | None = None
    """What the manifest calls it, and held-out loss by source. Default: from its path or format."""
    path: str = ""
    """A file, a folder, a glob, a Hugging Face dataset (`format=huggingface`), or unused (`stdlib`, `debian`)."""
    format: str = "auto"
    """`auto`, `jsonl`, `parquet`, `text`, `files`, `huggingface`, `stdlib`, `debian`, one of your own; or of token ids
    that `tokenizer.path` made: `megatron`, `tokens`."""
    weight: float = 1.0
    text_key: str = "text"
    """The field that holds the text (jsonl, parquet, huggingface)."""
    split: str = "train"
    """huggingface only."""
    subset: str | None = None
    """huggingface only: the configuration name."""
    pattern: str = "**/*"
    """files and stdlib: glob below `path`, or below the library's folder."""
    licence: str = "unstated"
    """Recorded in the manifest."""
    token_dtype: Literal["uint16", "uint32", "int32", "int64"] = "uint16"
    """tokens only: of the ids in a raw .bin file."""
    end_of_text: int | None = None
    """tokens and megatron only: the id that closes a document there."""
    fim_rate: float = 0.0
    """Share of the training documents that are cut to fill in the middle; for code, e.g. 0.5."""
    fim_spm_rate: float = 0.5
    """Of those, the share that begins with the suffix instead of the prefix."""


@dataclass(frozen=True)
class CorpusConfig:
    """A prepared folder to read, and its share of the samples."""

    path: str
    weight: float = 1.0


@dataclass(frozen=True)
class FilterConfig:
    """Documents that preparing leaves out. The manifest counts them, by reason and part."""

    min_characters: int = 0
    max_characters: int | None = None
    languages: tuple[str, ...] = ()
    """ISO 639 codes (en, de, …) of the languages to keep. Default: all."""
    exact_duplicates: bool = False
    """Of documents with the same text one stays: a held-out one before all others, else the first."""
    near_duplicates: float | None = None
    """As `exact_duplicates`, for documents whose sets of five-word shingles have this Jaccard similarity, or more."""


@dataclass(frozen=True)
class StageConfig:
    """From a number of tokens on, training goes on with other data; what is not set stays as it was before.

    A corpus goes on where earlier stages left it. With another sequence length, or another seed, it begins anew.
    """

    name: str
    from_tokens: int
    """It begins with the first step that has at least so many tokens before it. Text, lengths and seeds before that
    stay as they are: a stage may be added or changed until a run has begun it."""
    path: str | tuple[CorpusConfig, ...] | None = None
    """Prepared shards, as `data.path`."""
    sequence_length: int | None = None
    """A step has as many tokens as ever: half as many sequences of twice the length, and micro-batches likewise."""
    seed: int | None = None
    """Of the order of samples. Before any stage: `run.seed`."""


@dataclass(frozen=True)
class DataConfig:
    sources: tuple[SourceConfig, ...] = ()
    path: str | tuple[CorpusConfig, ...] | None = None
    """Prepared shards, in a folder or at an address that fsspec knows (s3://bucket/corpora/mine). Unset: `sources` are
    prepared once, under `corpora_dir`."""
    corpora_dir: str = "corpora"
    sequence_length: int = 256
    mixture: Literal["exact", "stride"] = "exact"
    """How corpora take turns. `exact`: at any time each has its share to within two samples, shares being whole
    65,536ths. `stride`: for runs begun before there was a choice; many corpora of equal weights, all due at once, lag
    behind by more."""
    order: Literal["full", "block"] = "full"
    """`full`: an epoch reads all samples of a corpus in an order of its own, any neighbours far apart. `block`: for
    object stores, what lies together is read at nearly the same time."""
    block_sequences: int = 256
    """block only: neighbouring samples that stay together; blocks come in an order of their own each epoch. Shards are
    fetched whole: with a cache that holds a part of the text a block is best as long as a shard, `shard_tokens` ÷
    `sequence_length`."""
    window_blocks: int = 16
    """block only: blocks whose samples are mixed with one another. A cache has to hold the shards of two windows."""
    stages: tuple[StageConfig, ...] = ()
    """Another mixture, text or sequence length from a number of tokens on, e.g. for annealing or longer contexts."""
    document_mask: bool = False
    """Tokens see only what is of their own document, in training and evaluation."""
    boundary_loss: bool = True
    """Whether the first token of a document is predicted from the end of the one before it, in both as well."""
    packing: Literal["cut", "best_fit"] = "cut"
    """How documents become rows: one after the other and cut, or put together so that few are cut (best-fit packing;
    the plan is made once and kept beside the shards)."""
    heldout_fraction: float = 0.02
    """Documents held out for evaluation, chosen by a hash of each document's identity."""
    shard_tokens: int = 134_217_728
    """Most tokens a shard holds (256 MiB of uint16)."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    shuffle_documents: bool = False
    """Training documents in a random order instead of the sources': for inputs that are sorted."""
    workers: int | None = None
    """Processes that tokenise. Default: the number of usable cores. Never changes the result."""
    verify: bool = False
    """Hash every shard before training; sizes are always checked. Of text in a store, hash what the cache has already:
    what is fetched always is."""
    cache_dir: str | None = None
    """Where shards are kept that `path` names by an address (s3://…). Default: `cache` in `corpora_dir`. Best on a disk
    of the host; runs may share it."""
    cache_bytes: int | None = None
    """Most bytes that the shards there take, those of other runs included. Where all is in use at once, it gives way by
    a shard a process. Default: no limit."""


@dataclass(frozen=True)
class DeepSpeedZeroConfig:
    """Sizes in elements. Default: what `gptscale.parallel.deepspeed_config` derives."""

    reduce_bucket_size: int | None = None
    """Stages 2 and 3: gradients that are reduced at a time."""
    sub_group_size: int | None = None
    """Stage 3, and all that follow: parameters that are updated at a time."""
    stage3_prefetch_bucket_size: int | None = None
    stage3_param_persistence_threshold: int | None = None
    """Parameters up to this size stay whole on every rank."""
    stage3_max_live_parameters: int | None = None
    stage3_max_reuse_distance: int | None = None


@dataclass(frozen=True)
class DeepSpeedCommsLogger:
    enabled: bool = False
    verbose: bool = False
    """Each collective as it happens. Those that are ours alone do not show."""
    prof_all: bool = True
    debug: bool = False


@dataclass(frozen=True)
class DeepSpeedFlopsProfiler:
    enabled: bool = False
    profile_step: int = 1
    module_depth: int = -1
    top_modules: int = 1
    detailed: bool = True
    output_file: str | None = None


@dataclass(frozen=True)
class DeepSpeedConfig:
    zero_optimization: DeepSpeedZeroConfig = field(default_factory=DeepSpeedZeroConfig)
    comms_logger: DeepSpeedCommsLogger = field(default_factory=DeepSpeedCommsLogger)
    flops_profiler: DeepSpeedFlopsProfiler = field(default_factory=DeepSpeedFlopsProfiler)
    wall_clock_breakdown: bool = False
    """Log how long the parts of a step take, which waits for the device at each."""
    steps_per_print: int | None = None
    """Default: never."""
    dump_state: bool = False
    """Log all of DeepSpeed's settings at the start."""


@dataclass(frozen=True)
class ParallelConfig:
    engine: Literal["deepspeed", "plain"] = "deepspeed"
    """`plain`: one process and nothing else, the reference that every layout is compared with."""
    zero_stage: int = 1
    pipeline: int = 1
    pipeline_layers: tuple[int, ...] | None = None
    """Layers of each stage of the pipeline, in order. Default: as `pipeline_balance` says."""
    pipeline_balance: Literal["parameters", "time"] = "parameters"
    """What stages have about as much of, embedding and head counted. `time` is measured as the run starts, and kept."""
    tensor: int = 1
    shard_norms: bool = False
    """With `tensor`: norms and the residual stream are cut over the same ranks along the sequence. Layers keep less."""
    sequence: int = 1
    expert: int = 1
    """Data-parallel ranks that share out the experts of a mixture."""
    activation_checkpointing: Checkpointing = "none"
    """`full`: layers keep their input only, and are computed again in backward. Costs a third more products.
    `selective`: norms and activations are computed again, and no product."""
    checkpoint_interval: int = 1
    """With either: every so manyth layer is, and the others keep what they computed."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Where the optimizer's fp32 weights and state are kept and updated, in place of the GPU (ZeRO-Offload)."""
    offload_path: str | None = None
    """nvme only: a folder on a fast disk of every host."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    """DeepSpeed's own settings, by its names: those that have an effect here. All else follows from ours."""
    timeout_s: float = 600.0
    """How long a collective may wait for a peer before the run ends with an error."""


@dataclass(frozen=True)
class PrecisionConfig:
    compute: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of activations and matrix products. Weights, gradients and optimizer state are kept in fp32. `fp16` is for
    GPUs without bf16, and scales the loss."""
    tf32: bool = False
    """fp32 products on a GPU round their factors to 10 bits: several times as fast, and about as exact as fp16."""
    loss_scale: float = 65536.0
    """fp16 only: what the loss is multiplied by at first, so that small gradients do not vanish."""
    loss_scale_window: int = 1000
    """fp16 only: updates without an overflow after which the scale is doubled."""
    loss_scale_hysteresis: int = 2
    """fp16 only: the overflow, counted from the last doubling, at which the scale is first halved."""


@dataclass(frozen=True)
class OptimizerConfig:
    name: str = "adamw"
    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """Applied to matrices only: no decay on norms, biases and position tables."""
    clip_norm: float = 1.0
    """0 turns clipping off."""
    momentum: float = 0.95
    """muon only, of the blocks' matrices; the rest of a model is AdamW's, with the same learning rate."""
    newton_schulz_steps: int = 5
    """muon only: how closely an update is made orthogonal."""
    update_rms: float = 0.2
    """muon only: size of an update at learning rate 1, so that AdamW's learning rates suit it (arXiv 2502.16982)."""
    options: dict[str, Option] = field(default_factory=dict)
    """Settings of an optimizer of your own."""


@dataclass(frozen=True)
class ScheduleConfig:
    name: str = "cosine"
    warmup_tokens: int = 0
    """The learning rate rises linearly over these tokens."""
    final_ratio: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    total_steps: int | None = None
    """Where the schedule ends. Default: the run's own length."""
    decay_tokens: int | None = None
    """Where the schedule ends, in tokens, in place of `total_steps`."""
    cooldown_ratio: float = 0.2
    """wsd only: the share of all tokens, at the end, over which the rate falls."""
    options: dict[str, Option] = field(default_factory=dict)
    """Settings of a schedule of your own."""


@dataclass(frozen=True)
class TrainConfig:
    steps: int | None = None
    tokens: int | None = None
    """Length of the run: one of the two. `tokens` is rounded up to whole steps."""
    global_batch: int = 32
    """Sequences an optimizer step."""
    micro_batch: int = 4
    """Sequences a rank holds in memory at once."""
    ramp_from: int | None = None
    """Sequences of the first steps, where the batch is to grow; must divide `global_batch`."""
    ramp_tokens: int | None = None
    """Tokens over which the batch grows from `ramp_from` to `global_batch`."""
    length_from: int | None = None
    """Length of the first sequences, where it is to double up to `data.sequence_length`."""
    length_tokens: int | None = None
    """Tokens over which sequences grow. Rows of `data.sequence_length` are cut: a step has as many tokens as ever."""
    noise_scale_every_steps: int = 0
    """How often the gradient noise scale is measured: the batch, in tokens, beyond which more is of little use. 0 is
    never. Needs two micro-batches a step, over all ranks together."""
    attention_kernel: Literal["auto", "fastest", "blocked", "sdpa", "flex", "flash", "varlen"] = "auto"
    """`fastest`: timed when the run starts, and kept from then on. `auto`: the same, but by a fixed rule with
    `run.deterministic`. Or one by name, for every layer. Changes speed, not the result beyond float order."""
    compile: Literal["none", "block"] = "none"
    """`block`: torch.compile every block's training, all but the attention in it. Changes speed and memory, not the
    result beyond float order. Needs a compiler: a C++ one for a CPU, triton for a GPU."""


@dataclass(frozen=True)
class HeldoutSetConfig:
    """Held-out text with a name of its own."""

    name: str
    path: str
    """A prepared folder, of which the held-out part is used; its tokenizer is the run's."""
    sequences: int | None = None
    """Default: `evaluation.sequences`."""


@dataclass(frozen=True)
class EvaluationConfig:
    every_steps: int = 0
    """0: at the end only."""
    sequences: int = 256
    """Held-out sequences to use of each set, spread evenly over its held-out part; 0 uses all of them."""
    sets: tuple[HeldoutSetConfig, ...] = ()
    """More held-out text than the training corpora's own. Each of a mixture's corpora is a set already."""
    prompts: tuple[str, ...] = ()
    """Texts that every evaluation lets the model complete, greedily, into `samples.jsonl`."""
    sample_tokens: int = 48
    """Most tokens of such a completion."""
    bigram: bool = False
    """At the end, print beside the held-out loss that of an interpolated bigram model fitted to the same tokens."""


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = 1000
    keep: int = 3


@dataclass(frozen=True)
class GuardConfig:
    max_skipped_steps: int = 10
    """Updates in a row that may be skipped because the gradient was not finite, before the run stops with exit 3."""


@dataclass(frozen=True)
class LoggingConfig:
    name: Literal["local", "wandb", "tensorboard"] = "local"
    project: str = "gptscale"
    """wandb only."""
    print_every_steps: int = 10


@dataclass(frozen=True)
class ProfileConfig:
    steps: tuple[int, ...] | None = None
    """First and last step to record, e.g. `[10,13]`: a trace and a page of figures, below `profile/` of the run."""
    ranks: tuple[int, ...] = (0,)
    """Who records."""
    memory: bool = False
    """Record allocations too, and who makes them."""
    memory_history: bool = False
    """GPU: keep the stack of every allocation from the start, for the snapshot that an out-of-memory error leaves.
    Costs about 2 µs an allocation."""

    def covers(self, step: int) -> bool:
        """Whether a step is within the window. Its time is not that of other steps: recording takes some."""
        return self.steps is not None and self.steps[0] <= step <= self.steps[-1]


@dataclass(frozen=True)
class LaunchConfig:
    kind: Literal["local"] = "local"
    ranks: int = 1
    nodes: int = 1
    threads: int | None = None
    """OpenMP threads a rank on a CPU. Default: usable cores ÷ ranks on this host, at least 1."""
    stop_timeout_s: float = 60.0
    """How long ranks may take to save after a request to stop."""


@dataclass(frozen=True)
class GenerateConfig:
    max_new_tokens: int = 128
    temperature: float = 0.8
    """0 is greedy."""
    top_k: int = 0
    """0: no limit."""
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    stream: bool = True
    cache: bool = True
    window: int | None = None
    """Most tokens the model looks back on. Default: the length it was trained on; more is possible with RoPE only."""


@dataclass(frozen=True)
class TrainRoot:
    """What `gptscale train` reads."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    plugins: tuple[str, ...] = ()
    """Modules (`package.module` or `path/to/file.py`) that register parts of your own."""


@dataclass(frozen=True)
class PrepareConfig:
    """How the work of `gptscale prepare` is shared out among jobs. None of it changes the result."""

    tasks: int = 1
    """Jobs of an array that tokenise together into one folder, on a file system that they share."""
    task: int | None = None
    """Which of `tasks` this job is, from 0: it tokenises its parts of the text and writes no shards."""
    merge: bool = False
    """Write the shards from what the tasks left, and refuse if anything of it is missing."""


@dataclass(frozen=True)
class PrepareRoot(TrainRoot):
    """What `gptscale prepare` reads: a training's settings, so that it prepares what that training would."""

    target: str | None = None
    """Folder to write. Default: where `train` looks for the same sources."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig)


@dataclass(frozen=True)
class GenerateRoot:
    """What `gptscale generate` reads."""

    source: str = ""
    """A run folder or a checkpoint."""
    prompt: str | tuple[str, ...] = ""
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    plugins: tuple[str, ...] = ()
    """Modules that register a block of your own. Never taken from the checkpoint: loading it must not run its code."""


@dataclass(frozen=True)
class InspectRoot:
    """What `gptscale inspect` reads."""

    verify: bool = False
    """Of a checkpoint or prepared text: read every byte and compare it with its checksum."""
    html: str | None = None
    """Of prepared text: write what is said to this file too, as a page."""
    step: int | None = None
    """Of a run: the samples that this optimizer step takes. Of prepared text too, with the settings below."""
    rank: int | None = None
    """With `step`: the samples of this rank alone."""
    ranks: int | None = None
    """With `step`: how many ranks there are. Default: as many as the run had at that step; 1 for prepared text."""
    limit: int = 4
    """With `step`: most samples to show; 0 is all."""
    global_batch: int | None = None
    """With `step` of prepared text, as `train.global_batch`."""
    sequence_length: int | None = None
    """With `step` of prepared text, as `data.sequence_length`."""
    seed: int | None = None
    """With `step` of prepared text, as `run.seed`. Default: 0."""


@dataclass(frozen=True)
class ExportRoot:
    """What `gptscale export` reads."""

    source: str = ""
    """A prepared folder."""
    target: str = ""
    """Folder to write into."""
    format: str = "megatron"
    """`megatron`: indexed datasets, a .bin and an .idx file for each split."""


@dataclass(frozen=True)
class BenchConfig:
    """How `gptscale bench step` measures."""

    rounds: int = 7
    """Rounds in which every contender has one turn."""
    steps_per_turn: int = 2
    """Optimizer steps of a turn."""
    warmup_steps: int = 2
    """Optimizer steps of every contender before the first round, not counted."""
    ranks: int = 1
    """Ranks of every contender, on this host. 1: beside a bare loop. More: ZeRO stages beside torch's DDP."""
    threads: int = 1
    """OpenMP threads of a rank."""
    contenders: tuple[str, ...] = ()
    """Default: every engine for this many ranks; with one rank, other people's models of the same shape too, and the
    products of a step alone. By name there are ours with something changed as well: compile, full-loss,
    attention-blocked, attention-sdpa, optimizer-NAME; and peers that are compiled: nanogpt-compile, hf-gpt2-compile,
    hf-llama-compile."""
    output: str | None = None
    """A JSON file for the figures and every sample."""


@dataclass(frozen=True)
class BenchRoot(TrainRoot):
    """What `gptscale bench` reads: a training's settings, so that it measures the step that training would take.

    `parallel.engine`, `parallel.zero_stage` and `launch` belong to the contenders, the run's length to `bench`; text is
    not read: token ids are drawn at random, of `tokenizer.vocab_size`.
    """

    bench: BenchConfig = field(default_factory=BenchConfig)


@dataclass(frozen=True)
class BenchLayoutsConfig(BenchConfig):
    """How `gptscale bench layouts` measures."""

    ranks: int = 2
    """Ranks of every contender, on this host."""
    contenders: tuple[str, ...] = ()
    """Default: every layout for this many ranks that the model allows, and torch's FSDP2. DDP is always there."""
    together: int = 4
    """Contenders that are alive at a time, in memory, beside DDP and matrix products."""
    micro_batches: tuple[int, ...] = (2, 4, 8)
    """Of a step in which a pipeline's bubble is measured."""


@dataclass(frozen=True)
class BenchLayoutsRoot(BenchRoot):
    """What `gptscale bench layouts` reads: as `bench step`, whose axes of `parallel` belong to the contenders too."""

    bench: BenchLayoutsConfig = field(default_factory=BenchLayoutsConfig)


@dataclass(frozen=True)
class BenchDataConfig:
    """How `gptscale bench data` measures."""

    rounds: int = 5
    """Rounds in which every contender has one turn."""
    tokens: int = 50_000_000
    """Of the corpus that readers read, drawn at random."""
    sequence_length: int = 2048
    batch: int = 8
    """Sequences of a batch."""
    vocab_size: int = 8192
    text_bytes: int = 64_000_000
    """Of the text that is tokenised: source text of Python, torch and sympy, again and again beyond some 80 MB."""
    readers: tuple[str, ...] = ()
    """Default: all. `none`: leave them out."""
    tokenisers: tuple[str, ...] = ()
    """The same of tokenizers."""
    environments: str | None = None
    """Where other people's libraries are installed, some gigabytes. Default: a folder in the user's cache."""
    folder: str | None = None
    """Where the corpora are written meanwhile, some ten times 2 bytes a token. Default: that of temporary files."""
    output: str | None = None
    """A JSON file for the figures and every sample."""


@dataclass(frozen=True)
class BenchDataRoot:
    """What `gptscale bench data` reads."""

    bench: BenchDataConfig = field(default_factory=BenchDataConfig)
