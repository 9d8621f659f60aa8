"""The text that a chat model reads: its own chat template, and where an answer sits in it.

Knows Jinja templates through transformers; knows no token ids. A tokenizer without a chat template gets the
plain form `Question: ...`, blank line, `Answer:`, with the system text above it, and its end-of-sequence
token ends an answer.
"""

from __future__ import annotations

from typing import Any

from jinja2.exceptions import TemplateError

from ..errors import UsageError

Messages = list[dict[str, str]]

MARK = "\ue000"  # of the private use area: stands for a text whose place in the template is to be found
PLAIN_NAMES = {"user": "Question: ", "assistant": "Answer: ", "system": ""}


def to_messages(prompt: str | Messages, system: str | None = None) -> Messages:
    """Chat messages of `prompt`, with `system` as the first; a system message already there is put below it.

    Raises UsageError for anything that is not a text or a list of `{"role": str, "content": str}`.
    """
    messages: Messages
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, (list, tuple)) and prompt and all(map(_is_message, prompt)):
        messages = [dict(message) for message in prompt]
    else:
        raise UsageError('a prompt is a text or a list of messages {"role": "user", "content": "..."}: correct it.')
    if system:
        if messages[0]["role"] == "system":
            system = f"{system}\n\n{messages.pop(0)['content']}"
        messages.insert(0, {"role": "system", "content": system})
    return messages


def render(
    tokenizer: Any,
    prompt: str | Messages,
    system: str | None = None,
    answer: str | None = None,
    *,
    finished: bool = True,
) -> str:
    """The text the model reads: the chat in its template up to where the reply starts, then the answer.

    A last message of the assistant with `"prefix": True` is the beginning of the reply: the text ends with it, open.
    finished: an answer is followed by the end of its turn; False leaves it open, to be continued.
    A template that refuses or drops the system message gets its text at the head of the first user message.
    Raises UsageError when the template refuses the chat.
    """
    messages = to_messages(prompt, system)
    begun = messages.pop()["content"] if len(messages) > 1 and messages[-1].get("prefix") else ""
    opened = fill_template(tokenizer, messages)
    if answer is None and not begun:
        return opened
    reply = begun + (answer or "")
    before, after = _around_answer(tokenizer, messages, opened)
    if before.isspace() and reply[:1].isspace():
        before = ""
    return opened + before + reply + (after if finished and answer is not None else "")


def end_of_turn(tokenizer: Any) -> str | None:
    """The special token after an answer in the chat template (`<|im_end|>`), None when there is none."""
    if tokenizer.chat_template is None:
        return None
    messages = to_messages("a")
    _, after = _around_answer(tokenizer, messages, fill_template(tokenizer, messages))
    after = after.lstrip()
    # the longest wins: one token's text may begin another's
    return max((token for token in _special_tokens(tokenizer) if after.startswith(token)), key=len, default=None)


def fill_template(tokenizer: Any, messages: Messages, *, open_reply: bool = True) -> str:
    """The chat in the tokenizer's template or the plain form; `open_reply`: up to where the reply starts."""
    if tokenizer.chat_template is None:
        return _plain(messages, open_reply)

    def fill(chat: Messages) -> str:
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=open_reply)

    try:
        if messages[0]["role"] != "system":
            return fill(messages)
        try:
            text = fill(messages)
        except TemplateError:
            return fill(_system_in_user(messages))
        return text if messages[0]["content"].strip() in text else fill(_system_in_user(messages))
    except (TemplateError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"the chat template refuses this chat ({reason}): change its roles or their order.") from error


def _plain(messages: Messages, open_reply: bool) -> str:
    turns = [PLAIN_NAMES.get(message["role"], "") + message["content"] for message in messages]
    return "\n\n".join([*turns, "Answer:"] if open_reply else turns)


def _system_in_user(messages: Messages) -> Messages:
    """The same chat without its system message, whose text heads the first user message."""
    system, rest = messages[0]["content"], [dict(message) for message in messages[1:]]
    for message in rest:
        if message["role"] == "user":
            message["content"] = f"{system}\n\n{message['content']}"
            return rest
    return [{"role": "user", "content": system}, *rest]


def _around_answer(tokenizer: Any, messages: Messages, opened: str) -> tuple[str, str]:
    """(text between the opened reply and the answer, text from the answer's end to the end of its turn)."""
    whole = fill_template(tokenizer, [*messages, {"role": "assistant", "content": MARK}], open_reply=False)
    head, found, tail = whole.rpartition(MARK)
    if not found:
        raise UsageError("the chat template does not show the assistant's message: use another template.")
    before = head[len(opened) :] if head.startswith(opened) else ""
    stop = tail.lstrip()
    for token in sorted(_special_tokens(tokenizer), key=len, reverse=True):
        if stop.startswith(token):  # a line break after the end of turn is no part of the reply
            return before, tail[: len(tail) - len(stop) + len(token)]
    if tokenizer.chat_template is None:
        return before, tokenizer.eos_token or ""
    return before, tail


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )


def _special_tokens(tokenizer: Any) -> set[str]:
    """Texts of all special and added tokens."""
    return {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} - {""}
