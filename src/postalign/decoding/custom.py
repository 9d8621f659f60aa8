"""The engine behind transformers' own `generate(custom_generate=...)`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation import GenerateDecoderOnlyOutput, LogitsProcessorList, StoppingCriteriaList

from ..alignment import Alignment
from ..edits import CheckpointGuide, PromptGuide
from ..errors import UsageError
from ..models.chat import Batch, check_length
from .fixed import decode
from .sampling import Sampler

OUTPUTS = ("scores", "logits", "attentions", "hidden_states")


def custom_generate(alignment: Alignment) -> Callable[..., Any]:
    """A callable for `model.generate(**inputs, custom_generate=...)`: greedy or sampled, processors, stops, streamer.

    Raises UsageError for beams, for a filled cache, for embeddings in place of ids, for outputs other than sequences,
    and for a guide that needs the chat or another tokenizer.
    """

    def run(
        model: nn.Module,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        cache = model_kwargs.get("past_key_values")
        if (generation_config.num_beams or 1) > 1:
            raise UsageError("an alignment decodes greedily or by sampling: set num_beams=1.")
        if cache is not None and cache.get_seq_length() > 0:
            raise UsageError("an alignment reads the whole prompt: call generate without past_key_values.")
        if input_ids.shape[1] == 0:
            raise UsageError("an alignment reads token ids: call generate with input_ids.")
        extra = [f"output_{name}" for name in OUTPUTS if getattr(generation_config, f"output_{name}", False)]
        if extra:
            raise UsageError(f"an alignment's generate returns the sequences only: leave {extra[0]} out.")
        streamer = streamer if streamer is not None else _streamer_of_generate()
        guide = None
        if alignment.guidance is not None:
            kind = alignment.guidance.guide
            if isinstance(kind, PromptGuide):
                raise UsageError(
                    "a prompt guide needs the chat, not token ids: use pa.generate(model, tokenizer, ...)."
                )
            if isinstance(kind, CheckpointGuide):
                if kind.model is None:
                    raise UsageError(
                        "load the guide's checkpoint first with one call of pa.generate(model, tokenizer, ...)."
                    )
                guide = kind.model
        alignment.check(model)
        mask = model_kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        batch = Batch(input_ids, mask, mask.sum(-1).tolist())
        max_new_tokens = generation_config.max_length - input_ids.shape[1]
        check_length(model, batch, max_new_tokens)
        ends = generation_config.eos_token_id
        eos: set[int] = {ends} if isinstance(ends, int) else set(ends or ())
        pad = generation_config.pad_token_id
        pad = pad if isinstance(pad, int) else min(eos, default=0)
        processors = LogitsProcessorList(logits_processor)
        seed = int(torch.randint(0, 2**31 - 1, (1,)).item()) if generation_config.do_sample else 0
        sampler = Sampler(bool(generation_config.do_sample), 1.0, 1.0, 0, seed).for_rows(range(len(input_ids)))

        def show(rows: Tensor, tokens: Tensor) -> None:
            shown = torch.full((len(input_ids),), pad)
            shown[rows.cpu()] = tokens.cpu()
            streamer.put(shown)

        def stopping(sequences: Tensor, rows: Tensor) -> Tensor:
            return stopping_criteria(sequences, None).to(sequences.device)  # type: ignore[arg-type]

        replies, _ = decode(
            model,
            batch,
            alignment=alignment,
            guide=guide,
            max_new_tokens=max_new_tokens,
            eos=eos,
            pad=pad,
            sampler=sampler,
            stopping=stopping,
            processors=processors,
            on_tokens=show if streamer is not None else None,
            compact=False,
        )
        if streamer is not None:
            streamer.end()
        longest = max(len(reply) for reply in replies)
        padded = [reply + [pad] * (longest - len(reply)) for reply in replies]
        sequences = torch.cat([input_ids, torch.tensor(padded, dtype=torch.long, device=input_ids.device)], dim=1)
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]
        return sequences

    return run


def _streamer_of_generate() -> Any:
    """The `streamer=` that was given to the `generate` which called us.

    transformers (5.23 still) shows it the prompt and then keeps it from a callable `custom_generate`; without this the
    user's streamer would silently stay empty.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "generate" and frame.f_globals.get("__name__") == "transformers.generation.utils":
            return frame.f_locals.get("streamer")
        frame = frame.f_back
    return None
