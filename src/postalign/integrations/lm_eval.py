"""lm-eval with an aligned model: perplexities, multiple choice and generation as decoding under an alignment has them.

    python -m postalign.integrations.lm_eval --model postalign \
        --model_args pretrained=smollm2,alignment=DIR --tasks mmlu,truthfulqa,gsm8k,arc_challenge --apply_chat_template

takes every argument of `lm_eval`. lm-eval looks for models in its registry and reads no entry points (0.4.13), so
whoever calls it in another way imports this module first. Knows lm-eval's requests and postalign's decoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..alignment import Alignment
from ..decoding.engine import Engine, Request
from ..decoding.forced import forced
from ..decoding.guides import guide_inputs, guide_model
from ..decoding.memory import fitting_rows
from ..decoding.sampling import Sampler
from ..edits import CheckpointGuide, PromptGuide
from ..errors import PostalignError, UsageError
from ..models.chat import encode, eos_ids, token_ids
from ..models.load import load_model
from ..models.templates import Messages, fill_template, render
from ..models.vocabulary import template_hash, tokenizer_hash

try:
    from lm_eval.api.model import TemplateLM  # type: ignore[import-not-found]
    from lm_eval.api.registry import register_model  # type: ignore[import-not-found]
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # type: ignore[import-not-found]
    from tqdm import tqdm
except ImportError as error:
    raise PostalignError("this needs lm-eval: pip install 'postalign[lm-eval]'.") from error

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
Scored = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, ids of the context, ids of what follows


class AlignedLM(TemplateLM):
    """A model under an alignment, as lm-eval asks it.

    pretrained: what `postalign.load_model` takes, or a loaded model with its `tokenizer`. alignment: a folder, an
    Alignment or None. batch_size: rows at a time, or `auto` for what memory seems to allow; changes no score.
    max_length: the longest text in tokens (default: the model's context); longer contexts lose their beginning.

    A context is the prompt: the gate reads its last token, and what is scored or generated follows it. With
    --apply_chat_template that is the place where it was fitted to be read, and a prompt guide has its own view of the
    chat; without, a raw context is one that no gate was fitted on.
    """

    def __init__(
        self,
        pretrained: Any = "smollm2",
        alignment: str | Alignment | None = None,
        *,
        tokenizer: Any = None,
        dtype: str | None = None,
        device: str | None = None,
        device_map: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
    ) -> None:
        super().__init__()
        if isinstance(pretrained, str):
            settings: dict[str, Any] = {"device_map": device_map, "revision": revision}
            pretrained, tokenizer = load_model(pretrained, dtype=dtype, trust_remote_code=trust_remote_code, **settings)
            if device and device_map is None and (not device.startswith("cuda") or torch.cuda.is_available()):
                pretrained = pretrained.to(device)
        if tokenizer is None:
            raise UsageError("a loaded model needs its tokenizer: pass tokenizer=... too.")
        self.model, self.tokenizer = pretrained, tokenizer
        self.alignment = Alignment.from_pretrained(alignment) if isinstance(alignment, str) else alignment
        self.guide = self.prompt_guide = None
        if self.alignment is not None:
            self.alignment.check(self.model, tokenizer)
            kind = self.alignment.guidance.guide if self.alignment.guidance else None
            self.guide = guide_model(kind, tokenizer, self.model) if isinstance(kind, CheckpointGuide) else None
            self.prompt_guide = kind if isinstance(kind, PromptGuide) else None
        self._device = next(self.model.parameters()).device
        self.batch_size, self.most_rows = batch_size or 1, int(max_batch_size or 0)
        self.max_gen_toks = int(max_gen_toks)
        config = self.model.config.get_text_config()
        self.max_length = int(max_length or getattr(config, "max_position_embeddings", None) or 2048)
        self.ends = eos_ids(self.model, tokenizer)
        self.chats: dict[str, tuple[Messages, str]] = {}  # rendered -> (messages, the reply's given beginning)

    # texts and tokens

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else min(self.ends)

    @property
    def prefix_token_id(self) -> int:
        return self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return f"{tokenizer_hash(self.tokenizer)[:16]}-{template_hash(self.tokenizer)[:16]}"

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval keeps beside its results."""
        made = self.alignment
        fitted = (
            {"alignment": made.method, "alignment_base": made.base, "alignment_config": made.config} if made else {}
        )
        return {"model_dtype": str(self.model.dtype), "model_num_parameters": self.model.num_parameters(), **fitted}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return token_ids(self.tokenizer, string, beginning=add_special_tokens is not False)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat up to where the reply starts, or goes on after the last message where that is the assistant's."""
        given = ""
        if add_generation_prompt:
            text = fill_template(self.tokenizer, chat_history)
        else:
            chat_history, given = chat_history[:-1], chat_history[-1]["content"]
            text = render(self.tokenizer, chat_history, answer=given, finished=False)
        self.chats[text] = chat_history, given
        return text

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.tokenizer.chat_template if chat_template else None

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """lm-eval gives a context's last white space to what follows; a chat's belongs to the template."""
        if context not in self.chats:
            return super()._encode_pair(context, continuation)
        head, whole = self.tok_encode(context), self.tok_encode(context + continuation)
        fits = whole[: len(head)] == head
        return head, whole[len(head) :] if fits else self.tok_encode(continuation, add_special_tokens=False)

    def _view(self, context: str | None, ids: list[int]) -> list[int]:
        """A context as the guide reads it."""
        if self.prompt_guide is None or context not in self.chats:
            return ids
        messages, given = self.chats[context]
        batch = guide_inputs(self.prompt_guide, self.tokenizer, [messages], self._device)  # type: ignore[arg-type]
        opened = encode(self.tokenizer, [messages]).prompt_lengths[0]
        return batch.input_ids[0].tolist() + (ids[opened:] if given else [])

    def _rows(self, columns: int) -> int:
        if self.batch_size != "auto":
            return max(1, int(self.batch_size))
        guided = self.alignment is not None and self.alignment.guidance is not None
        return min(fitting_rows(self.model, columns, guided=guided), self.most_rows or 10**9)

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices of a list, the longest first and like lengths together."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        while order:
            rows = self._rows(lengths[order[0]])
            yield order[:rows]
            order = order[rows:]

    # scores

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability of what follows, whether greedy decoding would say it) for each request.

        Requests that share their context and all but the last token share a row of a pass.
        """
        rows: dict[tuple[tuple[int, ...], ...], list[int]] = {}
        for i, (texts, context, ids) in enumerate(requests):
            view = self._view(texts[0] if texts else None, context)
            head = context[-max(1, self.max_length - len(ids)) :]
            theirs = view[-max(1, self.max_length - len(ids)) :]
            rows.setdefault((tuple(head), tuple(theirs), tuple(ids[:-1])), []).append(i)
        keys = list(rows)
        answers: dict[int, tuple[float, bool]] = {}
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests")
        for batch in self._batches([max(len(h), len(v)) + len(t) + 1 for h, v, t in keys]):
            tails = [requests[rows[keys[i]][0]][2] for i in batch]
            found = forced(
                self.model,
                [self._tensor(keys[i][0]) for i in batch],
                [self._tensor(tail) for tail in tails],
                self.alignment,
                guide=self.guide,
                guide_heads=[self._tensor(keys[i][1]) for i in batch],
            )
            for i, one in zip(batch, found, strict=True):
                best = one.mixed.argmax(-1).tolist()
                for number in rows[keys[i]]:
                    ids = requests[number][2]
                    score = float(one.mixed.gather(1, self._tensor(ids).unsqueeze(1)).sum())
                    answers[number] = score, best == ids
                    texts = requests[number][0]
                    if texts is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, answers[number])
                    bar.update(1)
        bar.close()
        return [answers[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, cut into windows; the one token before a window is its prompt."""
        pieces: list[Scored] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            for context, ids in map(make_disjoint_window, windows):
                pieces.append((None, list(context), list(ids)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (score, _) in zip(owners, self._loglikelihood_tokens(pieces, disable_tqdm), strict=True):
            totals[number] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # replies

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Replies up to the first of the texts in `until`. Greedy, unless the task says do_sample."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items(), key=str)), []).append(i)
        texts: dict[int, str] = {}
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests")
        for members in groups.values():
            contexts = [requests[i].args[0] for i in members]
            for i, text in zip(members, self._say(contexts, members, requests[members[0]].args[1], bar), strict=True):
                texts[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        bar.close()
        return [texts[i] for i in range(len(requests))]

    def _say(self, contexts: list[str], numbers: list[int], asked: dict[str, Any], bar: Any) -> list[str]:
        """Replies to contexts with one set of generation_kwargs. numbers: which random stream each samples from."""
        until, length, sampling = self._settings(asked)
        room = max(1, self.max_length - length)
        size = None if self.batch_size == "auto" else int(self.batch_size)
        sampler = Sampler(**sampling, seed=0)
        with Engine(self.model, self.tokenizer, self.alignment, batch_size=size, sampler=sampler, stop=until) as engine:
            lined_up = []
            for context, number in zip(contexts, numbers, strict=True):
                ids = self.tok_encode(context)
                view = self._view(context, ids)[-room:] if self.prompt_guide is not None else None
                lined_up.append(Request(ids[-room:], view, length, engine.sampler.add(number)))
            engine.waiting.extend(sorted(lined_up, key=lambda request: -len(request.ids)))
            before = bar.n
            while engine.step():
                bar.update(before + sum(one.done for one in lined_up) - bar.n)
            bar.update(before + len(lined_up) - bar.n)
        texts = []
        for request in lined_up:
            ids = [i for i in request.token_ids if i not in self.ends]
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            cuts = [text.find(word) for word in until if word in text]
            texts.append(text[: min(cuts)] if cuts else text)
        return texts

    def _settings(self, asked: dict[str, Any]) -> tuple[list[str], int, dict[str, Any]]:
        left = dict(asked)
        until = left.pop("until", None) or []
        until = [word for word in ([until] if isinstance(until, str) else until) if word]
        lengths = [left.pop(name) for name in LENGTHS if left.get(name) is not None]
        sampling = {name: left.pop(name, default) for name, default in SAMPLING.items()}
        beams = left.pop("num_beams", 1)
        unknown = [*(name for name in left if name not in LENGTHS), *(["num_beams"] if beams != 1 else [])]
        if unknown:
            raise UsageError(
                f"generation_kwargs {unknown[0]!r} is not known here: use until, {LENGTHS[0]}, {', '.join(SAMPLING)}."
            )
        sampling["do_sample"] = bool(sampling["do_sample"]) and float(sampling["temperature"] or 0) > 0
        return until, int(lengths[0] if lengths else self.max_gen_toks), sampling

    def _tensor(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._device)


def main() -> None:
    """lm-eval's own command line, with the model `postalign` in its registry."""
    import_module("lm_eval.__main__").cli_evaluate()


if __name__ == "__main__":
    import_module("postalign.integrations.lm_eval").main()  # by its real name: one class is registered, not two
else:
    register_model("postalign")(AlignedLM)
