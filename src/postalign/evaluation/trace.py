"""Token by token: what an alignment changed in a reply, from what to what.

A trace takes the reply that decoding gives and reads the model along it: as it is (`base`), with the edits that are in
it (`steered`), its guide, and what they come to (`mixed`, which decoding draws from). Knows decoding's distributions;
judges nothing and prints nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..files import write_whole

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..alignment import Alignment
    from ..decoding import Forced

NEAR = 1e-4  # nats: two passes over the same text may differ by this much, so such a lead decides nothing


@dataclass(frozen=True)
class Candidate:
    """One token of the vocabulary at one place: its probability under each view, 0 to 1 (None: no such view)."""

    id: int
    text: str
    base: float
    steered: float
    guide: float | None
    mixed: float


@dataclass(frozen=True)
class Step:
    """One token of the reply.

    token: the one that was said, log_prob: its natural logarithm under the mixed distribution. base_token: what the
    base model would have said here, after the same words. changed: whether that is another one. guided: whether the
    guide was mixed in. divergence: KL(base || mixed) in nats. top: likeliest tokens of all views; promoted and
    suppressed: those that gained and lost most probability against base.
    """

    token: Candidate
    log_prob: float
    base_token: Candidate
    changed: bool
    guided: bool
    divergence: float
    top: list[Candidate]
    promoted: list[Candidate]
    suppressed: list[Candidate]


@dataclass(frozen=True)
class Trace:
    """A reply and what stands behind each of its tokens.

    gate: the strength that the prompt's row was given, gate_score and gate_threshold: of a gate (None without one).
    lam: lambda of the guidance (None without one). first_changed: index of the first token that base would not have
    said (None: all are base's own). finish: `stop`, `length` or `given`.
    """

    model: str
    method: str | None
    prompt: str | list[dict[str, str]]
    reply: str
    finish: str
    gate: float
    gate_score: float | None
    gate_threshold: float | None
    lam: float | None
    first_changed: int | None
    steps: list[Step]

    def to_dict(self) -> dict[str, Any]:
        """The whole trace as JSON types."""
        return asdict(self)


def trace(
    model: nn.Module,
    tokenizer: Any,
    prompt: str | list[dict[str, str]],
    alignment: Alignment | None = None,
    *,
    reply: str | Sequence[int] | None = None,
    system: str | None = None,
    max_new_tokens: int = 64,
    top: int = 5,
) -> Trace:
    """Trace the greedy reply to `prompt`, or a given `reply` (text or token ids).

    prompt: text or chat messages, put into the model's template. top: how many tokens each list holds. The reply is
    generated, then read once for each of base, steered and guide. Raises UsageError for an empty reply.
    """
    from ..decoding import forced_reply, generate_replies
    from ..models.chat import to_messages, token_ids

    if top < 1:
        raise UsageError(f"a list of {top} tokens shows nothing: choose 1 or more.")
    messages = to_messages(prompt, system)
    finish = "given"
    if reply is None:
        settings: dict[str, Any] = {"alignment": alignment, "max_new_tokens": max_new_tokens}
        said = generate_replies(model, tokenizer, [messages], **settings)[0]
        reply, finish = said.token_ids, said.finish
    elif alignment is not None:
        alignment.check(model, tokenizer)
    ids = token_ids(tokenizer, reply, beginning=False) if isinstance(reply, str) else list(reply)
    if not ids:
        raise UsageError("there is no reply to trace: ask for 1 token or more.")
    base = forced_reply(model, tokenizer, messages, ids)
    aligned = forced_reply(model, tokenizer, messages, ids, alignment) if alignment is not None else base
    steps = list(_steps(tokenizer, base.own, aligned, top))
    gate = alignment.gate if alignment is not None else None
    return Trace(
        model=str(getattr(model, "postalign_name", "") or getattr(model.config, "_name_or_path", "") or ""),
        method=alignment.method if alignment is not None else None,
        prompt=prompt if system is None else messages,
        reply=tokenizer.decode(ids, skip_special_tokens=True),
        finish=finish,
        gate=aligned.strength,
        gate_score=aligned.score,
        gate_threshold=gate.threshold if gate is not None else None,
        lam=alignment.guidance.lam if alignment is not None and alignment.guidance is not None else None,
        first_changed=next((i for i, step in enumerate(steps) if step.changed), None),
        steps=steps,
    )


def _steps(tokenizer: Any, base: Tensor, aligned: Forced, top: int) -> Iterator[Step]:
    width = min(base.shape[-1], aligned.mixed.shape[-1])  # a guide may lack the padding of the embedding
    top = min(top, width)
    for place, token in enumerate(aligned.ids.tolist()):
        rows = base, aligned.own, aligned.guide, aligned.mixed
        views = [None if view is None else view[place, :width].double().cpu() for view in rows]
        before, mixed = views[0], views[-1]
        assert before is not None and mixed is not None
        there = before.exp()
        change = mixed.exp() - there
        likely = dict.fromkeys(i for v in reversed(views) if v is not None for i in v.topk(top).indices.tolist())
        first = int(before.argmax())
        own = token if float(before[first] - before[token]) <= NEAR else first
        terms = (there * (before - mixed)).masked_fill(there == 0, 0.0)

        def named(ids: Iterable[int], views: list[Tensor | None] = views) -> list[Candidate]:
            return [_candidate(tokenizer, i, views) for i in ids]

        yield Step(
            token=named([token])[0],
            log_prob=float(mixed[token]),
            base_token=named([own])[0],
            changed=own != token,
            guided=place < aligned.guided,
            divergence=max(0.0, float(terms.sum())),
            top=named(sorted(likely, key=mixed.tolist().__getitem__, reverse=True)),
            promoted=named(i for i in change.topk(top).indices.tolist() if change[i] > 0),
            suppressed=named(i for i in (-change).topk(top).indices.tolist() if change[i] < 0),
        )


def _candidate(tokenizer: Any, i: int, views: list[Tensor | None]) -> Candidate:
    base, steered, guide, mixed = (None if view is None else float(view[i].exp()) for view in views)
    assert base is not None and steered is not None and mixed is not None
    return Candidate(i, token_text(tokenizer, i), base, steered, guide, mixed)


def token_text(tokenizer: Any, i: int) -> str:
    """The text of one token with its leading space, which decoding it alone may drop."""
    text = tokenizer.decode([i])
    piece = tokenizer.convert_ids_to_tokens(i)
    spaced = isinstance(piece, str) and piece[:1] in ("\u0120", "\u2581") and not text.startswith(" ")
    return f" {text}" if spaced else text


def write_trace(trace: Trace, path: str | Path, *, title: str = "What the guard changed") -> Path:
    """Write `trace` as one HTML file that needs no network; the reply is folded away. Returns the path."""
    import jinja2

    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    strict: dict[str, Any] = {"autoescape": True, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(loader=folder, trim_blocks=True, lstrip_blocks=True, **strict)
    environment.filters |= {"percent": percent, "visible": visible}
    write_whole(path, environment.get_template("trace.html.j2").render(trace=trace, title=title))
    return Path(path)


def percent(probability: float | None) -> str:
    """`0.1234` as `12.3`, what is too small to see as `<0.1`, and nothing as a dash."""
    if probability is None:
        return "\u2013"
    return "<0.1" if 0 < probability < 0.0005 else f"{100 * probability:.1f}"


def visible(text: str) -> str:
    """A token's text on one line: line breaks and tabs as signs, and a sign for a token without text."""
    return text.replace("\n", "\u21b5").replace("\t", "\u21e5").replace("\r", "\u240d") or "\u2205"
