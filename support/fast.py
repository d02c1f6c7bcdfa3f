"""Faster training steps for long runs on a GPU. The textbook forms stay in model.py and distill.py. `with
compiled(...)`, which Session puts around the loop if it is `worth_compiling`, compiles them and reduces memory traffic.

Memory traffic bounds a step on a GPU. For the paper's settings on one H100 benchmarks/traffic.py predicts 5.4 hours
instead of 8.6; nothing was measured on a GPU. Evaluations and the fits of --compensate, which put hooks into the
layers, are not compiled; evaluations use bf16 between layers, too. TORCH_COMPILE_DISABLE=1 switches everything off.
"""

import contextlib
import os
import shlex
import sys

import torch
from torch import nn

from model import Layer, LayerNorm
from support.distributed import WORLD
from support.errors import InputError, one_line

COMPILE_FROM = 1e17  # parameters x tokens on each GPU: BERT-base on 0.9 G tokens, a sixteenth of the paper's


def worth_compiling(session) -> bool:
    """Whether the run is on a GPU and so long that minutes of compilation are little. Compiled kernels are tuned in
    every process, so they are not reproducible bit for bit, as --deterministic demands."""
    args = session.args
    work = session.teacher.parameter_count() * args.steps * args.batch_size * args.seq_length
    return (session.device.type == "cuda" and work >= COMPILE_FROM * WORLD and not args.deterministic
            and os.environ.get("TORCH_COMPILE_DISABLE") != "1")


def in_autocast_dtype(module: nn.Module, inputs, output):
    """Forward hook of a LayerNorm, which autocast on CUDA computes and returns in float32. Statistics stay float32; the
    output becomes bf16, and with it everything between two layers."""
    device = output.device.type
    return output.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else output


def student_layer(layer: Layer, *inputs):
    return Layer.forward(layer, *inputs)  # a function of its own: torch keeps compilations by function


def switch_on(undo: contextlib.ExitStack, student, teacher, losses, backend: str):
    """Replace the layers of both models, and the losses in the module `losses`, until `undo` is closed."""
    import torch._dynamo  # here, because it takes a second, which short runs need not wait for
    import torch.fx.experimental._config

    def compile_(function, dynamic: bool | None = True):
        return torch.compile(function, dynamic=dynamic, fullgraph=True, backend=backend)  # raises; never eager instead

    def replace(owner, name: str, new):
        undo.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, new)

    # The sizes of parameters and the number of heads are variables, so that one compilation serves all layers and
    # widths. use_duck_shape=False: sizes that are equal at first, like H*K and D, may differ after a prune.
    # optimize_ddp=False: torch would split layers where DDP's buckets end, and compile the parts for one size.
    undo.enter_context(torch._dynamo.config.patch(
        force_parameter_static_shapes=False, force_nn_module_property_static_shapes=False,
        allow_unspec_int_on_nn_module=True, specialize_float=True, optimize_ddp=False))
    undo.enter_context(torch.fx.experimental._config.patch(use_duck_shape=False))
    for bert, forward in ((student, compile_(student_layer)), (teacher, compile_(Layer.forward, dynamic=None))):
        for layer in bert.bert.layers:  # dynamic=None: constants, but for a batch size that changes
            def training_or_plain(*inputs, layer=layer, forward=forward):
                return forward(layer, *inputs) if student.training else Layer.forward(layer, *inputs)

            replace(layer, "forward", training_or_plain)
        for module in bert.modules():
            if isinstance(module, LayerNorm):
                undo.callback(module.register_forward_hook(in_autocast_dtype).remove)

    mse = compile_(losses.mean_mse)  # of one pair of flat tensors at a time, so that one compilation serves all
    replace(losses, "mean_mse", lambda student, teacher: sum(
        mse([s.flatten()], [t.flatten()]) for s, t in zip(student, teacher, strict=True)) / len(teacher))
    replace(losses, "vocabulary_losses", compile_(losses.vocabulary_losses))


@contextlib.contextmanager
def compiled(session, state, backend: str = "inductor"):
    """Training steps run compiled while this is entered. The first micro-batch is computed once as a trial; if that
    fails, for example without a C compiler, one line says so and all steps run eagerly. If a later compilation fails,
    the run is saved, and InputError says how to resume it."""
    session.progress.write("compiling the training step, which takes minutes; TORCH_COMPILE_DISABLE=1 switches it off")
    batch, fraction, _ = next(session.micro_batches(state))
    loop = sys.modules[type(state.distiller).__module__]  # distill.py, which is __main__ when it is run
    with contextlib.ExitStack() as undo:
        try:
            switch_on(undo, state.distiller.student, session.teacher, loop, backend)
            loop.losses_and_gradients(session, state, batch, fraction, is_last=False, ranking=False)
        except Exception as error:  # torch raises another type for every cause: no compiler, no Triton, an old GPU
            undo.close()
            session.progress.write(f"torch.compile failed, so steps run eagerly: {one_line(error)}")
        state.optimizer.zero_grad()
        failures = torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit
        try:
            yield
        except failures as error:  # in part 1 of a step, which has changed nothing yet
            session.save(state)
            raise InputError(f"a compilation failed after step {state.step}, which is saved; to resume: "
                             f"TORCH_COMPILE_DISABLE=1 python distill.py --resume --output "
                             f"{shlex.quote(str(session.args.output))} ({one_line(error)})") from None
