"""Wrong lines that the tests must catch: each entry is a file, a line, what it is replaced by, and the test that fails.

    python tests/mutants.py              all of them (make mutants)
    python tests/mutants.py 17 42        some of them, by number

Every mutant is made in a copy of the project, one at a time on each core. It is killed if its test fails. That the tests
pass without mutants is for `make test` to show.
"""

import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

MUTANTS = [
    # prune.py: importance, schedule, choice, pruning
    ("prune.py", "(name, (p * p.grad).abs_())", "(name, p * p.grad)", "prune", "absolute_value"),
    ("prune.py", "values.sum(1 - axis) if", "values.sum(axis) if", "prune", "absolute_value"),
    ("prune.py", ".add_(new, alpha=1 - decay) if", ".add_(new) if", "prune", "absolute_value"),
    ("prune.py", "if p.requires_grad))", "if True))", "prune", "ignores_projections"),
    ("prune.py", "(sensitivity - mean[name]).abs_()", "(sensitivity + mean[name]).abs_()", "prune",
     "platon_importance"),
    ("prune.py", "mean[name], uncertainty[name] = torch.zeros_like(p),", "mean[name], uncertainty[name] = (p * p.grad).abs(),",
     "prune", "platon_importance"),
    ("prune.py", '(name, mean * statistics["uncertainty"][name])', "(name, mean)", "prune",
     "platon_importance"),
    ("prune.py", "if step >= end:", "if step > end:", "prune", "closed_form or schedule"),
    ("prune.py", "(1 - (step - start) / (end - start)) ** power", "(1 - (step - start) / end) ** power", "prune",
     "closed_form or schedule"),
    ("prune.py", "    if fraction == 0:\n", "    if fraction in (0, 1):\n", "prune", "schedule"),
    ("prune.py", "math.ceil(inner / teacher.head_size)", "math.floor(inner / teacher.head_size)", "prune", "whole_heads"),
    ("prune.py", "heads, granularity, teacher", "heads, granularity // 4, teacher", "prune", "schedule"),
    ("prune.py", "min(multiple, full - final)", "multiple", "prune", "granularity"),
    ("prune.py", "full - round((full - size) / multiple)", "round(size / multiple)", "prune", "granularity"),
    ("distill.py", "round(warmup * steps)", "warmup * steps", "distill", "learning_rate"),
    ("distill.py", "state.statistics = {}  #", "pass  #", "distill", "statistics_of_importance"),
    ("prune.py", "intermediate, 4 * granularity", "intermediate, granularity", "prune", "schedule"),
    ("prune.py", ".indices.sort().values", ".indices", "prune", "heads_are_ranked or units"),
    ("prune.py", "both.view_as(by_head).sum(1)", "by_head.sum(1)", "prune", "heads_are_ranked"),
    ("prune.py", "heads[:, None] * shape.head_size + within", "heads[:, None] * new_shape.head_size + within", "prune",
     "heads_are_ranked"),
    ("prune.py", "state |= {key: sliced(name, state[key]) for", "state |= {key: state[key] for", "prune", "moments"),
    ("prune.py", "(new_shape.head_size / bert.config.attention_head_size) ** 0.5", "1.0", "prune", "query_key"),
    ("prune.py", '["exp_avg"].mul_(1 / scale)', '["exp_avg"].mul_(scale)', "prune", "always_scaled"),
    ("prune.py", '["exp_avg_sq"].mul_(1 / scale**2)', '["exp_avg_sq"].mul_(1 / scale)', "prune", "always_scaled"),
    ("prune.py", "layer.num_heads = new_shape.num_heads", "pass", "prune", "head"),
    ("prune.py", "state = optimizer.state.pop(old)", "state = optimizer.state[old]", "prune", "full_size"),
    ("prune.py", "sliced(name, old.detach()), requires_grad=old.requires_grad)", "sliced(name, old.detach()))", "prune",
     "frozen"),
    ("prune.py", "index_select(axis, keep[group])", "index_select(axis, keep[group].sort().values)", "prune", "given_order"),
    ("support/session.py", "shlex.quote(str(self.args.output))", "self.args.output", "session", "signal_stops"),
    ("support/run_folder.py", 'if not (output / "run.json").exists():', "if False:", "session", "needs_an_unfinished"),
    ("prune.py", '"bert.pooler.dense": ("hidden",', '"bert.pooler.dense": (None,', "prune", "shapes_of_a_new"),
    ("support/shapes.py", "and hidden_size // count <= widest]", "]", "prune", "possible or heads"),
    ("support/shapes.py", "possible[0], hidden_size // possible[0])", "possible[-1], hidden_size // possible[-1])", "prune",
     "default_shape"),
    # model.py
    ("model.py", "/ (num_heads * head_size**0.5)", "/ num_heads", "model", "scores"),
    ("model.py", "self.token_type_embeddings.weight[0]", "self.token_type_embeddings.weight[1]", "model", "token_types"),
    ("model.py", "self.LayerNorm(residual + F.dropout(", "self.LayerNorm(F.dropout(", "model", "logits"),
    ("model.py", "attn_mask=mask, dropout_p=dropout", "dropout_p=dropout", "model", ""),
    # distill.py: losses, optimizer, the order of a step
    ("distill.py", "log_target=True, reduction=\"batchmean\") * temperature**2", "log_target=True, reduction=\"batchmean\")",
     "distill", "equations"),
    ("distill.py", "F.log_softmax(logits.float(), dim=-1)", "F.log_softmax(logits, dim=-1)", "distill", "bf16_logits"),
    ("distill.py", "    if temperature != 1:", "    if False:", "distill", "equations"),
    ("distill.py", "zip(student, teacher, strict=True)) / len(teacher)", "zip(student, teacher, strict=True))", "distill",
     "equations"),
    ("distill.py", "zip(self.hidden_projections, hidden, strict=True)]",
     "zip(self.hidden_projections, reversed(hidden), strict=True)]", "distill", "equations"),
    ("distill.py", "nn.init.eye_(projection.weight)", "nn.init.normal_(projection.weight)", "distill", "exactly_zero"),
    ("distill.py", ' or "projection" in name', "", "distill", "three_updates"),
    ("distill.py", "(0.9, 0.999), 1e-6", "(0.9, 0.99), 1e-6", "distill", "three_updates"),
    ("distill.py", "min(rising, (steps - step)", "max(rising, (steps - step)", "distill", "learning_rate"),
    ("distill.py", "student.set_dropout(args.dropout)", "pass", "distill", "every_setting"),
    ("distill.py", "student.bert.pooler.requires_grad_(False)", "pass", "distill", "order_of"),
    ("distill.py", "(losses[\"loss\"] * fraction * distributed.WORLD).backward()", "losses[\"loss\"].backward()", "distill",
     "micro_batches"),
    ("distill.py", "        if state.shape != session.target_shape:\n            prune.acc",
     "        nn.utils.clip_grad_norm_(distiller.parameters(), args.clip)\n        if True:\n            prune.acc",
     "distill", "before_clipping or order_of"),
    ("distill.py", "        optimizer.zero_grad()\n\n        # 4",
     "        prune.accumulate_importance(args.importance, state.statistics, distiller.student, 0.9)\n"
     "        optimizer.zero_grad()\n\n        # 4", "distill", "order_of"),
    ("distill.py", "        if not ranking:\n", "        if True:\n", "distill", "ranks_the_first_prune"),
    ("distill.py", '| ({"ranking": 1.0} if ranking else {})', "", "distill",
     "ranks_the_first_prune"),
    ("distill.py", "torch.randn_like(output)", "torch.zeros_like(output)", "distill", "without_head_is_ranked"),
    ("distill.py", "prune.scheduled_shape(state.step + 1,", "prune.scheduled_shape(state.step + 2,", "distill",
     "equal_start_and_end"),
    ("distill.py", "prune.scheduled_shape(state.step + 1,", "prune.scheduled_shape(state.step,", "distill",
     "equal_start_and_end"),
    ("distill.py", "(state.lineage, *state.statistics.values()))", "(state.lineage,))", "distill", "log_jsonl"),
    ("distill.py", "(state.lineage, *state.statistics.values()))", "(*state.statistics.values(),))", "distill", "submatrix"),
    ("distill.py", "prefer_first = {group: -indices", "prefer_first = {group: indices", "distill", "truncated"),
    ("distill.py", '"alpha_mlm": 0.0', '"alpha_mlm": 0.5', "distill", "compensated_presets"),
    # data.py
    ("data.py", "action < 0.8, self.mask", "action < 0.9, self.mask", "data", "80_10_10"),
    ("data.py", "default_rng([seed, epoch])", "default_rng([seed])", "data", "epoch"),
    ("data.py", "key=[seed, step]", "key=[seed, 0]", "data", "differently"),
    ("data.py", ".advance(first * blocks_per_row)", "", "data", "part_of_a_batch"),
    ("support/corpus.py", "min(share, HELDOUT_TOKENS - 1)", "share", "data", "heldout_part_is_limited"),
    ("support/corpus.py", "held = meta[\"heldout\"] <=", "held = meta[\"train\"] <=", "data", "twentieth"),
    ("support/corpus.py", 'if document != meta["document"]:', "if True:", "data", "same_side"),
    ("support/corpus.py", "heading or not (piece or headings)", "heading or not piece", "data", "article"),
    ("support/corpus.py", "heading or not (piece or headings)", "not (piece or headings)", "data", "article"),
    ("support/corpus.py", '" = [^=\\s](.*[^=\\s])? = \\n*"', '" = .* = \\n*"', "data", "article"),
    ("support/corpus.py", '*demo_records]:\n            headings, text = False, ""',
     '*demo_records]:\n            headings, text = number > 0, ""', "data", "article"),
    ("support/corpus.py", "if starts and complete and line.isspace()", "if line.isspace()", "data", "long_documents"),
    ("support/corpus.py", "meta = read_json(record)", 'meta = read_json(record) | {"document": -1}', "data",
     "stays_on_its_side"),
    ("support/corpus.py", 'stream.truncate(meta[side] * np.dtype(meta["dtype"]).itemsize)', "pass", "crash_consistency", "tokenising"),
    ("support/corpus.py", "            write_atomically(record, json.dumps(meta))",
     "            record.write_text(json.dumps(meta))", "crash_consistency", "tokenising"),
    ("support/corpus.py", "                os.fsync(stream.fileno())", "                pass", "crash_consistency", "tokenising"),
    ("support/corpus.py", "tokenizer.to_str(), list(columns)", "tokenizer.to_str()", "data", "columns"),
    ("support/corpus.py", '"\\n".join(filter(None, map(record.get, columns)))', 'str(record[columns[0]])', "data", "columns"),
    ("support/corpus.py", 'endswith((".json", ".jsonl"))', 'endswith(".jsonl")', "data", "all_file_formats"),
    ("support/session.py", "args.text_column, limit,", '["text"], limit,', "distill", "text_column"),
    ("support/corpus.py", 'while meta["train"] < limit and', "while", "data", "with_the_limit"),
    ("support/corpus.py", "list(columns), limit, demo", "list(columns), demo", "data", "with_the_limit"),
    ("support/corpus.py", 'config.replace("-", "/")', "config", "hub", "large_web"),
    ("support/corpus.py", "list(filter(TRAINING_FILE.search, files)) or files", "files", "hub", "exact_name or only_configuration"),
    ("support/corpus.py", " and not OTHER_SPLIT.search(name)", "", "hub", "exact_name"),
    ("support/hub.py", "            raise OSError(f\"the hub", "            raise InputError(f\"the hub", "hub", "needed_files"),
    ("support/hub.py", "patterns = files if download else []", "patterns = files", "hub", "needed_files"),
    ("support/hub.py", "patterns = files if download else []", "patterns = []", "hub_reliability", "downloaded_once"),
    ("support/session.py", "total if args.deterministic else free", "free", "session", "micro_batch_size"),
    ("support/flags.py", "number(int, 2, 10**9)", "COUNT", "distill", "bad_flags"),
    ("data.py", "if len(heldout) < 2:", "if not len(heldout):", "data", "two_rows"),
    ("support/session.py", "if limit < args.batch_size * args.seq_length:", "if False:", "distill", "corpus_tokens"),
    # tokenizers
    ("support/checkpoint.py", 'settings.get(f"{role}_token", token)', "token", "checkpoint", "xlmr"),
    ("support/checkpoint.py", '"special_tokens_map.json", "tok', '"tok', "checkpoint", "xlmr"),
    ("support/checkpoint.py", 'if kind not in ("BertTokenizer"', 'if False and kind not in ("BertTokenizer"', "checkpoint", "another_tokenizer"),
    ("support/checkpoint.py", '("config.json", "special', '("special', "checkpoint", "another_tokenizer"),
    ("support/checkpoint.py", "tokenizer.post_processor = processors.BertProcessing(*ends)", "pass", "checkpoint", "without_a_template"),
    ("support/checkpoint.py", "for role, token in tokenizer.special.items()}", "for role, token in BERT_TOKENS.items()}", "checkpoint", "xlmr"),
    ("support/checkpoint.py", '"input_ids", "token_type_ids", "attention_mask"', '"input_ids", "attention_mask"', "checkpoint", "other_than_berts"),
    ("support/glue.py", "special=True", "special=False", "finetune", "rows_equal"),
    ("support/glue.py", "encoding.type_ids.count(0)", "len(encoding.ids)", "finetune", "rows_equal"),
    ("support/glue.py", "    tokenizer.no_truncation()", "    pass", "finetune", "rows_equal"),
    ("support/squad.py", "*ids, *middle, *context", "*ids, *tail, *context", "squad", "xlmr"),
    # evaluation
    ("support/evaluation.py", "F.kl_div(log_q, log_p", "F.kl_div(log_p, log_q", "distill", "evaluations_are_means"),
    ("support/evaluation.py", 'reduction="none").sum(-1)', 'reduction="none").sum(-1) / 2', "distill",
     "evaluations_are_means"),
    ("support/evaluation.py", "(log.argmax(-1) == batch.labels).float()",
     "(log.topk(5).indices == batch.labels[:, None]).any(1).float()", "distill", "evaluations_are_means"),
    ("support/evaluation.py", "first=begin)", "first=0)", "distill", "evaluations_are_means"),
    ("support/evaluation.py", "numbers * len(heldout) // count", "numbers", "distill", "spread"),
    ("support/evaluation.py", "ddof=1", "ddof=0", "distill", "evaluations_are_means"),
    ("support/session.py", "evaluate(state.distiller, self.teacher, self.heldout,", "evaluate(state.distiller, self.teacher, self.rows,",
     "distill", "held_out_row"),
    ("support/session.py", "+ state.step) * WORLD + RANK)", ") * WORLD + RANK)", "distill", "own_dropout"),
    # extensions
    ("extensions/compensate.py", "    while wanted > 0:", "    step -= 1\n    while wanted > 0:", "extensions", "upcoming"),
    ("extensions/compensate.py", "args, rows = session.args, session.rows", "args, rows = session.args, session.heldout",
     "distill", "held_out_row"),
    ("extensions/compensate.py", "RIDGE = 1e-3", "RIDGE = 1e-1", "extensions", "ridge"),
    ("extensions/compensate.py", "        plain[range(len(self.keep)), self.keep] = 1.0\n", "", "extensions", "ridge"),
    ("extensions/compensate.py", "linear.bias += linear.weight.double() @ c", "pass", "extensions", "inner_units"),
    ("extensions/compensate.py", "[*last, bert.bert.pooler[\"dense\"]]", "last", "extensions", "every_reader"),
    ("extensions/compensate.py", "[layer.intermediate[\"dense\"]]", "[]", "extensions", "every_reader"),
    ("extensions/compensate.py", "LayerNorm, distiller.embedding_projection",
     "LayerNorm, distiller.hidden_projections[0]", "extensions", "every_reader or projections"),
    ("extensions/compensate.py", "layer.output.LayerNorm, distiller.hidden_projections[i]",
     "layer.output.LayerNorm, distiller.hidden_projections[0]", "extensions", "projections or every_reader"),
    ("extensions/compensate.py", "place.fit(constant=False)", "place.fit()[:-1]", "extensions", "projections"),
    ("extensions/compensate.py", "            rescale(place)", "            pass", "extensions",
     "hidden_units"),
    ("extensions/compensate.py", "        refit_decoder(bert", "        (lambda *_: None)(bert", "extensions", "decoder"),
    ("extensions/compensate.py", "weight / (variance + module.LayerNorm.eps)", "weight", "extensions",
     "inner_units"),
    ("extensions/align_heads.py", "balancing_transforms(v @ moment @ v.mT, o.mT @ o)",
     "balancing_transforms(o.mT @ o, v @ moment @ v.mT)", "extensions", "align or balancing"),
    ("extensions/align_heads.py", "[output.embedding, *output.hidden[:-1]]", "output.hidden", "extensions", "singular"),
    # files, checkpoints, resume
    ("support/files.py", "        fsync(path)\n", "        pass\n", "crash_consistency", "replaced"),
    ("support/files.py", "        fsync(path)\n", "        pass\n", "crash_consistency", "exported"),
    ("support/files.py", "        fsync(path)\n", "        pass\n", "crash_consistency", "checkpoint"),
    ("support/files.py", "    fsync(target.parent)\n", "", "crash_consistency", "checkpoint"),
    ("support/run_folder.py", "CHECKPOINTS_KEPT = 2", "CHECKPOINTS_KEPT = 1", "session", "damaged_checkpoint"),
    ("support/session.py", 'saved["lineage"], saved["statistics"]', 'saved["lineage"], {}', "session", "bit_for_bit"),
    ("support/session.py", 'state.distiller.load_state_dict(saved.pop("model"))', "pass", "session", "bit_for_bit"),
    ("support/session.py", 'state.optimizer.load_state_dict(saved.pop("optimizer"))', "pass", "session", "bit_for_bit"),
    ("support/session.py", 'min(self.saved["log_bytes"], self.log_file.tell())', "self.log_file.tell()", "session",
     "logged_once"),
    ("support/session.py", "60 * args.save_minutes", "args.save_minutes", "session", "save_minutes"),
    ("support/session.py", "if record.get(name) != fingerprint:", "if False:", "session", "another_teacher"),
    ("support/flags.py", '"micro_batch_size", "device", "teacher"', '"micro_batch_size", "device", "learning_rate", "teacher"', "session",
     "refuses_flags"),
    ("support/flags.py", 'defaults | given | {"preset": chosen}', 'given | defaults | {"preset": chosen}', "distill",
     "flags_win"),
    # sentence encoders
    ("data.py", "default_rng([seed, step]).integers", "default_rng([seed, first]).integers", "data", "unmasked_rows"),
    ("data.py", "self.seq_length // parts - 2", "(self.seq_length - 2) // parts", "data", "unmasked_rows"),
    ("data.py", "kind = MaskedRows if masked else UnmaskedRows", "kind = MaskedRows", "data", "load_rows"),
    ("distill.py", "self.encoder.distance(self.hidden_projections[-1]", "self.encoder.distance(self.hidden_projections[0]", "sentence_encoder", "loss_of"),
    ("distill.py", "(student.hidden[-1]), teacher.hidden[-1])", "(student.hidden[0]), teacher.hidden[-1])", "sentence_encoder", "loss_of"),
    ("support/session.py", "masked=self.teacher.cls is not None", "masked=True", "sentence_encoder", "learn_from"),
    ("support/sentence_encoder.py", "(hidden.float(), mask), dim=1)", "(hidden.float(), mask), dim=0)", "sentence_encoder", "loss_of"),
    ("support/sentence_encoder.py", 'hidden[:, 0] if self.pooling == "cls" else mean', "mean", "sentence_encoder", "opens_as"),
    ("support/sentence_encoder.py", "/ mask.sum(1)", "/ mask.shape[1]", "sentence_encoder", "opens_as"),
    ("support/sentence_encoder.py", "hidden_size  # the name", "len(self.settings)  # the name", "sentence_encoder", "opens_as"),
    ("support/sentence_encoder.py", "min([*limits[:1],", "min([*limits[1:],", "sentence_encoder", "earlier_versions"),
    ("support/sentence_encoder.py", '{"modules.json": table, **self.settings}', '{"modules.json": table}', "sentence_encoder", "opens_as"),
    ("support/sentence_encoder.py", r'r"\w[\w.-]*"', '".*"', "sentence_encoder", "refused"),
    ("support/sentence_encoder.py", "not finite or bias.dim()", "bias.dim()", "sentence_encoder", "refused"),
    ("support/session.py", "self.encoder.composed(projection, torch", "self.encoder.composed(torch.eye(*projection.shape), torch",
     "sentence_encoder", "sliced"),
    ("support/sentence_encoder.py", "value=1.0)  # (N,D_s+1)", "value=0.0)  # (N,D_s+1)", "sentence_encoder", "keep_space"),
    ("support/sentence_encoder.py", "diagonal()[:-1].mean())", "diagonal().mean())", "sentence_encoder", "keep_space"),
    ("support/sentence_encoder.py", "first.weight @ bias + first.bias", "first.bias", "sentence_encoder", "keep_space"),
    ("support/sentence_encoder.py", "parts[1:-1] or parts", "parts", "sentence_encoder", "different_whole"),
    ("support/sentence_encoder.py", "sentences[part.tobytes()]", "sentences[i, part.tobytes()]", "sentence_encoder", "different_whole"),
    ("support/session.py", "sentences_of(self.rows, FIT", "sentences_of(self.heldout, FIT", "sentence_encoder", "keep_space"),
    ("support/evaluation.py", "(s @ s.T)[pairs]", "(s @ t.T)[pairs]", "sentence_encoder", "agreement"),
    ("support/evaluation.py", "(s @ t.T).argmax(1)", "(s @ t.T).argmax(0)", "sentence_encoder", "agreement"),
    ("support/model_card.py", "None if Path(args.teacher).is_dir() else", "", "model_card", "metadata"),
    ("support/model_card.py", '"sentence-transformers" if task', '"transformers" if task', "model_card", "metadata"),
    ("support/flags.py", "set(defaults)", 'set(defaults) - {"command"}', "session", "given_again"),
    ("support/session.py", "encoder.max_length if encoder else", "", "sentence_encoder", "opens_as"),
    ("support/hub.py", "[*weights, *others, *modules]", "[*weights, *others]", "hub", "sentence_encoder"),
    ("support/files.py", '*folder.glob("[0-9]*_*/*")', "", "files", "fingerprint"),
    ("support/glue.py", '"".join(map(file_hash, files)).encode()', 'b""', "finetune", "other_data"),
    ("support/corpus.py", "utf-8-sig", "utf-8", "data", "byte_order"),
    ("teachers/train_teacher.py", "0, VOCABULARY_PIECES, 8", "0, None, 8", "teachers", "vocabulary"),
    ("support/files.py", "path == weight_file(path.parent) or path.name in MODEL", "path.name in WEIGHT_FILES + MODEL", "files", "fingerprint"),
    ("extensions/compensate.py", "mean().clamp(min=1e-12) * torch.eye(rows)", "mean() * torch.eye(rows)", "extensions",
     "all_zero"),
    ("extensions/compensate.py", "trace().clamp(min=1e-12)", "trace()", "extensions", "single_hidden"),
    ("extensions/compensate.py", "left.diagonal().mean().clamp(min=1e-12)", "left.diagonal().mean()", "extensions",
     "single_hidden"),
    ("support/distributed.py", "{1,2}", "+", "distill", "one_line"),
    ("support/session.py", "if 4 * len(self.heldout) > len(self.rows):", "if False:", "distill", "long_first"),
    ("distill.py", 'return bool(head) and {"hidn", "emb"} <= self.alphas.keys()', "return False", "distill", "unused_parameters"),
    ("support/distributed.py", "        index %= max(count, 1)", "        pass", "distributed", "share_gpus"),
    ("support/distributed.py", "        return  # reading the indices", "        pass  # reading the indices", "distributed", "kept_units"),
    ("support/fast.py", "            session.save(state)\n", "", "fast", "later_compilation"),
    ("support/batches.py", "[to_device(tensor, device) for", "[tensor.to(device) for", "cuda", "pinned"),
    ("support/session.py", "args.batch_size * args.seq_length / 1e6", "args.batch_size / 1e6", "distill", "size_of_the_run"),
    ("support/session.py", "args.steps * args.batch_size / len(self.rows)", "args.steps / len(self.rows)", "distill", "time_left"),
    ("support/session.py", "statistics.median(self.step_seconds)", "statistics.fmean(self.step_seconds)", "distill", "time_left"),
    ("support/session.py", "median(self.step_seconds) * (args.steps - step)", "median(self.step_seconds) * args.steps", "distill", "time_left"),
    ("experiments/experiment.py", 'r"(^|=)/.*/', 'r"(^)/.*/', "experiments", "records_its_command"),
    ("extensions/compensate.py", "math.ceil(wanted / steps)", "wanted", "extensions", "all_lengths"),
    ("distill.py", "if args.align_heads and not session.saved:  # before", "if args.align_heads and args.init == 'teacher':  # ",
     "extensions", "before_a_student"),
    ("support/files.py", 'work.rglob("*")', "work.iterdir()", "crash_consistency", "exported"),
    ("pyproject.toml", '"torch>=2.13,<3"', '"torch>=2.14,<3"', "files", "pyproject"),
    ("pyproject.toml", '    "pyarrow>=18",\n', "", "files", "pyproject"),
    # devices and precision
    ("support/distributed.py", "(tensor.pin_memory() if torch.device(device).type == \"cuda\" else tensor).to(device, non_blocking=True)",
     "tensor", "cuda", "right_device"),
    ("data.py", "to_device(tensor, device) for tensor", "tensor.to(device) for tensor", "cuda", "pinned"),
    ("prune.py", "torch.rand(len(m), generator=generator).to(m.device)", "torch.rand(len(m), generator=generator)", "cuda",
     "right_device"),
    ("prune.py", "device=parameters[name].device)", "device='cpu')", "cuda", "right_device"),
    ("support/run_folder.py", "map_location=device", 'map_location="cpu"', "cuda", "right_device"),
    ("extensions/compensate.py", "UNMASKED_WEIGHT, device=batch.input_ids.device)", "UNMASKED_WEIGHT)", "cuda",
     "right_device"),
    ("extensions/align_heads.py", "torch.eye(moment.shape[1]).to(moment)", "torch.eye(moment.shape[1])", "cuda",
     "right_device"),
    ("support/distributed.py", ">= (8, 0)", ">= (7, 0)", "distributed", "ampere"),
    ("support/distributed.py", "        torch.backends.cuda.enable_cudnn_sdp(False)\n", "", "distributed", "cudnn"),
    ("support/distributed.py", "torch.cpu._is_amx_tile_supported() or (", "(", "distributed", "faster"),
    ("support/distributed.py", ' and "GenuineIntel" not in CPUINFO.read_text()', "", "distributed", "faster"),
    ("support/distributed.py", " * query.shape[-1] ** -0.5", "", "distributed", "agrees_with_torch"),
    ("support/distributed.py", "if attn_mask is not None:", "if False:", "distributed", "agrees_with_torch"),
    ("support/distributed.py", "~attn_mask", "attn_mask", "distributed", "agrees_with_torch"),
    ("support/distributed.py", "F.dropout(scores.softmax(-1), dropout_p)", "scores.softmax(-1)", "distributed",
     "agrees_with_torch"),
    ("support/distributed.py", "torch.autocast(device.type, torch.bfloat16,", "torch.autocast(device.type,", "distributed",
     "plain_one"),
    ("support/distributed.py", 'if bf16 and device.type == "cpu":', "if bf16:", "distributed", "plain_one"),
    ("support/distributed.py", 'if bf16 and device.type == "cpu":', 'if device.type == "cpu":', "distributed", "plain_one"),
    ("support/distributed.py", "            F.scaled_dot_product_attention = attention\n", "            pass\n",
     "distributed", "plain_one"),
    ("support/errors.py", "|ALLOC_FAILED", "", "session", "full_memory"),
    ("support/errors.py", "|allocate memory", "", "session", "full_memory"),
    ("support/errors.py", "not isinstance(error, LocalError)", "True", "session", "common_error"),
    # experiments and fine-tuning
    ("experiments/experiment.py", "statistics.stdev(values) if", "statistics.pstdev(values) if", "experiments", "deviation"),
    ("experiments/experiment.py", "statistics.stdev(values) if", "0.0 if", "experiments", "deviation"),
    ("support/metrics.py", "2 * true_positives / positives", "true_positives / positives", "metrics", "scikit"),
    ("support/metrics.py", "(counts - 1) / 2", "counts", "metrics", "scipy"),
    ("finetune.py", "if score > best_score:", "if True:", "finetune", "best"),
    ("finetune.py", 'rows[f"dev{suffix}"]', 'rows[f"dev{task.suffixes[0]}"]', "finetune", "mnli"),
    ("finetune.py", '("_matched", "-m")', '("_matched", "-mm")', "finetune", "mnli"),
    ("finetune.py", "nn.utils.clip_grad_norm_(net.parameters(), MAX_GRADIENT_NORM)", "pass", "finetune", ""),
    ("support/batches.py", "mask = columns < torch", "mask = columns <= torch", "finetune", "batches"),
    ("experiments/to_tensorboard.py", "value, step)", "value)", "experiments", "tensorboard"),
    ("experiments/to_tensorboard.py", "    shutil.rmtree(folder, ignore_errors=True)\n    work.rename(folder)",
     "    shutil.copytree(work, folder, dirs_exist_ok=True)\n    shutil.rmtree(work)", "experiments", "tensorboard"),
    ("experiments/to_tensorboard.py", 'in ("train", "eval")', 'in ("train",)', "experiments", "tensorboard"),
    ("experiments/export_onnx.py", "pool(hidden, attention_mask)", "pool(hidden, attention_mask * 0 + 1)", "sentence_encoder",
     "exported"),
    ("experiments/export_onnx.py", "else cosine >= SMALLEST_COSINE", "else True", "sentence_encoder", "exported"),
    ("experiments/export_onnx.py", "return int(not passed)", "return 0", "sentence_encoder", "exported"),
    # benchmarks/traffic.py
    ("benchmarks/traffic.py", "[args, kwargs, changed if result is None else result])", "[args, kwargs])", "benchmarks",
     "hand_computed"),
    ("benchmarks/traffic.py", ", strict=True) if stride)", ", strict=True))", "benchmarks", "hand_computed"),
    ("benchmarks/traffic.py", 'name != "_unsafe_view" and', "", "benchmarks", "hand_computed"),
    ("benchmarks/traffic.py", "GRADIENTS if sums else self.parts", "self.parts", "benchmarks", "hand_computed"),
    ("benchmarks/traffic.py", "bisect.bisect(self.first_nodes, node._sequence_nr()) - 1", "-1", "benchmarks",
     "hand_computed"),
    ("benchmarks/traffic.py", "function.is_view or self.in_kernels", "function.is_view", "benchmarks", "hand_computed"),
    ("benchmarks/traffic.py", "if not isinstance(node, scheduler.ExternKernelSchedulerNode)", "", "benchmarks", "of_a_step"),
    ("benchmarks/traffic.py", '{"dynamic": False}', "{}", "benchmarks", "of_a_step"),
    ("benchmarks/traffic.py", "bytes=o.bytes * share", "bytes=o.bytes", "benchmarks", "of_a_step"),
    ("benchmarks/traffic.py", "max(o.flops / args.tflops / 1e9, o.bytes / bandwidth / 1e6)", "o.flops / args.tflops / 1e9",
     "benchmarks", "follow_from_the_schedule"),
    ("benchmarks/traffic.py", "PAPER.prune_end * PAPER.steps", "PAPER.steps", "benchmarks", "follow_from_the_schedule"),
    ("benchmarks/throughput.py", "list(dict.fromkeys([*measured, last]))", "[*measured, last]", "benchmarks",
     "short_schedule"),
    ("benchmarks/systems.py", "    find_device(str(device))", "    pass", "benchmarks", "kernels"),
    # the run folder, and what is read and written beside it
    ("support/session.py", "if args.output.resolve() in folder.resolve().parents:", "if False:", "distill", "overwriting"),
    ("support/run_folder.py", "locked(output, wait=False)", "contextlib.nullcontext()", "session", "not_ended"),
    ("support/run_folder.py", "if not all_gather_objects(is_free)[0]:", "if not is_free:", "processes", "refused_by_all"),
    ("support/run_folder.py", "    check_output(args.output, args.overwrite)", "    pass", "session", "meanwhile"),
    ("support/run_folder.py", ', args.output / "tensorboard"', "", "session", "overwriting"),
    ("support/flags.py", ', "teacher", "corpus"}', "}", "session", "moved"),
    ("support/flags.py", "if words.encode(errors=\"ignore\").decode() != words:", "if False:", "finetune", "utf8"),
    ("support/corpus.py", "os.path.realpath(str(file))", "str(file)", "data", "named_twice"),
    ("support/checkpoint.py", " and max(vocab.values()) < len(vocab)", "", "checkpoint", "gap"),
    ("support/squad.py", "    if not windows:", "    if False:", "squad", "misplaced"),
    ("support/squad.py", ", in or after question", ", question", "squad", "named_with_their_question"),
    ("teachers/train_teacher.py", 'if (args.output / "config.json").exists():', "if False:", "teachers", "refuses"),
    ("teachers/train_teacher.py", "if not len(phases[1]) or not len(heldout):", "if False:", "teachers", "refuses"),
    ("teachers/train_teacher.py", "if not loss.isfinite():", "if False:", "teachers", "refuses"),
    ("finetune.py", 'type=lambda name: name.rstrip("/") or name, ', "", "finetune", "slash"),
    ("finetune.py", "BASE_WIDTH / bert.config.hidden_size", "1", "finetune", "task_defaults"),
    ("finetune.py", "data_hash(source, key) if source", "str(source) if source", "finetune", "moves or other_data"),
    ("experiments/experiment.py", " and origin.items() <= row.items()", "", "experiments", "saved_results"),
    ("experiments/experiment.py", 'in results if result["base"] == BASE', "in results", "experiments", "saved_results"),
    ("experiments/experiment.py", 'name.endswith("rows")', 'name == "rows"', "experiments", "what_is_measured"),
    ("experiments/experiment.py", "if not same.items() <= row.items():", "if False:",
     "experiments", "not_made_again"),
    ("experiments/experiment.py", 'result["model"] == str(model) and', "", "experiments", "fine_tuned"),
    ("experiments/experiment.py", ' and result["task"] in tasks:', ":", "experiments", "fine_tuned"),
    ("experiments/widths.py", "onnx_files(folder)[precision]", 'onnx_files(folder)["int8"]', "experiments_reliability",
     "in_int8"),
    ("support/run_folder.py", "        remove(old)", "        shutil.rmtree(old, ignore_errors=True)", "session", "behind_a_link"),
    ("support/session.py", "if args.resume and self.found !=", "if False and self.found !=", "session", "meanwhile"),
    ("support/session.py", "in (ours.resolve(), *ours.resolve().parents):", "in ():", "session", "cannot_hold"),
    ("support/session.py", "            if WORLD == 1:  # torchrun", "            if True:  # torchrun", "session", "outlive"),
    ("support/session.py", "if not all(map(math.isfinite, self.result.values())):", "if False:", "distill",
     "after_the_last_step"),
    ("support/session.py", "if args.keep_space and not self.fit_sentences:", "if False:", "sentence_encoder",
     "sentences_to_fit_on"),
    ("support/checkpoint.py", 'if field.name == "pad_token_id":', "if False:", "checkpoint", ""),
    ("support/checkpoint.py", 'settings.get("tokenize_chinese_chars", True), special)',
     'settings.get("tokenize_chinese_chars", True))', "checkpoint", "other_special"),
    ("support/checkpoint.py", 'tokenizer.encode("\\U0002a6a5")', "pass", "checkpoint", "unknown_words"),
    ("support/corpus.py", ', shape=meta[side])', ")", "data", "cut_short"),
    ("support/squad.py", '"".join(texts).encode()', '"".join(texts)', "squad", "bad_files"),
    ("support/squad.py", "ArithmeticError, ", "", "squad", "bad_files"),
    ("finetune.py", "if not all(np.isfinite(each).all() for each in logits):", "if False:", "finetune", "not_finite"),
    ("finetune.py", "job.folder(args.output).parent.mkdir(parents=True, exist_ok=True)", "pass", "finetune",
     "before_training"),
    ("experiments/presets.py", "min(RATES, key", "max(RATES, key", "experiments", "lowest_kl"),
    ("experiments/presets.py", "lines[-(len(lines) // 5) :]", "lines", "experiments", "lowest_kl"),
    ("support/checkpoint.py", '(folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")',
     'tokenizer.save(str(folder / "tokenizer.json"))', "checkpoint", "full_disk"),
    ("experiments/experiment.py", "tokenizer, TEXT, math.inf)", "tokenizer, TEXT, 10**9)", "experiments", "origin"),
    # support/fast.py
    ("support/fast.py", "output.to(torch.get_autocast_dtype(device)) if", "output if", "fast", "layer_norm_rounds"),
    ("support/fast.py", "zip(student, teacher, strict=True)) / len(teacher))", "zip(student, teacher, strict=True)))", "fast",
     "compiled_losses"),
    ("support/fast.py", "allow_unspec_int_on_nn_module=True", "allow_unspec_int_on_nn_module=False", "fast", "nine_widths"),
    ("support/fast.py", ", optimize_ddp=False", "", "fast", "several_processes"),
    ("support/fast.py", "patch(use_duck_shape=False)", "patch(use_duck_shape=True)", "fast", "nine_widths"),
    ("support/fast.py", "fullgraph=True, backend", "backend", "fast", "in_silence"),
    ("support/fast.py", "            undo.close()\n", "", "fast", "compiling_fails"),
    ("support/batches.py", "mask & (columns >=", "mask & (columns >", "finetune", "batches"),
    ("support/squad.py", "null[key] > score", "null[key] < score", "squad", "best_valid or lowest_null"),
    ("support/squad.py", "MAX_ANSWER_TOKENS - 1)", "MAX_ANSWER_TOKENS)", "squad", "best_valid"),
    ("experiments/experiment.py", ', "precision": "fp32"}', "}", "experiments", "tells_its_origin"),
    ("finetune.py", "with distributed.autocast(device, job.bf16):\n            logits.extend",
     "with distributed.autocast(device, False):\n            logits.extend", "finetune", "precision_of_the_job"),
    ("finetune.py", "if saved.get(name) != new[name]]:", "if False]:", "finetune", "finished_results"),
]


def outcome(number: int) -> tuple[int, str, float]:
    """The number of a mutant, what became of it ("killed", "survived", or why it could not be tried), and seconds."""
    file, old, new, test, expression = MUTANTS[number]
    copy, start = Path(f"copy-{os.getpid()}"), time.time()  # each worker has one
    if not copy.exists():
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__", "figures"))
    source = (copy / file).read_text()
    if source.count(old) != 1:
        return number, f"the line stands there {source.count(old)} times", 0.0
    (copy / file).write_text(source.replace(old, new))
    code = run_test(copy, test, expression)
    (copy / file).write_text(source)
    return number, {0: "survived", 1: "killed"}.get(code, f"pytest ended with code {code}"), time.time() - start


def run_test(copy: Path, test: str, expression: str) -> int:
    """The exit code of pytest, 0 if all passed, 1 if one failed, in a forked process that has the libraries imported
    already."""
    child = os.fork()
    if not child:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.chdir(copy)
        sys.path[:0] = [str(copy.absolute()), str(copy.absolute() / "tests")]
        import pytest

        folder = "tests/reliability" if Path(f"tests/reliability/test_{test}.py").exists() else "tests"
        os._exit(pytest.main(["-q", "-x", "--numprocesses=0", "-p", "no:cacheprovider", "--assert=plain",
                              "--reliability", f"{folder}/test_{test}.py", "-k", expression]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> int:
    import hypothesis  # noqa: F401 (imported before the forks, as the libraries below)
    import pytest  # noqa: F401
    import scipy.stats  # noqa: F401
    import transformers.models.bert.modeling_bert  # noqa: F401

    chosen = [int(word) for word in sys.argv[1:]] or range(len(MUTANTS))
    killed = 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        with multiprocessing.get_context("fork").Pool() as pool:
            for number, text, seconds in pool.imap_unordered(outcome, chosen):
                killed += text == "killed"
                print(f"{number:>3}  {text:<9} {seconds:4.0f} s  {MUTANTS[number][0]}: "
                      f"{MUTANTS[number][2].strip()[:80]!r}", flush=True)
    print(f"{killed} of {len(chosen)} killed")
    return int(killed < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
