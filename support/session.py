"""What surrounds the training loop of distill.py: teacher, text and device, micro-batches, the log, evaluations,
checkpoints and signals. The method itself needs `micro_batches` only; the rest can be skipped when reading it."""

import contextlib
import datetime
import itertools
import json
import math
import os
import shlex
import signal
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm

import data
import prune
from support import checkpoint, distributed, fast, run_folder
from support.distributed import RANK, WORLD, rank_slice, synchronized_time
from support.errors import InputError, Interrupted
from support.evaluation import end_table, evaluate, milliseconds_per_row, sentence_agreement
from support.files import atomic_rename, fsync, model_fingerprint, remove
from support.hub import find_model
from support.model_card import model_card
from support.sentence_encoder import SentenceEncoder, sentences_of
from support.shapes import target_shape

CPU_MICRO_BATCH = 64  # rows; larger ones gain nothing on a CPU
ESTIMATE_AFTER = 3  # steps
FIT_SENTENCES, REPORT_SENTENCES = 8192, 1000


@contextlib.contextmanager
def graceful_stop():
    """`with graceful_stop() as received`: the number of the first SIGTERM or Ctrl-C is put into the list `received`, so
    that the loop can save and stop. A message confirms it, because a step or an evaluation can take minutes and a
    second signal ends a single process at once."""
    received: list[int] = []
    with contextlib.ExitStack() as previous_handlers:
        def remember(number, frame):
            received.append(number)
            message = b"\nsaving and stopping after this micro-batch or evaluation"
            if WORLD == 1:  # torchrun passes signals on, so processes can receive a second one that nobody meant
                previous_handlers.close()  # restores them
                message += b"; a second signal ends the run at once, without saving"
            if RANK == 0:
                os.write(2, message + b"\n")  # print is not safe here: the signal may have interrupted another print

        for number in (signal.SIGTERM, signal.SIGINT):
            previous_handlers.callback(signal.signal, number, signal.signal(number, remember))
        yield received


class Session:
    """The inputs of a run, checked before its folder is written, and everything the loop calls that is not the method.

    teacher is a Bert in evaluation mode, rows and heldout are MaskedRows. The loop runs inside `with running(state)`.
    Raises InputError for anything wrong with flags or files.
    """

    def __init__(self, args):
        self.args = args
        self.device = distributed.find_device(args.device)
        distributed.tune_malloc()
        if args.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it
        torch.use_deterministic_algorithms(args.deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = False  # filling every new tensor only helps debugging
        args.precision = distributed.resolve_precision(args.precision, self.device)  # recorded, and kept on resume
        preset = f"preset {' + '.join(args.preset)}" if args.preset else "those of the paper"
        print(f"settings: {preset} and the flags given; learning rate {args.learning_rate:g}, {args.precision}")
        print(f"{args.steps:,} steps of {args.batch_size:,} x {args.seq_length} tokens on {self.device}"
              f"{f' and {WORLD - 1} more' * (WORLD > 1)}: "
              f"{args.steps * args.batch_size * args.seq_length / 1e6:,.1f} million tokens")

        folder = self.teacher_folder = find_model(args.teacher)
        self.teacher = checkpoint.load_model(folder).to(self.device).eval().requires_grad_(False)
        config = self.teacher.config
        self.encoder = SentenceEncoder.read(folder, config)  # None if the teacher is not one
        if args.keep_space and self.encoder is None:
            raise InputError(f"--keep-space needs a sentence encoder, but {args.teacher} has no modules.json")
        if args.target_width is None:
            args.target_width = config.hidden_size // 2
        self.teacher_shape = prune.Shape.of(config)
        self.target_shape = target_shape(config, args.target_width, args.target_intermediate, args.target_heads)
        if args.output is None:
            teacher_name = Path(args.teacher).resolve().name
            args.output = Path("runs") / ("demo" if "demo" in args.preset else f"{teacher_name}-{args.target_width}")
        run_folder.check_output(args.output, args.overwrite or args.resume)
        if args.output.resolve() in folder.resolve().parents:
            raise InputError(f"--output {args.output} contains the teacher: choose another folder")
        cache = Path(args.cache_dir).expanduser()
        for corpus, ours in itertools.product(filter(os.path.isdir, args.corpus), (args.output, cache)):
            if Path(corpus).resolve() in (ours.resolve(), *ours.resolve().parents):
                raise InputError(f"{ours} is in the corpus {corpus} and would become training text: choose another "
                                 "--output or --cache-dir")
        if args.seq_length > config.max_position_embeddings:
            raise InputError(f"--seq-length {args.seq_length} exceeds the teacher's {config.max_position_embeddings}")
        limit = args.corpus_tokens or math.inf
        if limit < args.batch_size * args.seq_length:
            raise InputError(f"--corpus-tokens {limit} is less than one batch, {args.batch_size} x {args.seq_length}")
        self.tokenizer = checkpoint.load_tokenizer(folder, config.vocab_size)
        self.rows, self.heldout, corpus_key = data.load_rows(
            args.corpus, self.tokenizer, cache, args.seq_length, args.text_column, limit,
            masked=self.teacher.cls is not None)
        if not WORLD <= args.batch_size <= len(self.rows):
            raise InputError(f"--batch-size {args.batch_size} must be at least {WORLD}, the number of processes, and "
                             f"at most {len(self.rows)}, the training rows of {args.seq_length} tokens "
                             f"({len(self.heldout)} more are held out, in whole documents)")
        self.sentences = sentences_of(self.heldout, REPORT_SENTENCES, self.tokenizer) if self.encoder else []
        if self.encoder and len(self.sentences) < 3:
            raise InputError("the held-out part of the corpus has fewer than 3 sentences to compare: use more text")
        self.fit_sentences = sentences_of(self.rows, FIT_SENTENCES, self.tokenizer) if args.keep_space else []
        if args.keep_space and not self.fit_sentences:
            raise InputError("--keep-space finds no sentence to fit on: use more text")
        self.fingerprints = {"corpus": corpus_key, "teacher": model_fingerprint(folder)}
        self.checkpoints = args.output / "checkpoints"
        self.saved = None  # the checkpoint to resume from
        self.found = sorted(self.checkpoints.glob("step-*"))  # before the run folder is claimed
        if args.resume:
            record = run_folder.read_record(args.output)
            for name, fingerprint in self.fingerprints.items():
                if record.get(name) != fingerprint:
                    raise InputError(f"--resume: the {name} has changed since the run in {args.output} started; "
                                     "restore it, or start again with --overwrite")
            self.saved = run_folder.load_newest(self.checkpoints, self.device)
        distributed.init_distributed(self.device)
        if args.micro_batch_size is None:  # recorded, so that a resumed run has the same
            args.micro_batch_size = self.default_micro_batch_size()

    def default_micro_batch_size(self) -> int:
        """What fits into half of the free memory or, with --deterministic, of all memory, which does not vary. A
        training step needs about 20 D + 4 F + 2 S floats for every layer of a token, and 8 V for every masked position.
        """
        args, config = self.args, self.teacher.config
        if self.device.type == "cpu":
            return min(CPU_MICRO_BATCH, -(-args.batch_size // WORLD))
        layer = 20 * config.hidden_size + 4 * config.intermediate_size + 2 * args.seq_length
        token = config.num_hidden_layers * layer + 8 * data.MASKED_FRACTION * config.vocab_size  # floats
        free, total = torch.cuda.mem_get_info(self.device)  # bytes
        memory = min(distributed.all_gather_objects(total if args.deterministic else free))
        return max(1, int(memory / 2 / (4 * token * args.seq_length)))

    def autocast(self):
        return distributed.autocast(self.device, self.args.precision == "bf16")

    @contextlib.contextmanager
    def running(self, state):
        """The run folder, the log, the progress bar and the signal handlers, around the loop."""
        args = self.args
        with run_folder.claimed(args.output):
            if args.resume and self.found != sorted(self.checkpoints.glob("step-*")):
                raise InputError(f"the run in --output {args.output} has only just stopped: repeat the command")
            if RANK == 0 and not args.resume:
                run_folder.start_run(args, self.fingerprints)
            self.print_plan(state)
            with (
                open(args.output / "log.jsonl" if RANK == 0 else os.devnull, "a", buffering=1) as self.log_file,
                tqdm(total=args.steps, initial=state.step, unit="step", desc="distill",
                     disable=None if RANK == 0 else True) as self.progress,
                graceful_stop() as self.signals,
            ):
                if RANK == 0:  # forget what was logged after the checkpoint, which these steps log again
                    self.log_file.truncate(min(self.saved["log_bytes"], self.log_file.tell()) if self.saved else 0)
                if not self.saved:
                    self.log_evaluation(state)
                with fast.compiled(self, state) if fast.worth_compiling(self) else contextlib.nullcontext():
                    self.step_seconds: list[float] = []
                    self.step_start, self.saved_at = time.perf_counter(), time.monotonic()
                    yield
                    self.log_evaluation(state)  # here and not in `end_step`, because a finished run can be resumed, too
            if RANK == 0:
                self.finish(state)

    def finish(self, state):
        """Write the student and print the table at the end of a run."""
        if not all(map(math.isfinite, self.result.values())):
            raise InputError("the student's outputs are not finite after the last step; try a smaller --learning-rate")
        student, encoder = state.distiller.student, self.student_encoder(state)
        milliseconds = milliseconds_per_row([self.teacher, student], self.heldout, self.device, self.autocast)
        if encoder:
            self.result |= sentence_agreement(encoder.vectors(student, self.sentences),
                                              self.encoder.vectors(self.teacher, self.sentences))
        table = end_table(self.teacher, student, self.result, milliseconds)
        self.export(state, encoder, table)
        remove(self.checkpoints)
        print(table)
        print(f"student: {self.args.output / 'student'}")

    def print_plan(self, state):
        args = self.args
        print(f"{args.teacher}: {self.teacher.parameter_count() / 1e6:.1f} M parameters, D F H K "
              f"{tuple(self.teacher_shape)} -> {tuple(self.target_shape)}")
        print(f"{args.steps * args.batch_size / len(self.rows):.2f} passes over the corpus of {len(self.rows):,} rows "
              f"({len(self.heldout):,} more are held out)")
        if 4 * len(self.heldout) > len(self.rows):
            print("more than a fifth of the text is held out: documents stay whole, and one is long (in .txt, a blank "
                  "line ends a document)")
        if self.saved:
            print(f"resumed after step {state.step}")

    def student_encoder(self, state) -> SentenceEncoder | None:
        """The teacher's modules for the student. --keep-space adds a Dense, fitted on training text. Without it, the
        teacher's own Dense reads the student's states through the projection of the last layer, H_t ~= H_s W_hidn. In
        an untrained student that is the same as slicing the Dense with the hidden group."""
        if self.args.keep_space:
            print(f"fitting the student's vectors to the teacher's on {len(self.fit_sentences):,} sentences")
            return self.encoder.fitted(state.distiller.student, self.teacher, self.fit_sentences)
        if self.encoder is None or not self.encoder.dense:
            return self.encoder
        projection = state.distiller.hidden_projections[-1].weight  # (D_t,D_s)
        return self.encoder.composed(projection, torch.zeros(len(projection)))

    def export(self, state, encoder: SentenceEncoder | None, table: str):
        """Write the student atomically as a standard model folder, with its model card and `lineage.json`: for every
        group the teacher indices of the kept units (none for a student that started from random weights)."""
        student, folder = state.distiller.student, self.args.output / "student"
        work = folder.with_name("student.unfinished")
        remove(work)
        work.mkdir()
        checkpoint.save_model(student, work)
        checkpoint.save_tokenizer(self.tokenizer, work,
                                  encoder.max_length if encoder else student.config.max_position_embeddings)
        if encoder:
            encoder.save(work, student.config.hidden_size)
        kept = {} if self.args.init == "random" else {group: ids.tolist() for group, ids in state.lineage.items()}
        (work / "lineage.json").write_text(json.dumps(kept, sort_keys=True) + "\n")
        task = "sentence-similarity" if encoder else "fill-mask" if student.cls is not None else "feature-extraction"
        versions = run_folder.read_record(self.args.output)["versions"]
        (work / "README.md").write_text(model_card(self.args, task, self.teacher_folder, versions, table),
                                        encoding="utf-8")
        atomic_rename(work, folder)

    def micro_batches(self, state):
        """This process's rows of step `state.step`, in micro-batches: (Batch, its fraction of the global batch, whether
        it is the last). A signal is honoured here, where the state of the last finished step is still intact."""
        args = self.args
        torch.manual_seed(((args.seed * args.steps + state.step) * WORLD + RANK) % 2**63)  # of dropout
        first, stop = rank_slice(args.batch_size)
        for begin in range(first, stop, args.micro_batch_size):
            if WORLD == 1 or begin == first:  # the others may be at another micro-batch
                self.stop_on_signal(state)
            end = min(begin + args.micro_batch_size, stop)
            batch = self.rows.training_batch(args.seed, state.step, args.batch_size, begin, end).to(self.device)
            yield batch, (end - begin) / args.batch_size, end == stop

    def stop_on_signal(self, state):
        """Save and raise Interrupted if any process has received a signal. All processes must call this together."""
        received = max(distributed.all_gather_objects(max(self.signals, default=0)))
        if received:
            self.save(state)
            distributed.all_gather_objects(None)  # all wait for the first, because torchrun ends all when one exits
            raise Interrupted(f"interrupted after step {state.step}, which is saved; to resume: python distill.py "
                              f"--resume --output {shlex.quote(str(self.args.output))}", 128 + received)

    @contextlib.contextmanager
    def logged_prune(self, state):
        """Log a prune: the shapes, how long it took and, with --eval-prunes, evaluations before and after."""
        evaluation = self.evaluation if self.args.eval_prunes else lambda state: None
        before, eval_before, start = state.shape, evaluation(state), synchronized_time(self.device)
        yield
        milliseconds = (synchronized_time(self.device) - start) * 1000
        self.log("prune", step=state.step + 1, before=before._asdict(), after=state.shape._asdict(),
                 milliseconds=milliseconds, eval_before=eval_before, eval_after=evaluation(state))

    def check_finite(self, state, losses: dict[str, float], gradient_norm: float):
        if not math.isfinite(gradient_norm + losses["loss"]):
            values = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
            raise InputError(f"step {state.step + 1}: loss or gradient is not finite ({values}, gradient norm "
                             f"{gradient_norm:.4g}); try a smaller --learning-rate, or check the teacher's weights")

    def end_step(self, state, losses: dict[str, float], rate: float, gradient_norm: float):
        """Log, evaluate and save after step `state.step`, when they are due."""
        args, step = self.args, state.step
        is_final = step == args.steps
        self.step_seconds.append(time.perf_counter() - self.step_start)
        self.progress.update()
        if len(self.step_seconds) == ESTIMATE_AFTER and not is_final:
            left = datetime.timedelta(seconds=round(statistics.median(self.step_seconds) * (args.steps - step)))
            self.progress.write(f"about {left} left, less as the student shrinks; for a shorter run use fewer --steps")
        if step % args.log_every == 0 or is_final:
            self.log_training(state, losses, rate, gradient_norm)
        if step % (args.eval_every or max(1, args.steps // 10)) == 0 and not is_final:
            self.log_evaluation(state)
        if is_final or time.monotonic() - self.saved_at >= 60 * args.save_minutes:
            self.save(state)
            self.saved_at = time.monotonic()
        self.step_start = time.perf_counter()  # evaluations and saving are not part of a step

    def log(self, event: str, **values):
        self.log_file.write(json.dumps({"event": event, **values}) + "\n")  # line-buffered

    def log_training(self, state, losses: dict[str, float], rate: float, gradient_norm: float):
        recent = self.step_seconds[-self.args.log_every :]
        batch_tokens = self.args.batch_size * self.args.seq_length
        speed = batch_tokens * len(recent) / sum(recent)
        named = {name if name == "loss" else f"loss_{name}": value for name, value in losses.items()}
        self.log("train", step=state.step, tokens=state.step * batch_tokens, **named, **state.shape._asdict(),
                 parameters=state.distiller.student.parameter_count(), learning_rate=rate, gradient_norm=gradient_norm,
                 tokens_per_second=speed, memory_mb=distributed.peak_memory_mb(self.device))
        self.progress.set_postfix({name: f"{value:.3f}" for name, value in losses.items()} |
                                  {"D": state.shape.hidden_size, "F": state.shape.intermediate_size,
                                   "tok_s": f"{speed:,.0f}"})

    def evaluation(self, state) -> dict[str, float]:
        return evaluate(state.distiller, self.teacher, self.heldout, min(self.args.eval_rows, len(self.heldout)),
                        self.args.micro_batch_size, self.device, self.autocast)

    def log_evaluation(self, state):
        self.result = self.evaluation(state)
        self.log("eval", step=state.step, **self.result)
        values = "  ".join(f"{name} {value:.3f}" for name, value in self.result.items()
                           if not name.startswith("teacher") and not name.endswith("_se"))
        shape = "D {:>4}  F {:>4}  H {:>2}  K {:>2}".format(*state.shape)
        self.progress.write(f"step {state.step:>6}  {shape}  {values}")

    def save(self, state):
        """Write a checkpoint: the state, and the length of the log, which a resumed run continues from there."""
        if RANK == 0:
            log = self.args.output / "log.jsonl"
            fsync(log)
            run_folder.save_checkpoint(self.checkpoints, {
                "step": state.step, "shape": state.shape._asdict(), "model": state.distiller.state_dict(),
                "optimizer": state.optimizer.state_dict(), "lineage": state.lineage, "statistics": state.statistics,
                "log_bytes": log.stat().st_size})

    def restore(self, state):
        """Load the checkpoint into a new state: prune, then load weights, moments and statistics."""
        saved = self.saved
        state.step, state.lineage, state.statistics = saved["step"], saved["lineage"], saved["statistics"]
        prune.prune_units(state.distiller, state.lineage, prune.Shape(**saved["shape"]), state.optimizer)
        state.distiller.load_state_dict(saved.pop("model"))
        state.optimizer.load_state_dict(saved.pop("optimizer"))
