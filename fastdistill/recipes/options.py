"""Defines the options of each command as a frozen dataclass, which the command's Python function takes as well.

The command line is generated from these classes: a field with a help text is a flag, and each class that a command
inherits from is a group of flags in `--help`. This module imports the standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from math import inf
from pathlib import Path
from typing import Any, Literal

from fastdistill.train.options import ObjectiveOptions, Schedule

INNER = (
    "embedding, hidden, attention of tinybert; attention, value_relation of minilm; query_relation, key_relation, "
    "value_relation of minilmv2 (default: all)"
)
RECIPE = "the published recipe's"


def flag(help: str, default: Any = MISSING, **argparse: Any) -> Any:
    """Returns a field that is a flag: its help text and any other keywords of `ArgumentParser.add_argument`."""
    own: Any = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**own, metadata={"help": help, **argparse})


def refuse(options: Any, names: str, why: str) -> None:
    """Raises ValueError for an option out of `names` that is not at its default, where nothing would read it."""
    for option in fields(options):
        default = option.default if option.default_factory is MISSING else option.default_factory()
        if option.name in names.split() and (value := getattr(options, option.name)) != default:
            raise ValueError(f"{option.name} is {value}; {why}")


# (what an option should be, the test for it, the names of such options)
LIMITS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("a positive integer", lambda x: x >= 1, "batch_size batch_sizes intermediate_batch_size max_length"),
    ("a positive integer", lambda x: x >= 1 or x == -1, "max_steps"),
    ("a number above 0", lambda x: 0 < x < inf, "epochs learning_rate learning_rates temperature"),
    ("from 0 to 1", lambda x: 0 <= x <= 1, "alpha"),
    ("a number above 0", lambda x: 0 < x < inf, "intermediate_learning_rate"),
    ("0 or more", lambda x: 0 <= x < inf, "intermediate_epochs prediction_epochs weight_decay workers"),
    ("from 0 to 2**32 - 1", lambda x: 0 <= x < 2**32, "seed seeds"),
    ("from 0 to 1", lambda x: 0 <= x <= 1, "alpha beta"),
    ("0 or more, and less than 1", lambda x: 0 <= x < 1, "skew lora_dropout warmup"),
    ("a positive integer", lambda x: x >= 1, "vocab_size lora lora_alpha"),
)


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Raises ValueError for an option outside its limits, before any work. All commands but the demo inherit this."""

    trust_remote_code: bool = flag("run model code that a checkpoint brings along", False)

    def __post_init__(self) -> None:
        for what, is_within, names in LIMITS:
            for name in names.split():
                value = getattr(self, name, None)
                if not all(x is None or is_within(x) for x in (value if isinstance(value, list) else [value])):
                    raise ValueError(f"{name} is {value}; it should be {what}")


@dataclass(frozen=True, kw_only=True)
class Models(Loading):
    teacher: str = flag("checkpoint: folder or hub name")
    student: str = flag("tinybert-4l-312, tinybert-6l-768, a JSON config file, or a checkpoint")
    init: Literal["random", "teacher"] | None = flag("weights of a preset (default: folded from the teacher)", None)


@dataclass(frozen=True, kw_only=True)
class Data:
    task: str = flag("CoLA, SST-2, MRPC, STS-B, QQP, MNLI, QNLI, RTE, WNLI, SQuAD, SQuAD2, or tagging of words")
    data: Path | None = flag("the task's own files (default: from the hub)", None)


@dataclass(frozen=True, kw_only=True)
class Losses(ObjectiveOptions):
    """The inner losses; a command that trains the head as well adds flags for the prediction loss."""

    terms: list[str] | None = flag(INNER, None, metavar="TERM")
    layer_map: str = flag(
        "uniform, top, bottom, last, or the teacher's state for each of the student's: 0,3,-,12 "
        "(0: embeddings; -: none)", "uniform",
    )  # fmt: skip
    projection: Literal["shared", "per_layer"] | None = flag(  # type: ignore[assignment]
        "of hidden states (default: as the student's folder brings them, else shared)", None
    )
    # Flags of the commands that train the head.
    temperature: float = 1.0
    t_squared: bool = False
    divergence: Literal["soft_cross_entropy", "kl", "jsd", "tvd"] = "soft_cross_entropy"
    alpha: float = 1.0
    scores: Literal["gold", "teacher"] = "gold"
    tail: Literal["renormalize", "bucket"] = "renormalize"


@dataclass(frozen=True, kw_only=True)
class PredictionLoss(Losses):
    """Inner losses, and the prediction loss."""

    temperature: float = flag("of predictions", 1.0)
    t_squared: bool = flag("multiply the prediction loss by temperature^2", False)
    divergence: Literal["soft_cross_entropy", "kl", "jsd", "tvd"] = flag(
        "of the student's predictions from the teacher's", "soft_cross_entropy"
    )
    alpha: float = flag("weight of the teacher's predictions; gold labels get the rest", 1.0)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The last training runs for each combination of these."""

    learning_rates: list[float] | None = flag(f"the best on the dev sets is kept (default: {RECIPE})", None)
    batch_sizes: list[int] | None = flag(f"of the last training, in each process (default: {RECIPE})", None)
    seeds: list[int] = flag("for each learning rate and batch size; of several runs all stay in runs/", [42])


@dataclass(frozen=True, kw_only=True)
class Training:
    """Options of every training. `arguments` holds any others of transformers.TrainingArguments, and wins."""

    bf16: bool = flag("bfloat16 autocast", False)
    max_steps: int = flag("optimiser steps of each stage (default: as many as the epochs make)", -1)
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Output:
    output: Path = flag("folder to write")
    overwrite: bool = flag("replace what is in the output", False)
    resume: bool = flag("continue an interrupted run; keep a finished one as it is, whatever its options", False)


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Run the whole pipeline on built-in text: no network, no GPU, minutes."""

    output: Path = flag("folder to write", Path("demo-output"))
    overwrite: bool = flag("replace what is in the output folder", False)
    open: bool = flag("show the report in a browser", False)


@dataclass(frozen=True, kw_only=True)
class GeneralOptions(Models, Losses, Schedule, Training, Output):
    """Stage 1: distil on a corpus of plain text."""

    corpus: list[str] = flag("text files, a paragraph a line")
    max_length: int = flag("tokens in a block", 128)
    streaming: bool = flag("read the corpus while it trains, not before; needs --max-steps", False)
    packing: bool = flag("keep paragraphs apart, those of a batch in one row without padding", False)
    batch_size: int = flag("rows of each process and step", 256)
    warmup: float = flag("share of the steps", 0.1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if "prediction" in (self.terms or ()):
            raise ValueError("--terms: invalid choice: 'prediction', which is learned on a task, not on a corpus")


@dataclass(frozen=True, kw_only=True)
class AugmentOptions(Data, Output, Loading):
    """Make copies of a task's training rows with some words replaced."""

    teacher: str = flag("masked language model: folder or hub name")
    glove: Path = flag("word vectors in GloVe's text format")
    output: Path = flag("NAME.tsv, as the task's own train.tsv, or NAME.arrow")
    copies: int | None = flag("of each sentence (default: the published code's for the task)", None)
    candidates: int = flag("words for each word", 15)
    probability: float = flag("of a word to be replaced", 0.4)
    legacy: bool = flag("sentence pairs as the published code makes them", False)
    seed: int = flag("seed of the choice of words", 42)
    batch_size: int = flag("masked sentences at a time", 64)
    bf16: bool = flag("bfloat16 autocast", False)


@dataclass(frozen=True, kw_only=True)
class TaskOptions(Models, Data, PredictionLoss, Grid, Training, Output):
    """Stage 2: intermediate, prediction, evaluation on a task."""

    augmented: Path | None = flag("train on these rows: what augment wrote, or a tsv like the task's own", None)
    terms: list[str] | None = flag(INNER + "; and prediction", None, metavar="TERM")
    labels: Literal["teacher", "gold"] | None = flag(
        "learn the teacher's predictions, or gold labels alone (default: teacher; for a regression its gold scores)",
        None,
    )
    intermediate_epochs: float | None = flag(f"default: {RECIPE}; 0: skip the stage", None)
    intermediate_learning_rate: float | None = flag(f"default: {RECIPE}", None)
    intermediate_batch_size: int | None = flag(f"of each process (default: {RECIPE})", None)
    prediction_epochs: float | None = flag(f"default: {RECIPE}; 0: skip the stage, with prediction among --terms", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.intermediate_epochs == 0 and self.prediction_epochs != 0:
            own = "intermediate_learning_rate intermediate_batch_size"
            why = "it is for the intermediate stage, which --intermediate-epochs 0 leaves out: leave one out"
            refuse(self, f"method terms projection teacher_layer relation_heads {own}", why)
        if self.prediction_epochs == 0:
            for grid in ("learning_rate", "batch_size"):
                if getattr(self, f"{grid}s") is not None:
                    other = f"--{grid.replace('_', '-')}s is for the same stage, the only one"
                    refuse(self, f"intermediate_{grid}", f"{other}: leave one out")


@dataclass(frozen=True, kw_only=True)
class CacheOptions(Output, Loading):
    """Precompute a teacher's outputs on a data set."""

    teacher: str = flag("checkpoint: folder or hub name")
    data: list[Path] = flag(
        "text files, a paragraph a line; or JSONL or Parquet files of rows, as lm takes; with --task the folder of its "
        "tsv files"
    )
    task: str | None = flag("GLUE task whose training rows a classifier reads, instead of plain text", None)
    top_k: int | None = flag("classes of each token that a language model keeps", None)
    hidden: list[int] = flag("hidden states; 0: the embedding output", [])
    max_length: int | None = flag("tokens in a block of text (default: 128) or in a row (default: 1024)", None)
    completion_only: bool | None = flag(
        "rows: learn completions alone (default: where they have a prompt)", None, nargs="?", const=True
    )
    assistant_only: bool = flag("rows: learn the assistant's messages alone", False)
    batch_size: int = flag("rows at a time", 16)
    bf16: bool = flag("bfloat16 autocast", False)


@dataclass(frozen=True, kw_only=True)
class CachedOptions(PredictionLoss, Schedule, Training, Output, Loading):
    """Distil from a cache of teacher outputs; no teacher runs."""

    cache: Path = flag("folder that the command cache wrote")
    student: str = flag("checkpoint; or a preset or JSON config file of the teacher's kind")
    teacher: str | None = flag("checkpoint; only for --init teacher and for the attention term", None)
    init: Literal["random", "teacher"] | None = flag("weights of a preset (default: --teacher's, if given)", None)
    terms: list[str] | None = flag("default: all that the cache serves", None, metavar="TERM")
    scores: Literal["gold", "teacher"] = flag("what a regression head learns", "gold")
    tail: Literal["renormalize", "bucket"] = flag("other classes: left out, or taken as one", "renormalize")
    verify: bool = flag("compare every file's SHA-256 first", False)
    workers: int = flag("processes that read the cache for each one that trains; with 0 it reads for itself", 0)
    batch_size: int = flag("rows of each process and step", 256)
    warmup: float = flag("share of the steps", 0.1)
    # These are no flags: a cache serves the terms of TinyBERT only.
    method: Literal["tinybert", "minilm", "minilmv2"] = "tinybert"
    parity: Literal["masked", "official"] = "masked"
    teacher_layer: int | None = None
    relation_heads: int | None = None


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(Data, Grid, Training, Output, Loading):
    """Train a model on a task's gold labels alone: a teacher, or a student as baseline."""

    model: str = flag("checkpoint; or with --teacher a preset or config file")
    teacher: str | None = flag("whose vocabulary, labels and (with --init teacher) weights a preset takes", None)
    init: Literal["random", "teacher"] | None = flag("of a preset or config (default: teacher)", None)
    layer_map: str = flag("the layers of --teacher that a preset starts from, as in task", "uniform")
    epochs: float = flag("passes over the data", 3)
    learning_rates: list[float] = flag("of several the best on the dev sets is kept", [3e-5])
    batch_sizes: list[int] = flag("in each process", [32])

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher is None:
            refuse(self, "init layer_map", "it is what to take of a teacher's weights: pass --teacher, or leave it out")
        if self.init == "random":
            refuse(self, "layer_map", "--init random takes no layers of --teacher: leave one out")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(Data, Loading):
    """Print a model's metrics on a task."""

    model: str = flag("checkpoint: folder or hub name")
    against: str | None = flag("compare with this model: size, speed, share kept", None)
    json: Path | None = flag("write the figures there as well", None)
    overwrite: bool = flag("replace that file", False)


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Put runs side by side: scores, sizes, speed and last losses."""

    runs: list[Path] = flag("folders that task, lm or another training wrote")
    output: Path | None = flag("write the table there as well, as Markdown", None)
    overwrite: bool = flag("replace that file", False)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of a language model: `messages`, `prompt` and `completion`, or `text`."""

    dataset: list[str] | None = flag(
        "JSONL, Parquet or .txt files (a text a line), or a data set: the folder that datasets saved, or its hub name",
        None, metavar="FILE",
    )  # fmt: skip
    dataset_config: str | None = flag("of a data set", None)
    split: str = flag("of a data set", "train")
    max_length: int | None = flag("tokens of a row (default: 1024, or fewer if the models take fewer)", None)
    completion_only: bool | None = flag(
        "learn completions alone (default: where rows have a prompt)", None, nargs="?", const=True
    )
    assistant_only: bool = flag("learn the assistant's messages alone", False)


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """The loss of a language model: the keywords of `fastdistill.integrations.causal_lm_loss`."""

    divergence: Literal["kl", "jsd", "tvd", "soft_cross_entropy"] = flag("between teacher and student", "kl")
    temperature: float = flag("of both distributions", 1.0)
    t_squared: bool = flag("multiply the divergence by temperature^2", False)
    alpha: float = flag("weight of the divergence; the labels get the rest. 0: labels alone, no teacher", 1.0)
    beta: float = flag("weight of the teacher in the mixture of jsd", 0.5)
    reverse: bool = flag("reverse kl: of the student from the teacher", False)
    skew: float = flag("of kl: the share of the other distribution in the one it is measured against", 0.0)
    vocab_size: int | None = flag("classes that take part (default: those that both models have)", None)


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """LoRA, by PEFT."""

    lora: int | None = flag("rank; trains LoRA adapters of the student alone, and merges them into the output", None)
    lora_alpha: int | None = flag("LoRA's alpha (default: twice the rank)", None)
    lora_dropout: float = flag("in the adapters", 0.0)
    lora_targets: list[str] | None = flag("names of modules (default: all linear layers but the head)", None)

    def check_adapters(self) -> None:
        """Raises ValueError for an option of adapters without their rank, with which the whole student would train."""
        if self.lora is None:
            refuse(self, "lora_alpha lora_dropout lora_targets", "there is no LoRA: pass --lora RANK, or leave it out")


@dataclass(frozen=True, kw_only=True)
class LMOptions(Divergence, Rows, Adapters, Schedule, Training, Output, Loading):
    """Distil a causal language model on chat, prompt-completion or plain text."""

    teacher: str | None = flag("checkpoint: folder or hub name", None)
    student: str = flag("checkpoint, or a JSON config file: all of it, or what differs from the teacher's")
    init: Literal["random", "teacher"] | None = flag("weights of a config file (default: random)", None)
    cache: Path | None = flag(
        "rows and teacher outputs that the command cache wrote, for --teacher and --dataset", None
    )
    teacher_dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("auto: as its checkpoint", "auto")
    eval: list[str] | None = flag("held-out files or data set, as --dataset", None, metavar="FILE")
    eval_split: str | None = flag("held-out split of --dataset", None)
    packing: bool = flag("fill rows of --max-length tokens with several", False)
    on_policy: bool = flag("learn on the student's own answers to the prompts of --dataset, sampled by TRL", False)
    epochs: float = flag("passes over the data", 3)
    batch_size: int = flag("rows of each process and step", 8)
    learning_rate: float = flag("peak learning rate", 2e-5)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_adapters()
        if self.on_policy:
            self.check_on_policy()
        if self.cache is not None and (self.teacher is not None or self.dataset is not None):
            other = "teacher" if self.teacher is not None else "dataset"
            raise ValueError(
                f"cache is {self.cache}, which brings the rows and the teacher's outputs; leave out --{other}"
            )
        if self.cache is None and self.dataset is None:
            raise ValueError("--dataset is missing: pass files, a data set, or --cache")
        if self.cache is None and self.teacher is None and self.alpha > 0:
            raise ValueError("--teacher is missing: pass one, or --cache, or --alpha 0 for the labels alone")
        if self.cache is not None and self.alpha == 0:
            raise ValueError("alpha is 0, labels alone; a cache is for its teacher: pass --dataset instead of --cache")
        if self.cache is not None and self.divergence not in ("kl", "soft_cross_entropy"):
            raise ValueError(f"divergence is {self.divergence}; a cached teacher has kl and soft_cross_entropy")
        if self.cache is not None:
            refuse(self, "skew", "a cached teacher has none: pass --teacher and --dataset, or leave it out")
            rows = "packing split dataset_config" + ("" if self.eval else " max_length completion_only assistant_only")
            refuse(self, rows, "the rows of a cache are as the teacher read them: pass --dataset, or leave it out")
        if self.alpha == 0 and not self.on_policy:
            names = "divergence temperature t_squared beta reverse skew"
            refuse(self, names, "alpha is 0: the labels alone have no divergence: leave one out")
        if self.cache is not None or self.teacher is None:
            refuse(self, "teacher_dtype", "no teacher is read: pass --teacher, or leave it out")
        if self.teacher is None and self.cache is None:
            refuse(self, "init", "no teacher is there, whose config a student could take: leave it out")
        if self.eval_split is not None and (self.eval is not None or self.cache is not None):
            raise ValueError(
                f"eval_split is {self.eval_split}, a split of --dataset; leave it out, or --eval or --cache"
            )

    def check_on_policy(self) -> None:
        """Raises ValueError for an option that TRL's DistillationTrainer does not have."""
        if self.divergence not in ("kl", "jsd"):
            raise ValueError(f"divergence is {self.divergence}; with --on-policy it should be kl or jsd")
        if self.cache is not None:
            raise ValueError(
                f"cache is {self.cache}; with --on-policy a live teacher reads the answers: pass --teacher"
            )
        if self.teacher is None or self.dataset is None:
            raise ValueError(f"--{'teacher' if self.teacher is None else 'dataset'} is missing: --on-policy needs it")
        refuse(self, "alpha t_squared skew vocab_size packing", "--on-policy has no such option: leave it out")
        if self.eval is None and self.eval_split is None:
            refuse(
                self, "max_length completion_only assistant_only",
                "with --on-policy it is for held-out rows: pass --eval, or leave it out (--max_completion_length is "
                "the most tokens of an answer)",
            )  # fmt: skip
