"""What the commands do: each is a thin layer over plain Python calls."""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import disable_fsdp_ram_efficient_loading
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from fastdistill.recipes import demo
from fastdistill.recipes.augment import COPIES, Augmenter, augment, check_output, read_augmented, read_glove
from fastdistill.recipes.glue import Task, get_task, mean_score
from fastdistill.recipes.search import check_grid, print_results, search
from fastdistill.train.cache import (
    MANIFEST,
    identity,
    read_cache,
    read_manifest,
    teacher_config,
    terms_served,
    weightless_teacher,
    write_cache,
)
from fastdistill.train.data import PaddingCollator, add_teacher_logits, pack_corpus, read_corpus
from fastdistill.train.finetune import finetune
from fastdistill.train.objective import (
    Objective,
    check_method_options,
    projection_kind,
    read_projections,
    resolve_terms,
)
from fastdistill.train.outputs import check, drop_checkpoints, whole_output, write_whole
from fastdistill.train.processes import check_gpus, main_first, on_main, processes
from fastdistill.train.published import is_published, load_published, load_published_tokenizer, untrained_head
from fastdistill.train.stages import CachedStage, GeneralStage, IntermediateStage, PredictionStage
from fastdistill.train.students import (
    build_student,
    count_parameters,
    init_from_teacher,
    is_config,
    load_checkpoint,
    measure_seconds,
    positions,
    save_projections,
)


def run_demo(arguments: argparse.Namespace) -> None:
    demo.run(arguments.output, overwrite=arguments.overwrite)


def run_general(arguments: argparse.Namespace) -> None:
    objective = _objective_options(arguments)
    if arguments.streaming and arguments.max_steps < 1:
        raise ValueError("--streaming needs --max-steps: a corpus that is not read beforehand has no length")
    if _is_finished(arguments):
        return
    teacher, tokenizer = _load(arguments.teacher, "AutoModel", arguments.trust_remote_code)
    _check_length(arguments.max_length, "teacher", teacher)
    if arguments.streaming:
        corpus = read_corpus(arguments.corpus, streaming=True)
        blocks = _head(pack_corpus(corpus, tokenizer, arguments.max_length), arguments.max_length)
    else:
        corpus = blocks = main_first(lambda: pack_corpus(arguments.corpus, tokenizer, arguments.max_length))
    with tempfile.TemporaryDirectory() as work:
        student = _student(arguments, arguments.student, teacher, tokenizer, blocks, arguments.seed, Path(work))
        _check_length(arguments.max_length, "student", student)
        GeneralStage(
            corpus=corpus,
            max_length=arguments.max_length,
            streaming=arguments.streaming,
            epochs=arguments.epochs,
            batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            **objective,
            projections=_projections(arguments.student, work),
            seed=arguments.seed,
            arguments=_training_arguments(arguments),
        ).run(student, teacher, tokenizer, arguments.output, resume=arguments.resume, overwrite=arguments.overwrite)
    _finish(arguments)


def run_augment(arguments: argparse.Namespace) -> None:
    task = get_task(arguments.task)
    if not isinstance(task, Task):
        raise ValueError(f"--task is {task.name}; augment makes rows of the GLUE tasks: {', '.join(COPIES)}")
    check_output(arguments.output, resume=arguments.resume, overwrite=arguments.overwrite)
    train = _split(task, "train", arguments)
    model, tokenizer = _load(arguments.teacher, "AutoModelForMaskedLM", arguments.trust_remote_code)
    augmenter = Augmenter(
        model,
        tokenizer,
        read_glove(arguments.glove, device=model.device),
        copies=COPIES[task.name] if arguments.copies is None else arguments.copies,
        candidates=arguments.candidates,
        probability=arguments.probability,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        bf16=arguments.bf16,
    )
    options = {"legacy": arguments.legacy, "resume": arguments.resume, "overwrite": arguments.overwrite}
    augment(task, train, augmenter, arguments.output, **options)
    _finish(arguments)


def run_cache(arguments: argparse.Namespace) -> None:
    if arguments.task and (arguments.top_k is not None or len(arguments.data) > 1):
        raise ValueError(
            "with --task, whose classifier's logits are kept whole, --data is one folder and there is no --top-k"
        )
    if not arguments.task and arguments.top_k is None and not arguments.hidden:
        raise ValueError("nothing to keep of plain text: use --top-k, --hidden or both")
    if not (arguments.resume and (arguments.output / MANIFEST).is_file()):
        check(arguments.output, resume=arguments.resume, overwrite=arguments.overwrite)
    if arguments.task:
        task, files = get_task(arguments.task), [arguments.data[0] / "train.tsv"]
        if not isinstance(task, Task):
            raise ValueError(f"--task is {task.name}; it should be one of GLUE's, whose classifiers' logits are kept")
        rows = task.load_split("train", arguments.data[0])
        teacher, tokenizer = _load(arguments.teacher, task.auto_class, arguments.trust_remote_code, needs_head=True)
        task = task.for_model(teacher.config)
        dataset = main_first(lambda: task.tokenize(rows, tokenizer))
    else:
        files = arguments.data
        kind = "AutoModel" if arguments.top_k is None else None
        teacher, tokenizer = _load(arguments.teacher, kind, arguments.trust_remote_code)
        dataset = main_first(lambda: pack_corpus(files, tokenizer, arguments.max_length))
    write_cache(
        dataset,
        teacher,
        tokenizer,
        arguments.output,
        top_k=arguments.top_k,
        hidden=arguments.hidden,
        files=files,
        batch_size=arguments.batch_size,
        bf16=arguments.bf16,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
    )
    _finish(arguments)


def run_train_cached(arguments: argparse.Namespace) -> None:
    if _is_finished(arguments):
        return
    dataset = read_cache(arguments.cache, verify=arguments.verify)
    tokenizer = AutoTokenizer.from_pretrained(arguments.cache)
    arguments.terms = arguments.terms or terms_served(arguments.cache)
    is_live = "attention" in arguments.terms
    if arguments.teacher is not None:
        theirs = read_manifest(arguments.cache)["teacher"]
        teacher, _ = _load(arguments.teacher, theirs["class"], arguments.trust_remote_code)
        _check_identity(arguments, teacher, theirs)
    elif is_live or arguments.init == "teacher":
        raise ValueError("the attention term and --init teacher need --teacher: a cache holds no scores and no weights")
    else:
        teacher = weightless_teacher(arguments.cache)
        arguments.init = "random" if is_config(arguments.student) else arguments.init
    with tempfile.TemporaryDirectory() as work:
        student = _student(arguments, arguments.student, teacher, tokenizer, dataset, arguments.seed, Path(work))
        stage = CachedStage(
            cache=arguments.cache,
            epochs=arguments.epochs,
            batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            terms=arguments.terms,
            layer_map=_layer_map(arguments.layer_map),
            projection=_projection(arguments),
            temperature=arguments.temperature,
            tail=arguments.tail,
            projections=_projections(arguments.student, work),
            seed=arguments.seed,
            arguments={**_training_arguments(arguments), "dataloader_num_workers": arguments.workers},
        )
        options = {"resume": arguments.resume, "overwrite": arguments.overwrite}
        stage.run(student, teacher if is_live else None, tokenizer, arguments.output, **options)
    _finish(arguments)


def run_task(arguments: argparse.Namespace) -> None:
    task = _named_task(arguments, "train")
    objective = _objective_options(arguments)
    _check_stages(arguments, task, objective["terms"])
    has_prediction_stage = arguments.prediction_epochs != 0
    intermediate = {
        "learning_rate": arguments.intermediate_learning_rate or task.intermediate_learning_rate,
        "batch_size": arguments.intermediate_batch_size or task.batch_size,
    }
    prediction = {"learning_rate": task.prediction_learning_rate, "batch_size": task.batch_size}
    last = prediction if has_prediction_stage else intermediate
    grid = {
        "learning_rates": arguments.learning_rates or [last["learning_rate"]],
        "batch_sizes": arguments.batch_sizes or [last["batch_size"]],
        "seeds": arguments.seeds,
    }
    check_grid(**grid)
    if arguments.augmented and not isinstance(task, Task):
        raise ValueError(f"--task is {task.name}; --augmented holds rows of a GLUE task")
    if _is_finished(arguments):
        return
    teacher, tokenizer = _load(arguments.teacher, task.auto_class, arguments.trust_remote_code, needs_head=True)
    task = task.for_model(teacher.config)
    train = read_augmented(task, arguments.augmented) if arguments.augmented else _split(task, "train", arguments)
    train = task.tokenize(train, tokenizer)
    for split in task.evaluations:
        _split(task, split, arguments)  # a malformed line shows before the training, not after it

    seed = arguments.seeds[0]
    epochs = task.intermediate_epochs if arguments.intermediate_epochs is None else arguments.intermediate_epochs

    with tempfile.TemporaryDirectory() as scratch:
        student = _student(arguments, arguments.student, teacher, tokenizer, train, seed, Path(scratch))
        # What the stages would refuse is refused before --overwrite drops a run.
        _check_rows(task, tokenizer, student)
        if epochs > 0:
            checked = Objective(student.config, teacher.config, **objective, temperature=arguments.temperature)
            folder = _projections(arguments.student, scratch)
            if folder is not None and len(checked.projections):
                checked.load_projections(folder)
        with _whole_output(arguments) as work:

            def distil(model: Any, learning_rate: float, batch_size: int, seed: int, folder: Path) -> Any:
                stage = IntermediateStage(
                    dataset=train,
                    epochs=epochs,
                    batch_size=batch_size,
                    learning_rate=learning_rate,
                    **objective,
                    temperature=arguments.temperature,
                    projections=_projections(arguments.student, scratch),
                    seed=seed,
                    arguments=_training_arguments(arguments),
                )
                return stage.run(model, teacher, tokenizer, folder, resume=True)

            if epochs > 0 and has_prediction_stage:
                student = distil(student, **intermediate, seed=seed, folder=work / "intermediate")
            if task.caches_logits:
                if has_prediction_stage and arguments.labels == "teacher":
                    train = add_teacher_logits(train, teacher, tokenizer, bf16=arguments.bf16)
            elif arguments.augmented:  # changed words change the score, so that the published recipe leaves these out
                train = task.tokenize(_split(task, "train", arguments), tokenizer)

            def train_last(learning_rate: float, batch_size: int, seed: int, folder: Path) -> Any:
                model = copy.deepcopy(student)
                if not has_prediction_stage:
                    return distil(model, learning_rate, batch_size, seed, folder)
                schedule: dict[str, Any] = {
                    "epochs": arguments.prediction_epochs or task.prediction_epochs,
                    "batch_size": batch_size,
                    "learning_rate": learning_rate,
                    "seed": seed,
                    "arguments": _training_arguments(arguments),
                }
                if arguments.labels == "gold":
                    return finetune(model, train, tokenizer, folder, **schedule, resume=True)
                stage = PredictionStage(
                    dataset=train, **schedule, parity=arguments.parity, temperature=arguments.temperature
                )
                return stage.run(model, teacher, tokenizer, folder, resume=True)

            _search(task, arguments, tokenizer, work, train_last, grid)
    _finish(arguments)


def run_finetune(arguments: argparse.Namespace) -> None:
    task = _named_task(arguments, "train")
    grid = {name: getattr(arguments, name) for name in ("learning_rates", "batch_sizes", "seeds")}
    check_grid(**grid)
    if arguments.teacher is None and arguments.init is not None:
        raise ValueError("--init needs --teacher, whose weights it takes")
    if _is_finished(arguments):
        return
    train = _split(task, "train", arguments)
    labels = task.model_options(train)
    source, tokenizer = _load(
        arguments.teacher or arguments.model,
        task.auto_class,
        arguments.trust_remote_code,
        **({"headless": labels} if arguments.teacher else labels),  # a student takes its teacher's labels, if any
    )
    task = task.for_model(source.config, "teacher" if arguments.teacher else "model")
    train = task.tokenize(train, tokenizer)
    for split in task.evaluations:
        _split(task, split, arguments)  # a malformed line shows before the training, not after it

    def fit(learning_rate: float, batch_size: int, seed: int, folder: Path) -> Any:
        torch.manual_seed(seed)  # of the weights that no checkpoint brings
        if arguments.teacher:
            model = _student(arguments, arguments.model, source, tokenizer, train, seed)
        else:
            model = build_student(arguments.model, source, trust_remote_code=arguments.trust_remote_code)
        return finetune(
            model,
            train,
            tokenizer,
            folder,
            epochs=arguments.epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
            arguments=_training_arguments(arguments),
            resume=True,
        )

    if arguments.teacher:  # refuses a wrong --model before --overwrite drops a run
        init = "random" if is_config(arguments.model) else arguments.init
        trust = arguments.trust_remote_code
        _check_rows(task, tokenizer, build_student(arguments.model, source, init=init, trust_remote_code=trust))
    with _whole_output(arguments) as work:
        _search(task, arguments, tokenizer, work, fit, grid)
    _finish(arguments)


def run_evaluate(arguments: argparse.Namespace) -> None:
    task = _named_task(arguments)
    if arguments.json and arguments.json.is_dir():
        raise ValueError(f"--json is the folder {arguments.json}; it should be a file")
    if arguments.json and arguments.json.exists() and not arguments.overwrite:
        raise FileExistsError(f"{arguments.json} exists; pass overwrite=True to replace it")
    names = [arguments.model] + ([arguments.against] if arguments.against else [])
    trust = arguments.trust_remote_code
    models = [_load(name, task.auto_class, trust, needs_head=True) for name in names]
    figures: dict[str, dict[str, Any]] = {}
    for name, (model, tokenizer) in zip(names, models, strict=True):
        task = task.for_model(model.config, argument=name)
        figures[name] = {"parameters": count_parameters(model), "metrics": _metrics(task, arguments, model, tokenizer)}
    if arguments.against:
        (student, tokenizer), (teacher, _) = models
        figures[arguments.model]["speed_up"] = _speed_up(task, arguments, student, teacher, tokenizer)
        scores = [mean_score(figures[name]["metrics"]) for name in names]
        figures[arguments.model]["kept"] = scores[0] / scores[1] if scores[1] > 0 else None
    _print_figures(figures)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_whole(arguments.json, json.dumps(figures, indent=2) + "\n")


# -- parts of commands -------------------------------------------------------------------------------------


def _layer_map(text: str) -> str | list[int | None]:
    if not text.startswith(tuple("-0123456789")):
        return text
    try:
        return [None if part == "-" else int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--layer-map is {text!r}; a list looks like 0,3,6,-,12 with - for none") from None


def _objective_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `Objective` takes for the inner losses, and what the method does not have is refused at once."""
    own = {name: getattr(arguments, name) for name in ("parity", "teacher_layer", "relation_heads")}
    check_method_options(arguments.method, **own)
    if arguments.method == "tinybert":  # else --layer-map only says which layers a new student starts from
        own["layer_map"] = _layer_map(arguments.layer_map)
    terms = resolve_terms(arguments.method, arguments.terms)
    return {"method": arguments.method, "terms": terms, "projection": _projection(arguments), **own}


def _projection(arguments: argparse.Namespace) -> str:
    """The kind of projections asked for, else the kind that the student's folder brings, else shared ones."""
    if arguments.projection is not None:
        return arguments.projection
    found = read_projections(arguments.student)
    return projection_kind(found) if found else "shared"


def _training_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    options: dict[str, Any] = {"bf16": arguments.bf16, "max_steps": arguments.max_steps, "report_to": "none"}
    return options


def _check_stages(arguments: argparse.Namespace, task: Any, terms: Sequence[str]) -> None:
    """ValueError where no stage of `task` would train the head, or one on labels that are not there."""
    if arguments.prediction_epochs == 0:
        if "prediction" not in terms or arguments.intermediate_epochs == 0:
            raise ValueError(
                "--prediction-epochs is 0, and nothing else trains the head of the student; add prediction to --terms, "
                "and leave --intermediate-epochs above 0"
            )
        if arguments.labels == "gold":
            raise ValueError("--labels gold is for the prediction stage, which --prediction-epochs 0 leaves out")
    if "prediction" in terms and task.is_regression and arguments.augmented:
        raise ValueError(
            f"--terms prediction learns the gold scores of {task.name}, which changed words change; leave out "
            "--augmented, or prediction"
        )


def _is_finished(arguments: argparse.Namespace) -> bool:
    """Before a training: whether `--resume` finds a student there already; one killed in its last moment is tidied."""
    check_gpus()

    def is_finished() -> bool:
        output: Path = arguments.output
        if arguments.resume and not arguments.overwrite and (output / "config.json").is_file():
            drop_checkpoints(output)
            return True
        check(output, resume=arguments.resume, overwrite=arguments.overwrite)
        return False

    finished = on_main(is_finished)
    if finished:
        _finish(arguments, "finished before:")
    return finished


def _whole_output(arguments: argparse.Namespace) -> AbstractContextManager[Path]:
    return whole_output(arguments.output, resume=arguments.resume, overwrite=arguments.overwrite)


def _named_task(arguments: argparse.Namespace, *splits: str) -> Any:
    """The task, once its files are known to be there: those of its evaluations, and `splits`."""
    task = get_task(arguments.task)
    if arguments.data is not None:
        for split in (*splits, *task.evaluations):
            file = arguments.data / task.file(split)
            if not file.is_file():
                raise FileNotFoundError(f"{file}: no such file; --data holds {task.name}'s own files")
    return task


def _load(
    name: str,
    auto_class: str | None,
    trust_remote_code: bool,
    needs_head: bool = False,
    headless: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """A checkpoint's model, in float32 and eval mode, on the device to run on, and its tokenizer.

    `auto_class` None: as the language model that it is. `options` win over its config, `headless` only where it has no
    head of this kind.
    """
    disable_fsdp_ram_efficient_loading()  # which gives the weights to one process alone
    folder = Path(name)
    if folder.exists() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{name}: no config.json; it is not a transformers checkpoint")
    if not folder.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"{name}: no such folder")
    if is_published(name):
        model = load_published(name, auto_class or "AutoModelForMaskedLM", **options)
        if headless and untrained_head(model, name):
            model = load_published(name, auto_class or "AutoModelForMaskedLM", **headless)
        if needs_head and (head := untrained_head(model, name)):
            raise ValueError(f"{name}: {UNTRAINED.format(kind=type(model).__name__, missing=f'{head}.weight')}")
        return model.to(processes().device), load_published_tokenizer(name)
    try:
        auto_class = auto_class or _language_model(name, trust_remote_code)
        kind = getattr(transformers, auto_class)
        model, missing = load_checkpoint(kind, name, trust_remote_code=trust_remote_code, **options)
        if missing and headless:
            model, missing = load_checkpoint(kind, name, trust_remote_code=trust_remote_code, **headless)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        if tokenizer.pad_token is None:  # of GPT-2 and Llama; padding is masked, whatever stands there
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions(model))  # rows are cut to what fits
    except OSError as error:
        raise OSError(f"{name}: {error}") from error
    names = ", ".join(sorted(missing))
    if missing and auto_class in ("AutoModelForMaskedLM", "AutoModelForCausalLM"):
        what = "masked" if auto_class == "AutoModelForMaskedLM" else "causal"
        raise ValueError(f"{name}: not a {what} language model with its head (there is no {names})")
    if missing and needs_head:  # else they would be random
        raise ValueError(f"{name}: {UNTRAINED.format(kind=type(model).__name__, missing=names)}")
    return model.eval().to(processes().device), tokenizer


UNTRAINED = "not a trained {kind} (there is no {missing}); `fastdistill finetune` makes a model of the task"


def _language_model(name: str, trust_remote_code: bool) -> str:
    """The Auto class of a language model: masked where its family has such a head and the checkpoint is not causal."""
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    is_causal = any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in config.architectures or ())
    is_masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not is_causal
    return "AutoModelForMaskedLM" if is_masked else "AutoModelForCausalLM"


def _student(
    arguments: argparse.Namespace,
    spec: str,
    teacher: Any,
    tokenizer: Any,
    dataset: Any,
    seed: int,
    work: Path | None = None,
) -> Any:
    """The student; if it is folded from the teacher, with the projections to start from in `work`."""
    torch.manual_seed(seed)  # of weights that no checkpoint brings
    init = "random" if is_config(spec) else arguments.init
    student = build_student(spec, teacher, init=init, trust_remote_code=arguments.trust_remote_code)
    if not is_config(spec) or arguments.init == "random":
        return student
    rows = dataset.select_columns([name for name in tokenizer.model_input_names if name in dataset.column_names])
    chosen: list[Any] = []  # rows spread over the text to learn from
    tokens = 0
    for i in range(0, len(rows), max(len(rows) // 1000, 1)):
        if tokens < CALIBRATION_TOKENS:
            chosen.append(rows[i])
            tokens += len(chosen[-1]["input_ids"])
    calibration = PaddingCollator(tokenizer)(chosen)
    layer_map = _layer_map(arguments.layer_map)
    weight = init_from_teacher(student, teacher, layer_map=layer_map, calibration=calibration)
    if work is not None:
        save_projections(student, teacher, weight, work, **_objective_options(arguments))
    return student


CALIBRATION_TOKENS = 20_000


def _check_identity(arguments: argparse.Namespace, teacher: Any, theirs: dict[str, Any]) -> None:
    """ValueError where a cache is another teacher's. A bare encoder's pooler may be random, and so is not compared."""
    if teacher.base_model is teacher:
        return
    dtype = getattr(teacher_config(arguments.cache), "dtype", None) or teacher.dtype
    cached = teacher if dtype == teacher.dtype else copy.deepcopy(teacher).to(dtype)
    if identity(cached)["weights_sha256"] != theirs["weights_sha256"]:
        raise ValueError(
            f"--teacher {arguments.teacher} has other weights than {theirs['name']}, the teacher whose cache "
            f"{arguments.cache} is"
        )


def _check_rows(task: Any, tokenizer: Any, student: Any) -> None:
    longest = min(task.max_length, tokenizer.model_max_length)
    if positions(student) < longest:
        raise ValueError(
            f"the student takes {positions(student)} tokens at most; rows of {task.name} are cut to {longest}. Give it "
            f"max_position_embeddings {student.config.max_position_embeddings + longest - positions(student)} or more"
        )


def _check_length(max_length: int, name: str, model: Any) -> None:
    if max_length > positions(model):
        raise ValueError(f"--max-length is {max_length}; the {name} takes {positions(model)} tokens at most")


def _head(blocks: Any, max_length: int) -> Any:
    """Enough of a stream's first blocks to calibrate with."""
    first = list(itertools.islice(blocks, CALIBRATION_TOKENS // max_length + 1))
    if not first:
        raise ValueError("corpus holds no text")
    return Dataset.from_list(first)


def _projections(*folders: str | Path) -> Path | None:
    """The first folder that brings projections: an earlier stage's student, or where a folded one left them."""
    return next((Path(folder) for folder in folders if read_projections(folder)), None)


def _split(task: Any, split: str, arguments: argparse.Namespace) -> Any:
    return task.load_split(split, arguments.data)


def _metrics(task: Any, arguments: argparse.Namespace, model: Any, tokenizer: Any) -> dict[str, dict[str, float]]:
    """Of each evaluation set on its own (MNLI has two)."""
    return {split: task.evaluate(_split(task, split, arguments), model, tokenizer) for split in task.evaluations}


def _search(
    task: Any, arguments: argparse.Namespace, tokenizer: Any, work: Path, train: Any, grid: dict[str, Any]
) -> None:
    """The last training over the grid, of which the best becomes the output itself."""
    results = search(train, lambda model: _metrics(task, arguments, model, tokenizer), work, name=task.name, **grid)
    if processes().is_main_process:
        print_results(results)


def _finish(arguments: argparse.Namespace, what: str = "wrote") -> None:
    """Once the output is there, whole: remove what only a killed run would have needed, and name it."""
    if processes().is_main_process:
        runs = arguments.output / "runs"
        if runs.is_dir() and len(list(runs.iterdir())) == 1:
            shutil.rmtree(runs)
        print(f"{what} {arguments.output}")


def _speed_up(task: Any, arguments: argparse.Namespace, student: Any, teacher: Any, tokenizer: Any) -> float:
    """Teacher seconds / student seconds on the same batch of the dev set, interleaved runs."""
    rows = _split(task, task.evaluations[0], arguments)
    rows = task.encode(rows.select(range(min(len(rows), 32))), tokenizer)
    names = [name for name in tokenizer.model_input_names if name in rows.column_names]
    batch = PaddingCollator(tokenizer)(list(rows.select_columns(names)))
    seconds = measure_seconds({"student": student, "teacher": teacher}, batch)
    return seconds["teacher"] / seconds["student"]


def _print_figures(figures: dict[str, dict[str, Any]]) -> None:
    metrics = next(iter(figures.values()))["metrics"]
    shown = [(split, metric) for split, found in metrics.items() for metric in found if metric != "score"]
    table = Table("model", "parameters", *(f"{split} {metric}" for split, metric in shown))
    table.add_column("speed-up")
    table.add_column("kept")
    for name, row in figures.items():
        cells = [f"{100 * row['metrics'][split][metric]:.2f}" for split, metric in shown]
        speed_up, kept = row.get("speed_up"), row.get("kept")
        table.add_row(
            name,
            f"{row['parameters']['total'] / 1e6:.2f}M",
            *cells,
            f"{speed_up:.2f}x" if speed_up else "",
            f"{kept:.1%}" if kept else "",
        )
    Console().print(table)
