"""The training loop, top to bottom: one rank's whole life. Ray Train starts it on every rank (infra/launch.py).

    build the model -> stretch it, apply the arm, set the pattern -> DeepSpeed engine -> resume ->
    for each step: rows by arithmetic -> loss -> backward -> step -> say so -> checkpoint
    -> check and save the result

Everything that an arm shares with the others (rows, order, seed, schedule) depends on the seed and the step number
alone, so arms differ in nothing but their own choices, and a resumed run goes on bit by bit as if never stopped.

    pytest tests/test_training_loop.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from longreach.attention.causal import Causal
from longreach.attention.hf import active_pattern, set_pattern
from longreach.attention.pattern import Pattern
from longreach.attention.sink_mass import sink_mass
from longreach.attention.ulysses import ALONE, SequenceRanks, part_of, sequence_ranks
from longreach.infra import relay
from longreach.infra.environment import system_metrics
from longreach.infra.errors import OutOfMemory, Stopped, Superseded
from longreach.infra.files import digest_of
from longreach.infra.tracking import read_events
from longreach.training import checkpoint, throughput, zero
from longreach.training.batches import PackedRows, RowOrder
from longreach.training.longlora import apply_arm, trainable_parameters
from longreach.training.loss import TokenLoss, causal_lm, count_targets
from longreach.training.model import fit_embeddings, fresh_llama, load_model, with_softmax_sinks
from longreach.training.planner import Machine, Prediction, Shape, predict
from longreach.training.recipe import OptimRecipe, TrainJob
from longreach.training.skips import Skips
from longreach.training.summary import PackSummary, TrainingSummary
from longreach.training.validation import validation_loss, validation_rows

LARGE_EMBEDDING = 0.1
"""Share of the parameters from which it is said that an arm trains its embeddings: they are 1.9% of Llama-2-7B, 21% of
Llama-3.2-1B."""

PROBE_ROWS = 4
"""The corpus' first rows, on which it is measured where attention rests."""


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Trains as `job` (a TrainJob's fields) says and returns the summary that training.json holds.

    Every rank calls it, with the process group up. Raises ValueError (choices that cannot be), FloatingPointError (too
    many steps in a row had to be skipped; names them and their rows), Superseded (a newer attempt took over), Stopped
    (somebody asked for it; a checkpoint is there), OutOfMemory (says what would fit), RuntimeError (the pattern is not
    on, or the result is not what was trained).
    """
    todo = TrainJob.model_validate(job)
    try:
        return _train(todo)
    except RuntimeError as error:  # torch's OutOfMemoryError is one
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise OutOfMemory(_what_would_fit(todo, str(error))) from error


def _what_would_fit(todo: TrainJob, error: str) -> str:
    """Out of memory, with what to change."""
    of, seq_len = todo.resources, PackSummary.read(todo.corpus).seq_len
    smaller = [
        f"resources.micro_batch_rows {of.micro_batch_rows} -> {of.micro_batch_rows // 2}" * (of.micro_batch_rows > 1),
        "resources.activation_checkpointing true" * (not of.activation_checkpointing),
        f"resources.zero_stage {of.zero_stage} -> 3" * (of.zero_stage < 3 and of.workers > 1),
        f"pack.seq_len {seq_len} -> {seq_len // 2}",
    ]
    return (
        f"out of memory with {of.micro_batch_rows} rows of {seq_len} tokens at once ({error.splitlines()[0]}): "
        f"in this order, try {', '.join(filter(None, smaller))}"
    )


def _train(todo: TrainJob) -> dict[str, Any]:
    optim, resources = todo.optim, todo.resources
    rank, world = dist.get_rank(), dist.get_world_size()
    shared = sequence_ranks(resources.sequence_parallel)
    lane, lanes = rank // shared.size, world // shared.size  # ranks of a lane read the same rows
    out, checkpoints = Path(todo.out), Path(todo.work) / "checkpoints"
    torch.manual_seed(todo.seed)

    zero.check_nvme(resources)
    process_gib = throughput.peak_gib()

    # ---- the rows, and the model as every arm starts
    rows = PackedRows(Path(todo.corpus))
    held_out = []
    if optim.validate_every_steps:
        held_out = validation_rows(Path(todo.corpus), optim.validation_rows, drop_first=drops_first(todo))
        held_out = [part_of(row, shared) for row in held_out]
    packed = rows.summary
    model, tokenizer = build(todo, packed)
    set_active(model, pattern_of(todo, 0), shared)
    start = checkpoint.tensor_digests(model)
    parameters, trainable = model.num_parameters(), trainable_parameters(model)

    # ---- the engine and the rows
    peak_rate = todo.arm.learning_rate or optim.learning_rate
    global_rows = optim.global_batch_tokens // packed.seq_len
    own_rate = todo.arm.embedding_learning_rate or peak_rate
    scales = dict.fromkeys(causal_lm(model).get_input_embeddings().parameters(), own_rate / peak_rate)
    engine = zero.start_engine(
        TokenLoss(model),
        optim,
        resources,
        global_batch_rows=global_rows,
        learning_rate=peak_rate,
        rate_scales=scales,
    )
    engine.train()
    kernel = set_pattern(model, pattern_of(todo, 0), sequence=shared).kernel  # that of the engine's device and type
    order = RowOrder(len(rows), todo.seed, global_rows)
    probe = rows.batch(range(min(PROBE_ROWS, len(rows))), drop_first=drops_first(todo))["input_ids"]
    probe = probe[:, : packed.seq_len - 1].to(engine.device)  # arms without a sink token have one token less

    # ---- what it should cost
    whole_parameters = parameters - trainable.lora
    machine, predicted = foreseen(todo, causal_lm(model), rows, whole_parameters, engine.device, process_gib)

    # ---- resume
    log = StepLog(out / "metrics.jsonl", todo.spool) if rank == 0 else None
    identity = digest_of(todo.choices())
    acts = checkpoint.acts_for_disk(checkpoints)
    done, notes, losses, validated = resume(engine, checkpoints, todo, identity, log, acts)
    skips = Skips(optim, losses)
    if log and (share := trainable.embed / parameters) > LARGE_EMBEDDING and todo.arm.tune != "all":
        log.note(f"embeddings are {share:.0%} of all parameters and train whole: this arm is no small adapter")

    saving: dict[str, float] = {}

    def save(step: int) -> None:
        clock = throughput.Clock()
        ranked = sorted(validated, key=lambda s: validated[s]) if optim.result == "best" else []
        checkpoint.save(
            engine,
            checkpoints,
            step=step,
            identity=identity,
            keep_last=resources.keep_last,
            best=[s for s in ranked if s == step or checkpoint.path_of(checkpoints, s).exists()][: resources.keep_best],
            attach=[out / "metrics.jsonl"],
            share=todo.share,
            acts=acts,
        )
        clock.lap("checkpoint")
        saving.update(clock.laps)
        if log:
            log.checkpoint(step, identity, checkpoint.path_of(checkpoints, step))

    # ---- the steps
    step = saved = done
    while step < optim.steps:
        if Path(todo.superseded_file).exists():
            raise Superseded(f"step {step + 1}: a newer attempt took over ({todo.superseded_file})")
        clock = throughput.Clock()
        set_active(model, pattern_of(todo, step), shared)
        micro_rows = order.for_rank(step, lane, lanes, resources.micro_batch_rows)
        batches = [part_of(rows.batch(ids, drop_first=drops_first(todo)), shared) for ids in micro_rows]
        stop_asked = todo.stop_file is not None and (
            Path(todo.stop_file).exists() or (log is not None and log.stop_asked)
        )
        # One mean over the targets of the whole global batch, however they are spread: the ranks agree on their number.
        targets, tokens, stop = all_sum(
            engine,
            [
                sum(count_targets(b["labels"]) for b in batches),
                sum(b["input_ids"].numel() for b in batches),
                stop_asked,
            ],
        )
        if stop:
            if step > saved:
                save(step)
            raise Stopped(f"stopped after step {step} of {optim.steps}: the same command goes on from there")
        clock.lap("data")
        rate = learning_rate(optim, peak_rate, step)
        loss_sum, norm, why = 0.0, math.nan, ""
        for left, batch in zip(reversed(range(len(batches))), batches, strict=True):
            loss = engine(**{k: v.to(engine.device) for k, v in batch.items()}, scale=world / max(targets, 1))
            loss_sum += loss.item() / world
            clock.lap("forward")
            if not left:
                (mean_loss,) = all_sum(engine, [loss_sum])
                if why := skips.distrusts(step, mean_loss):
                    loss = loss * math.nan  # a step whose gradients are no numbers is left out
            zero.backward(engine, loss)
            clock.lap("backward")
            norm = zero.step(engine, rate)
            clock.lap("step")
        row_ids = order.rows_of_step(step).tolist()
        measured: dict[str, Any] = {}
        if sink_mass_due(todo, step):
            measured["sink_mass"] = sink_mass(causal_lm(model), probe)
        if due(optim.validate_every_steps, step, optim.steps):
            set_active(model, Causal(), shared)
            summed, scored = all_sum(engine, [*validation_loss(engine, held_out, lane, lanes)])
            measured["validation_loss"] = found = summed / scored
            if math.isfinite(found) and math.isfinite(norm):  # a skipped step leaves no checkpoint
                validated[step + 1] = found
        if trained := math.isfinite(norm):
            skips.trained(step, mean_loss)
        if log:
            log.add(
                {"step": step + 1, "loss": mean_loss, "lr": rate, "grad_norm": norm, "tokens": int(tokens)}
                | {"targets": int(targets), "tokens_per_s": tokens / clock.total, "seconds": clock.total}
                | {"phases": clock.laps | saving, "rows": row_ids, "skipped": not trained}
                | measured
                | mfu(machine, predicted, clock.total, world),
                total=optim.steps,
            )
        saving.clear()
        if not trained:
            why = f"step {step + 1} skipped: {why or f'its gradient norm is {norm}'}, in rows {row_ids}"
            if log:
                log.note(why)
            if skips.skipped(step, why):
                if skips.went_back or not saved:
                    raise FloatingPointError(
                        f"{why}; {skips.in_a_row} steps in a row, {'again after' if saved else 'no checkpoint for'}"
                        f" going back: lower learning_rate ({rate:g}) or look at these rows"
                    )
                step, more, _, validated = resume(engine, checkpoints, todo, identity, log, acts)
                saved, notes = step, notes + more
                skips.go_back()
                continue
        step += 1
        best = optim.result == "best" and validated.get(step) == min(validated.values(), default=math.nan)
        regular = step % resources.checkpoint_every_steps == 0 and step < optim.steps
        if (best or regular) and not skips.in_a_row:
            save(step)
            saved = step

    # ---- what leaves
    leaving = step
    if optim.result == "best":
        if not validated:
            raise FloatingPointError("result 'best', but no validation loss was a number: lower learning_rate")
        if (leaving := min(validated, key=lambda s: validated[s])) != step:
            pulled = todo.share and checkpoint.pull(todo.share, checkpoints, identity=identity, acts=acts, step=leaving)
            path = (pulled and pulled[0]) or best_of(leaving, checkpoints, todo.earlier, identity)
            checkpoint.load(engine, path, checkpoints / ".universal", acts=acts)
    (peak_gib,) = all_sum(engine, [throughput.peak_gib()])
    checkpoint.export(model, tokenizer, out, start=start, steps=leaving)
    if not log:
        return {}
    summary = TrainingSummary(
        **throughput.summary(log.rows),
        total_parameters=parameters,
        trainable=trainable,
        machine=machine,
        predicted=predicted,
        peak_gib=peak_gib,
        ranks=world,
        kernel=kernel,
        pattern=str(pattern_of(todo, 0)),
        pattern_at_the_end=str(pattern_of(todo, optim.steps - 1)),
        resumed_from_step=done,
        left_after_step=leaving,
        notes=tuple(notes),
        **todo.choices(),
    )
    summary.write(out)
    if todo.share:
        todo.share.push(out)  # for the node that publishes it
    return summary.to_json()


def build(todo: TrainJob, packed: PackSummary) -> tuple[Any, Any]:
    """(model, tokenizer): the start that all arms share, then this arm's parameters and pattern.

    ValueError: rows of another tokenizer, rows beyond the stretched context. RuntimeError: the pattern is not on.
    """
    tokenizer = AutoTokenizer.from_pretrained(Path(todo.corpus) / "tokenizer", local_files_only=True)
    if todo.kind == "pretrain":
        # All sink arms get the sink token's embedding row, so they start from the same weights; most never look it up.
        own = AutoTokenizer.from_pretrained(todo.base, local_files_only=True)
        if todo.model is not None:
            model: Any = fresh_llama(todo.model, packed.vocab_size, todo.seed)
            for config in (model.config, model.generation_config):
                for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
                    setattr(config, key, getattr(tokenizer, key))
        else:
            model, _ = load_model(todo.base)
            check_tokenizer(own.get_vocab(), tokenizer.get_vocab())
            fit_embeddings(model, tokenizer)
        if todo.sink in ("zero", "logit"):
            model = with_softmax_sinks(model)
        if todo.sink != "token":
            tokenizer = own
    else:
        model, own_tokenizer = load_model(todo.base, rope=todo.rope)
        check_tokenizer(own_tokenizer.get_vocab(), tokenizer.get_vocab())
        if fit_embeddings(model, tokenizer) and todo.arm.tune != "all":
            raise ValueError(
                f"the rows begin with a token that the base lacks ({packed.first_token!r}): an adapter cannot carry "
                f"a resized embedding, so tune 'all', or pack with first_token 'none' or 'bos'"
            )
    # a dynamic stretch begins past the trained length, which the config keeps
    reach = model.config.max_position_embeddings * (todo.rope.factor if todo.rope.type == "dynamic" else 1)
    if packed.seq_len > reach:
        raise ValueError(
            f"rows of {packed.seq_len} tokens exceed the model's {reach:,.0f} positions: "
            f"raise rope.factor, or lower pack.seq_len"
        )
    model.config.use_cache = True  # what a saved model is for; training passes use_cache=False
    if todo.resources.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = apply_arm(model, todo.arm)
    if todo.sink == "zero":  # stays where it starts
        for name, p in model.named_parameters():
            p.requires_grad_(not name.endswith(".sinks"))
    set_active(model, pattern_of(todo, 0))
    return model, tokenizer


def drops_first(todo: TrainJob) -> bool:
    """Whether this arm reads the rows without their sink tokens."""
    return todo.kind == "pretrain" and todo.sink != "token"


def sink_mass_due(todo: TrainJob, step: int) -> bool:
    """Whether it is measured after this step (counted from 0) where attention rests: at the end in any case."""
    every = todo.sink_mass_every
    return due(every, step, todo.optim.steps) or (bool(every) and step == 0)


def due(every: int, step: int, steps: int) -> bool:
    """Whether something that is done after every so many steps (0: never), and the last, follows this one (from 0)."""
    return bool(every) and ((step + 1) % every == 0 or step + 1 == steps)


def pattern_of(todo: TrainJob, step: int) -> Pattern:
    """What a step (counted from 0) attends by: the arm's pattern, and at the end what it anneals to."""
    return todo.arm.attention.pattern_at(step, todo.optim.steps)


def foreseen(
    todo: TrainJob, model: Any, rows: PackedRows, parameters: int, device: torch.device, process_gib: float
) -> tuple[Machine | None, Prediction | None]:
    """What a rank was measured to do in a second, and what a step should cost; both None for a model that is no Llama
    to the planner. parameters: of the model, without LoRA's."""
    shape = Shape.of(model.config.to_dict())
    if not shape.counts(parameters):
        return None, None
    seq_len, document = rows.summary.seq_len, rows.mean_document()
    machine = throughput.calibrated(
        [Path(todo.work), *map(Path, todo.earlier)],
        shape=shape,
        tokens=todo.resources.micro_batch_rows * seq_len // todo.resources.sequence_parallel,
        span=todo.arm.attention.span(int(document)),
        process_gib=process_gib,
        device=device,
        dtype=next(model.parameters()).dtype,
    )
    predicted = predict(
        shape,
        todo.arm,
        rows=todo.optim.global_batch_tokens // seq_len,
        seq_len=seq_len,
        resources=todo.resources,
        machine=machine,
        document=document,
    )
    return machine, predicted


def mfu(machine: Machine | None, predicted: Prediction | None, seconds: float, world: int) -> dict[str, float]:
    """Model FLOPs utilisation: the step's FLOPs, recomputation left out, over what the matrices alone could do here."""
    if machine is None or predicted is None:
        return {}
    return {"mfu": predicted.flops / seconds / world / machine.matmul}


def set_active(model: Any, pattern: Pattern, shared: SequenceRanks = ALONE) -> None:
    """Lets `model` compute `pattern`. RuntimeError: another one is on afterwards."""
    now = active_pattern(model)
    if now is None or (now.pattern, now.sequence) != (pattern, shared):
        asked, now = set_pattern(model, pattern, sequence=shared), active_pattern(model)
        if now != asked:
            raise RuntimeError(f"asked for attention {asked}, but {now} is on")


def check_tokenizer(base: dict[str, int], corpus: dict[str, int]) -> None:
    """ValueError unless the rows' vocabulary is the base's, with at most new tokens after it."""
    wrong = [token for token, number in base.items() if corpus.get(token) != number]
    if wrong or len(corpus) < len(base):
        raise ValueError(
            f"the corpus was packed with another tokenizer: {len(wrong)} of the base's {len(base)} tokens have another "
            f"id or none in it (for instance {wrong[:3]}): pack the corpus with this base"
        )


def learning_rate(optim: OptimRecipe, peak: float, step: int) -> float:
    """The rate of step 0, 1, ...: a linear warm-up that never starts at zero, then constant or falling to zero."""
    if step < optim.warmup_steps:
        return peak * (step + 1) / optim.warmup_steps
    passed = (step - optim.warmup_steps) / max(1, optim.steps - optim.warmup_steps)
    shape = {"constant": 1.0, "linear": 1 - passed, "cosine": (1 + math.cos(math.pi * passed)) / 2}
    return peak * shape[optim.schedule]


def resume(
    engine: Any, own: Path, todo: TrainJob, identity: str, log: StepLog | None, acts: bool
) -> tuple[int, list[str], list[tuple[int, float]], dict[int, float]]:
    """Loads the newest valid checkpoint of this attempt or an earlier one.

    Rank 0 decides, so that all ranks load the same one. Without any, training starts at step 0. Returns the number of
    steps done, notes on what was passed over, (step, loss) of the steps that were trained, and validation losses by
    number of steps.
    """
    found: list[Any] = [None, [], [], []]
    pulled = checkpoint.pull(todo.share, own, identity=identity, acts=acts) if todo.share else None
    if dist.get_rank() == 0:
        folders = [own, *(Path(work) / "checkpoints" for work in todo.earlier)]
        path, passed_over = pulled or checkpoint.newest_valid(folders, identity=identity)
        assert log is not None, "rank 0 keeps the record"
        log.restart(path / "metrics.jsonl" if path else None)
        for note in passed_over:
            log.note(note)
        trained = [row for row in log.rows if not row["skipped"]]
        validated = [(row["step"], value) for row in trained if (value := row.get("validation_loss")) is not None]
        losses = [(row["step"] - 1, row["loss"]) for row in trained]
        found = [path, passed_over, losses, validated]
    dist.broadcast_object_list(found)
    path, notes, losses, validated = found
    path = pulled[0] if pulled else path  # on this node's own disk
    done = checkpoint.load(engine, path, own / ".universal", acts=acts) if path else 0
    return done, notes, losses, dict(validated)


def best_of(step: int, own: Path, earlier: tuple[str, ...], identity: str) -> Path:
    """The checkpoint after so many steps, of this attempt or an earlier one. RuntimeError if none is whole."""
    folders = [own, *(Path(work) / "checkpoints" for work in earlier)]
    for path in (checkpoint.path_of(folder, step) for folder in folders):
        if checkpoint.problem(path, identity=identity) is None:
            return path
    raise RuntimeError(f"the checkpoint after step {step}, which had the lowest validation loss, is gone or damaged")


class StepLog:
    """Rank 0's record: metrics.jsonl (every step once, part of the result) and the spool (what MLflow is shown)."""

    def __init__(self, path: Path, spool: str | None) -> None:
        self.path = path
        self.spool = relay.spool(spool) if spool else None
        self.label = Path(spool).name.partition("@")[0] if spool else ""
        self.rows: list[dict[str, Any]] = []
        # Steps that this attempt already told the spool, before its ranks were restarted: told once is enough.
        self.told = 0
        if spool and Path(spool).exists():
            events = read_events(spool)[0]
            self.told = max((e["step"] for e in events if "train/seconds" in e.get("values", ())), default=0)
        elif path.exists():  # the spool is on another node
            self.told = sum(1 for _ in path.open())

    def restart(self, history: Path | None) -> None:
        """Begins with the steps of the checkpoint that was loaded, if any."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = history.read_text() if history else ""
        self.path.write_text(text)
        self.rows = [json.loads(line) for line in text.splitlines()]

    def add(self, row: dict[str, Any], *, total: int) -> None:
        """One optimizer step; a number that is none is null."""
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self.rows.append(row)
        with self.path.open("a") as f:
            f.write(json.dumps(row) + "\n")
        if self.spool is None:
            return
        if row["step"] > self.told:
            names = ("loss", "lr", "grad_norm", "tokens_per_s", "seconds", "mfu", "validation_loss")
            values = {f"train/{n}": row[n] for n in names if row.get(n) is not None} | {
                f"time/{k}_s": v for k, v in row["phases"].items()
            }
            values |= {f"sink/{k}": sum(layers) / len(layers) for k, layers in row.get("sink_mass", {}).items()}
            self.spool.metrics(values | system_metrics(), step=row["step"])
            self.told = row["step"]  # after going back, steps are not told again
        loss = {} if row["loss"] is None else {"loss": row["loss"]}
        self.spool.progress(row["step"], total, tokens_per_s=row["tokens_per_s"], **loss)

    def checkpoint(self, step: int, identity: str, path: Path) -> None:
        """One that was saved, which MLflow ranks by its losses; its files stay where they are."""
        row = self.rows[-1] if self.rows else {}
        # names of their own: MLflow shows a model's metrics in its run too, where `train/loss` would get a second point
        losses = {f"checkpoint/{n}": row[n] for n in ("loss", "validation_loss") if row.get(n) is not None}
        if self.spool:
            name = f"{self.label} step {step}"
            self.spool.model(name, f"{identity}-{step}", losses, step=step, tags={"checkpoint": path, "step": step})

    @property
    def stop_asked(self) -> bool:
        """Whether the driver, on another node, was asked to stop."""
        return bool(self.spool and self.spool.stop_asked)

    def note(self, text: str) -> None:
        """Something that a reader of the run should know."""
        print(text, flush=True)
        if self.spool:
            self.spool.tag("longreach.note", text)


def all_sum(engine: Any, values: list[float]) -> list[float]:
    """Each value summed over the ranks, exactly (float64)."""
    numbers = torch.tensor(values, dtype=torch.float64, device=engine.device)
    dist.all_reduce(numbers)
    return numbers.tolist()
