"""Descent and ascent on a model's weights, whose outcome is the difference to what they were.

Gradient ascent and descent on one set of pairs are equations 1 and 2 of SafePatching (arXiv 2405.13820); NPO is arXiv
2404.05868. Knows which losses there are and ties the parts together; the loop, what is trained, the processes and the
files are each in a file of their own beside this one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..edits import SparsePatch
from ..errors import PostalignError, UsageError
from ..models.chat import Messages
from ..models.shards import own_parameters
from ..models.vocabulary import template_hash, tokenizer_hash
from .batches import Example, LossOn, labelled_batch
from .loop import History, Term, descend, diverged, make_optimiser
from .losses import beside, label_counts, npo, row_divergences, row_losses
from .processes import Processes, together
from .resume import Folder
from .settings import TrainSettings
from .trainees import Trainee, confine, low_precision, trained_names, trainee

OnStep = Callable[[int, int, float, float], None]


def train_delta(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[Example],
    settings: TrainSettings,
    *,
    workdir: str | Path,
    benign: Sequence[Example | str | Messages] = (),
    wanted: Sequence[Example] = (),
    at: SparsePatch | None = None,
    on_step: OnStep | None = None,
) -> Path:
    """Train on (prompt, answer) pairs; returns `workdir/delta`, safetensors of trained - base for trained weights.

    The names are the model's own (of tied weights the one that transformers saves), the numbers float32 or
    `settings.delta_dtype`. `model` itself is left as it was, to the bit. Nothing is random but the order of the
    pairs, which the seed decides: dropout is off.

    benign: prompts, or pairs, on which `settings.kl_weight` holds the model to what it said before: on the answers if
    all have one (and on the prompts too, by `settings.prompt_weight`), else on all tokens. wanted: pairs that are
    made likelier meanwhile, whatever the direction, weighted by `settings.wanted_weight`. at: train on from this patch
    of the model, and only the weights that it changes; the differences are to the model without it. on_step(step,
    steps, loss, answer_loss): after each step, in the main process; loss is what is minimised, answer_loss the pairs'
    loss before the step.

    An interrupted training goes on from the state kept every `settings.save_every` steps and ends at the same bits; a
    finished one is not done again, unless anything that it depends on has changed. Where `accelerate launch` started
    several processes, all call this with equal arguments and share each batch; folders must be the same for all.
    Raises UsageError for no pairs or unknown modules, PostalignError for weights that cannot be trained and for a loss
    that is not finite.
    """
    if not pairs:
        raise UsageError("there are no pairs to train on: give prompts with answers.")
    if settings.kl_weight and not benign:
        raise UsageError("kl_weight needs benign prompts: give some, or leave it at 0.")
    names = trained_names(model, settings)
    if at is not None:
        names = _within(at, names, settings)
    held: list[Example] = [row if isinstance(row, tuple) else (row, "") for row in benign]
    folder = Folder(workdir, _key(model, tokenizer, settings, names, at, pairs, held, wanted))
    done = folder.finished()
    if done is not None:
        return done
    home = next(model.parameters()).device
    low = low_precision(model, names, settings)
    with together(home) as processes, trainee(model, names, settings, processes) as subject:
        if at is not None:
            if processes.sharded:
                raise PostalignError("single weights cannot be trained in shards: train without FSDP.")
            confine(own_parameters(subject.module), at)
        start = [p for p in subject.module.parameters() if p.requires_grad]
        fused = processes.device.type in ("cpu", "cuda") and not processes.sharded
        optimiser = make_optimiser(
            settings.optimiser, start, settings.learning_rate, settings.weight_decay, fused=fused
        )
        run, optimiser = processes.prepare(subject.module, optimiser)
        bare = processes.bare(run)
        parameters = {name: p for name, p in own_parameters(bare).items() if p.requires_grad}
        history = folder.begin(parameters, optimiser, processes)

        def tell(history: History) -> None:
            if settings.save_every and history.step % settings.save_every == 0 and history.step < settings.steps:
                folder.save(history, parameters, optimiser, processes)
            if on_step is not None and processes.main:
                on_step(history.step, settings.steps, history.losses[-1], history.answer_losses[-1])

        limit = settings.max_loss_rise if settings.direction != "descent" else None
        history = descend(
            run,
            list(parameters.values()),
            optimiser,
            _terms(model, tokenizer, settings, subject, run, processes, low, pairs, held, wanted),
            processes,
            steps=settings.steps,
            batch_size=settings.batch_size,
            micro_batch=settings.micro_batch,
            learning_rate=settings.learning_rate,
            warmup=int(settings.steps * settings.warmup),
            schedule=settings.schedule,
            max_grad_norm=settings.max_grad_norm,
            limit=math.inf if limit is None else limit,
            history=history,
            on_step=tell,
            before_pass=subject.before_pass,
        )
        base, dtype = own_parameters(model), getattr(torch, settings.delta_dtype)
        plan = {name: (tuple(base[name].shape), dtype) for name in names}
        deltas = ((name, _finite(delta).to(dtype)) for name, delta in subject.deltas(bare))
        return folder.finish(plan, deltas, history, settings.model_dump(), processes)


def _terms(
    model: nn.Module,
    tokenizer: Any,
    settings: TrainSettings,
    subject: Trainee,
    run: nn.Module,
    processes: Processes,
    low: bool,
    pairs: Sequence[Example],
    held: Sequence[Example],
    wanted: Sequence[Example],
) -> list[Term]:
    """What is minimised: the direction's loss of the pairs, and what the settings add to it."""

    def collate(loss_on: LossOn) -> Callable[[Sequence[Example]], dict[str, Tensor]]:
        return lambda part: labelled_batch(tokenizer, part, processes.device, loss_on)

    def passes() -> Any:
        return torch.autocast(processes.device.type, torch.bfloat16, enabled=low)

    def losses(inputs: dict[str, Tensor]) -> Tensor:
        with passes():
            return row_losses(subject.model, inputs, run, settings.head_tokens, settings.rest_weight)

    def direction(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        if settings.direction != "npo":
            found = losses(inputs)
            return (-found if settings.direction == "ascent" else found), found
        with torch.no_grad(), passes(), subject.without():
            reference = row_losses(model, beside(model, inputs)).to(processes.device)
        found = losses(inputs)
        return npo(found, reference, label_counts(inputs), settings.npo_beta), found

    def likelier(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        found = losses(inputs)
        return found, found

    def nearness(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        with passes():
            found = row_divergences(
                subject.model,
                inputs,
                model,
                run,
                subject.without,
                settings.head_tokens,
                settings.prompt_weight,
            )
        return found, found

    terms = [Term(pairs, collate(settings.loss_on), direction, seed=settings.seed)]
    if wanted and settings.wanted_weight:
        more = settings.wanted_weight, settings.seed + 1, settings.beside
        terms.append(Term(wanted, collate("answer"), likelier, *more))
    if settings.kl_weight:
        on: LossOn = "answer" if all(answer for _, answer in held) else "all"
        terms.append(Term(held, collate(on), nearness, settings.kl_weight, settings.seed + 2, settings.beside))
    return terms


def _within(at: SparsePatch, names: list[str], settings: TrainSettings) -> list[str]:
    """Those of the names that the patch changes."""
    if settings.train != "full" or settings.weight_decay:
        raise UsageError("the weights of a patch alone are trained as full weights without decay: leave both out.")
    found = [name for name in names if name in at.shapes]
    if not found:
        raise UsageError("the patch changes no weight that is to be trained: there is nothing to train.")
    return found


def _finite(delta: Tensor) -> Tensor:
    if not bool(delta.isfinite().all()):
        raise diverged()
    return delta


def _key(
    model: nn.Module,
    tokenizer: Any,
    settings: TrainSettings,
    names: Sequence[str],
    at: SparsePatch | None,
    *examples: Sequence[Example],
) -> str:
    """sha256 of all that the outcome depends on: settings, data, tokenizer and every weight's bytes."""
    about = [
        "1",
        settings.model_dump(exclude={"save_every"}),
        list(names),
        [list(map(list, part)) for part in examples],
        tokenizer_hash(tokenizer),
        template_hash(tokenizer),
    ]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in names if at is not None else ():
        assert at is not None
        for part in at.entries[name]:
            digest.update(part.contiguous().view(torch.uint8).numpy().data)
    for name, parameter in own_parameters(model).items():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if not parameter.is_meta:
            raw = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(raw.numpy().data)
    return digest.hexdigest()
