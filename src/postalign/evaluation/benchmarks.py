"""The public test sets that a suite can be named after: where each one is, what its columns mean, whose it is.

A table of facts; reading is in benchmark_rows.py. No row of any of them is shipped. Revisions are commits of the hub
repository; where none is written down, the loader takes the newest, looks up which that is and records it as not
pinned. `rows` counts what the publisher states, for the reader: it is not enforced.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError, nearest

HARMFUL, BENIGN = "harmful", "benign"


@dataclass(frozen=True)
class Part:
    """One portion of a benchmark: a configuration and split of its hub set, and what its rows are.

    label: of all its rows, None where a column tells. only: keep just rows of this label.
    """

    split: str
    config: str | None = None
    label: str | None = HARMFUL
    rows: int | None = None
    only: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """One public test set.

    hub: id of its hub data set, None where it is only to be had as a file (see `file`). revision: commit of the hub
    set, None where not pinned. gated: the hub asks to accept terms first. parts: name -> part; `default` are those
    used when none is named. prompt, kind, context, id: column names, the first that is there counts; a context is put
    before the prompt. label: column of the label; where it is missing and `contrast` is given, rows whose kind begins
    with that are harmful and all others benign. part: column of a local file that tells the part. file: where the
    publisher has it as a file. choices: multiple choice, for `postalign choice`.
    """

    title: str
    cite: str
    licence: str
    parts: dict[str, Part]
    default: tuple[str, ...]
    hub: str | None = None
    revision: str | None = None
    gated: bool = False
    prompt: tuple[str, ...] = ("prompt",)
    kind: tuple[str, ...] = ("category",)
    context: tuple[str, ...] = ()
    id: tuple[str, ...] = ("id",)
    label: tuple[str, ...] = ("label",)
    contrast: str | None = None
    part: tuple[str, ...] = ()
    file: str | None = None
    choices: bool = False


def benchmark(name: str) -> Benchmark:
    """The entry called `name`. Raises UsageError for one that is not there."""
    if name not in BENCHMARKS:
        known = ["starter", *BENCHMARKS]
        raise UsageError(f"no suite or file is called {name!r}.{nearest(name, known)} Known: {', '.join(known)}.")
    return BENCHMARKS[name]


def _one(split: str, rows: int, **more: object) -> dict[str, Part]:
    return {"all": Part(split, rows=rows, **more)}  # type: ignore[arg-type]


_GITHUB = "https://raw.githubusercontent.com"

BENCHMARKS: dict[str, Benchmark] = {
    "harmeval": Benchmark(
        title="HarmEval: 11 categories of what usage policies prohibit, 50 questions each",
        cite="Banerjee et al. 2025 (SafeInfer), arXiv:2406.12274",
        licence="Apache-2.0, and the terms of the gate: non-commercial use only",
        hub="SoftMINER-Group/HarmEval",
        revision="d1f62d8c8a42b919d7466fcd1896dc9cdb8134c3",
        gated=True,
        parts=_one("train", 550),
        default=("all",),
        prompt=("Question",),
        kind=("Topic",),
    ),
    "advbench": Benchmark(
        title="AdvBench, harmful behaviours",
        cite="Zou et al. 2023, arXiv:2307.15043",
        licence="MIT",
        hub="walledai/AdvBench",
        gated=True,
        parts=_one("train", 520),
        default=("all",),
        prompt=("prompt", "goal"),
        file=f"{_GITHUB}/llm-attacks/llm-attacks/098262edf85f807224e70ecd87b9d83716bf6b73/data/advbench/harmful_behaviors.csv",
    ),
    "harmbench": Benchmark(
        title="HarmBench, text behaviours: standard, with a context, copyright",
        cite="Mazeika et al. 2024, arXiv:2402.04249",
        licence="MIT",
        hub="walledai/HarmBench",
        revision="a777536ffc60bc8317b06380da5b2acf8d6491fd",
        gated=True,
        parts={
            "standard": Part("train", "standard", rows=200),
            "contextual": Part("train", "contextual", rows=100),
            "copyright": Part("train", "copyright", rows=100),
        },
        default=("standard", "contextual", "copyright"),
        prompt=("prompt", "Behavior"),
        kind=("category", "SemanticCategory"),
        context=("context", "ContextString"),
        id=("id", "BehaviorID"),
        part=("functional", "FunctionalCategory"),
        file=f"{_GITHUB}/centerforaisafety/HarmBench/c0423b952435fcc8467108d8f25962dbae5b7de2/data/behavior_datasets/harmbench_behaviors_text_all.csv",
    ),
    "strongreject": Benchmark(
        title="StrongREJECT, forbidden prompts",
        cite="Souly et al. 2024, arXiv:2402.10260",
        licence="MIT",
        hub="walledai/StrongREJECT",
        revision="df54272b395ce9e584d2f8140519935425d8549f",
        gated=True,
        parts=_one("train", 313),
        default=("all",),
        prompt=("prompt", "forbidden_prompt"),
        file=f"{_GITHUB}/alexandrasouly/strongreject/3432b2d696b428f242bd507df96d80f686571d5e/strongreject_dataset/strongreject_dataset.csv",
    ),
    "jailbreakbench": Benchmark(
        title="JailbreakBench behaviours: a harmful and a benign half on the same themes",
        cite="Chao et al. 2024, arXiv:2404.01318",
        licence="MIT",
        hub="JailbreakBench/JBB-Behaviors",
        revision="886acc352a31533ffbcf4ef22c744658688086fc",
        parts={
            "harmful": Part("harmful", "behaviors", HARMFUL, 100),
            "benign": Part("benign", "behaviors", BENIGN, 100),
        },
        default=("harmful", "benign"),
        prompt=("Goal",),
        kind=("Category",),
        id=("Index", "id"),
    ),
    "xstest": Benchmark(
        title="XSTest v2: safe prompts that sound unsafe, and their unsafe contrasts",
        cite="Röttger et al. 2024, arXiv:2308.01263",
        licence="CC-BY-4.0",
        hub="walledai/XSTest",
        revision="f1d713187c61b6ae64e602d74f0b3d812cc2e8e8",
        gated=True,
        parts={
            "all": Part("test", label=None, rows=450),
            "safe": Part("test", label=None, rows=250, only=BENIGN),
            "unsafe": Part("test", label=None, rows=200, only=HARMFUL),
        },
        default=("all",),
        kind=("type",),
        contrast="contrast_",
        file=f"{_GITHUB}/paul-rottger/xstest/d7bb5bd738c1fcbc36edd83d5e7d1b71a3e2d84d/xstest_prompts.csv",
    ),
    "oktest": Benchmark(
        title="OKTest: harmless prompts with alarming words",
        cite="Shi et al. 2024 (OverKill), arXiv:2401.17633",
        licence="none stated",
        parts=_one("test", 300, label=BENIGN),
        default=("all",),
        file=f"{_GITHUB}/InvokerStark/OverKill/51809bb9e7c029d7cc1247389e0578da92e784e2/data/OKTest.csv",
    ),
    "orbench": Benchmark(
        title="OR-Bench: harmless prompts that models refuse (hard, 80k), and a toxic control",
        cite="Cui et al. 2024, arXiv:2405.20947",
        licence="CC-BY-4.0",
        hub="bench-llm/or-bench",
        revision="e36d8b80e81837c8a8f264bbb2a49f1b32c7e272",
        parts={
            "hard": Part("train", "or-bench-hard-1k", BENIGN, 1319),
            "80k": Part("train", "or-bench-80k", BENIGN, 80359),
            "toxic": Part("train", "or-bench-toxic", HARMFUL, 655),
        },
        default=("hard", "toxic"),
    ),
    "dangerousqa": Benchmark(
        title="DangerousQA: questions written by a model asked for bad ones",
        cite="Shaikh et al. 2023, arXiv:2212.08061",
        licence="see its repository",
        parts=_one("test", 200),
        default=("all",),
        prompt=("prompt", "question"),
        file=f"{_GITHUB}/SALT-NLP/chain-of-thought-bias/445568d3b73f81a9054f51c739172186d5648157/data/dangerous-q/toxic_outs.json",
    ),
    "techhazardqa": Benchmark(
        title="TechHazardQA: seven technical themes",
        cite="Banerjee et al. 2024, arXiv:2402.15302",
        licence="Apache-2.0",
        hub="SoftMINER-Group/TechHazardQA",
        revision="d100fa1222a7179e0f492813129054dc19195408",
        parts=_one("train", 1850),
        default=("all",),
        prompt=("Question",),
        kind=("Topic", "Domain"),
    ),
    "nichehazardqa": Benchmark(
        title="NicheHazardQA: six themes",
        cite="Hazra et al. 2024, arXiv:2401.10647",
        licence="Apache-2.0",
        hub="SoftMINER-Group/NicheHazardQA",
        revision="114a05b168027c3190dc4e2f3b558fe48e6092c8",
        parts=_one("train", 388),
        default=("all",),
        prompt=("Question",),
        kind=("Domain", "Topic"),
    ),
    "catqa": Benchmark(
        title="CatQA: 11 categories of five kinds, in English, Chinese and Vietnamese",
        cite="Bhardwaj et al. 2024, arXiv:2402.11746",
        licence="Apache-2.0",
        hub="declare-lab/CategoricalHarmfulQA",
        revision="321e068b391b7d1aeeb882ac468356a9513c9167",
        parts={language: Part(language, rows=550) for language in ("en", "zh", "vi")},
        default=("en",),
        prompt=("Question",),
        kind=("Category",),
    ),
    "simplesafetytests": Benchmark(
        title="SimpleSafetyTests: prompts any model should decline",
        cite="Vidgen et al. 2023, arXiv:2311.08370",
        licence="CC-BY-4.0",
        hub="Bertievidgen/SimpleSafetyTests",
        revision="98223c5d8c4059c8f4d8fe2fec8720ee8a20d3c5",
        parts=_one("test", 100),
        default=("all",),
        kind=("harm_area", "category"),
    ),
    "donotanswer": Benchmark(
        title="Do-Not-Answer: questions of five risk areas",
        cite="Wang et al. 2024, arXiv:2308.13387",
        licence="CC-BY-NC-SA-4.0",
        hub="LibrAI/do-not-answer",
        revision="74e74f2e4507ef256fe536f78a776f4a1ff67955",
        parts=_one("train", 939),
        default=("all",),
        prompt=("question",),
        kind=("risk_area", "types_of_harm"),
    ),
    "beavertails": Benchmark(
        title="BeaverTails evaluation prompts: 14 categories, 50 each",
        cite="Ji et al. 2023, arXiv:2307.04657",
        licence="CC-BY-NC-4.0",
        hub="PKU-Alignment/BeaverTails-Evaluation",
        revision="464b97a2acc879552b13d57c8304f036d0a05646",
        parts=_one("test", 700),
        default=("all",),
    ),
    "safetybench": Benchmark(
        title="SafetyBench: multiple choice, seven categories, English and Chinese",
        cite="Zhang et al. 2024, arXiv:2309.07045",
        licence="MIT",
        hub="thu-coai/SafetyBench",
        revision="70538631943dc1517ae9bb0733251809f4445d0e",
        parts={
            "en": Part("en", "test", None, 11435),
            "zh": Part("zh", "test", None, 11435),
            "zh_subset": Part("zh_subset", "test", None, 2100),
        },
        default=("en",),
        choices=True,
        file="https://github.com/thu-coai/SafetyBench/tree/027b3ca8434e56acfb51c7e7b18a3cb2aff09d4b/opensource_data",
    ),
}
