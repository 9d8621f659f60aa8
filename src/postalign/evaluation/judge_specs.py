"""Judges by name: `rules`, `embedded`, `model:HUB_ID_OR_FOLDER[:format]`, `endpoint:MODEL@BASE_URL`.

Knows how a name is read and which file makes the judge; what it needs is imported only then.
"""

from __future__ import annotations

from typing import Any

from ..errors import UsageError, nearest
from .judges import Judge, RuleJudge, judge

KINDS = ("rules", "embedded", "embedded:harm", "model:HUB_ID_OR_FOLDER[:format]", "endpoint:MODEL@BASE_URL")


def load_judge(spec: str, **settings: Any) -> Judge:
    """The judge that `spec` names.

    rules: phrases and word statistics, eleven languages, nothing to load. embedded: the classifier that ships with the
    package, English (`embedded:harm`: harmful or not). model: a local guard or classifier (guards.py has the formats;
    `sequence` for a sequence classifier, `judgezoo` for that package's judges). endpoint: an OpenAI-compatible server,
    such as `endpoint:gpt-5-mini@https://api.openai.com/v1`. settings: keyword arguments of the class.

    Raises UsageError for a name that means none of these, or for settings that the judge does not have.
    """
    kind, _, rest = spec.partition(":")
    try:
        if spec == "rules":
            return RuleJudge(**settings) if settings else judge
        if kind == "embedded" and rest in ("", "harm"):
            from .embedded import EmbeddedJudge

            return EmbeddedJudge("harm" if rest else "refusal", **settings)
        if kind == "model" and rest:
            from .model_judge import FORMATS, model_judge

            name, colon, format = rest.rpartition(":")
            known = colon and (format in FORMATS or ("/" not in format and "\\" not in format and name))
            return model_judge(name, format, **settings) if known else model_judge(rest, **settings)
        if kind == "endpoint":
            from .endpoint import EndpointJudge

            model, at, address = rest.rpartition("@http")
            if not model or not at:
                raise UsageError(f"{spec!r} must read endpoint:MODEL@BASE_URL, with http:// or https://.")
            return EndpointJudge(model, f"http{address}", **settings)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise UsageError(f"the judge {spec!r} has no such setting: {error}.") from error
    raise UsageError(f"no judge {spec!r}.{nearest(spec, KINDS)} Choose from: {', '.join(KINDS)}.")
