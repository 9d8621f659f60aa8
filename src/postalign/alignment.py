"""The waist of postalign: what methods make, and everything else takes.

An Alignment is a list of edits, an optional gate, and its provenance. On disk it is a folder: `alignment.json`,
`alignment.safetensors`, and a standard PEFT folder where an edit is an adapter. Never pickle.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from . import __version__
from .edits import AdapterGuide, Control, Guidance, HiddenEdit, LowRankPatch, ProbeGate, edit_from_state
from .edits.edit import Edit, attach_all, under_prefix, with_prefix
from .errors import PostalignError, UsageError
from .files import whole_folder, write_whole
from .models.chat import template_hash, tokenizer_hash

SCHEMA = 1
JSON_NAME, TENSORS_NAME, GUIDE_FOLDER = "alignment.json", "alignment.safetensors", "guide"


def fingerprint(model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """What an alignment is bound to: model id, revision, and hashes of configuration, weights, vocabulary, template."""
    config = model.config.to_dict()  # type: ignore[union-attr]
    volatile = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache")
    shape = {k: v for k, v in config.items() if k not in volatile and not k.startswith("_")}
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode()).hexdigest()
    return {
        "model": str(getattr(model, "postalign_name", "") or config.get("_name_or_path") or ""),
        "revision": config.get("_commit_hash"),
        "config": digest,
        "dtype": str(getattr(model, "dtype", "")),
        "weights": weights_digest(model),
        "tokenizer": tokenizer_hash(tokenizer),
        "template": template_hash(tokenizer),
    }


def weights_digest(model: nn.Module, samples: int = 64) -> str:
    """A cheap digest of the weights: `samples` numbers of every floating tensor, rounded so that a dtype cast agrees.

    Tells two fine-tunes of one model apart, which a configuration hash cannot. Not a cryptographic checksum.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_floating_point() and tensor.numel():
            flat = tensor.detach().reshape(-1)
            step = max(1, flat.numel() // samples)
            values = flat[::step][:samples].float().cpu().to(torch.bfloat16)
            digest.update(name.encode() + values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


@dataclass
class Alignment:
    """What a method fitted: `edits`, `gate`, and where they come from.

    method: its name. config: the method's settings as fitted. base: `fingerprint` of the model. provenance: data
    hashes, versions, seeds. info: measured figures (JSON). arrays: tensors worth keeping, such as `head_effects`
    `[layers, heads]`.
    """

    method: str
    edits: list[Edit]
    gate: ProbeGate | None = None
    config: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, Tensor] = field(default_factory=dict)

    @property
    def hidden(self) -> list[Edit]:
        """The edits that hooks can apply: all but guidance."""
        return [edit for edit in self.edits if not isinstance(edit, Guidance)]

    @property
    def guidance(self) -> Guidance | None:
        return next((edit for edit in self.edits if isinstance(edit, Guidance)), None)

    @property
    def unsafe(self) -> bool:
        """True when a part of it (an unsafe guide) must not be published."""
        return self.guidance is not None and self.guidance.unsafe and isinstance(self.guidance.guide, AdapterGuide)

    def only(self, *parts: str) -> Alignment:
        """The same alignment with just the named parts: any of `amplification`, `guidance`, `gate`."""
        unknown = set(parts) - {"amplification", "guidance", "gate"}
        if unknown:
            raise UsageError(f"an alignment has no part {sorted(unknown)[0]!r}: name amplification, guidance or gate.")
        edits = [e for e in self.edits if ("guidance" if isinstance(e, Guidance) else "amplification") in parts]
        return replace(self, edits=edits, gate=self.gate if "gate" in parts else None)

    def with_strength(self, strength: float) -> Alignment:
        """The same alignment with its hidden edits at `strength`."""
        edits = [e.at(strength=strength) if isinstance(e, HiddenEdit) else e for e in self.edits]
        return replace(self, edits=edits)

    def check(self, model: nn.Module, tokenizer: Any = None) -> None:
        """Raise PostalignError unless this alignment was made for `model` (and, when given, `tokenizer`)."""
        for edit in self.edits:
            edit.check(model)
        if self.gate is not None:
            self.gate.check(model)
        if not self.base or tokenizer is None:
            return
        here = fingerprint(model, tokenizer)
        names = {
            "config": "another model",
            "weights": "other weights",
            "tokenizer": "another tokenizer",
            "template": "another chat template",
        }
        if self.base.get("dtype") != here["dtype"]:
            del names["weights"]  # the same weights in another precision have another digest
        for key, what in names.items():
            if self.base.get(key) and self.base[key] != here[key]:
                fitted_on = self.base.get("model") or "a model"
                raise PostalignError(
                    f"this alignment was fitted on {fitted_on} with {what} than the one given: "
                    "load that model, or fit again on this one."
                )

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Hidden edits live in `model` inside the block, for plain `model.generate`; undone exactly, also on error.

        Guidance and gates need postalign's decoding: `pa.generate` or `custom_generate`, or `only("amplification")`.
        """
        if self.gate is not None:
            raise UsageError(
                "a gated alignment is decided per prompt, which hooks alone cannot do: use pa.generate(...) or "
                "custom_generate=alignment.custom_generate, or alignment.only('amplification')."
            )
        control = Control()

        def tell(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            inputs = kwargs.get("input_ids", args[0] if args else None)
            inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
            if inputs is None:
                raise UsageError("an alignment needs input_ids or inputs_embeds to know which tokens are new.")
            cache = kwargs.get("past_key_values")
            control.strength = torch.ones(inputs.shape[0])
            control.start = 0 if cache is not None and cache.get_seq_length() > 0 else inputs.shape[1]

        handles = attach_all(self.edits, model, control)
        try:
            handles.append(model.register_forward_pre_hook(tell, with_kwargs=True))
            yield model
        finally:
            for handle in handles:
                handle.remove()

    @property
    def custom_generate(self) -> Callable[..., Any]:
        """`model.generate(**inputs, custom_generate=alignment.custom_generate)`: the same engine as `pa.generate`."""
        # by name: decoding stands above this module and is only met when it is asked for
        return importlib.import_module("postalign.decoding.custom").custom_generate(self)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the alignment to `folder`, whole or not at all. An older alignment there is replaced, nothing else."""
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / JSON_NAME).exists())):
            raise UsageError(f"{folder} exists and is not an alignment: choose an empty or a new folder.")
        parts, tensors = [], with_prefix("arrays", self.arrays)
        with whole_folder(folder) as staged:
            for other in folder.iterdir() if folder.exists() else ():  # what else the user keeps there stays
                if other.is_dir() and other.name != GUIDE_FOLDER:
                    shutil.copytree(other, staged / other.name, symlinks=True)
                elif other.is_file() and other.name not in (JSON_NAME, TENSORS_NAME):
                    shutil.copy2(other, staged / other.name, follow_symlinks=False)
            for i, edit in enumerate((*self.edits, self.gate) if self.gate else self.edits):
                settings, own = edit.state()
                if isinstance(edit, Guidance) and isinstance(edit.guide, AdapterGuide):
                    edit.guide.patch.save_peft(staged / GUIDE_FOLDER, base_model=self.base.get("model", ""))
                    settings["guide"] = {"kind": "guide.adapter", "folder": GUIDE_FOLDER}
                    own = {}
                parts.append(settings)
                tensors.update(with_prefix(f"part{i}", own))
            description = {
                "schema": SCHEMA,
                "postalign": __version__,
                "method": self.method,
                "unsafe_guide": self.unsafe,
                "base": self.base,
                "config": self.config,
                "provenance": self.provenance,
                "info": self.info,
                "parts": parts,
                "arrays": sorted(self.arrays),
            }
            write_whole(staged / JSON_NAME, json.dumps(description, indent=2, ensure_ascii=False) + "\n")
            # clones: safetensors refuses tensors that share memory, as an edit and its guide's may
            whole = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
            write_whole(staged / TENSORS_NAME, save(whole))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Alignment:
        """Read what `save_pretrained` wrote. Raises PostalignError when it is missing, damaged or newer than this."""
        folder = Path(folder)
        try:
            description = dict(json.loads((folder / JSON_NAME).read_text(encoding="utf-8")))
            tensors = load((folder / TENSORS_NAME).read_bytes())
        except FileNotFoundError as error:
            missing = Path(error.filename or JSON_NAME).name
            raise PostalignError(
                f"{folder} is not an alignment (no {missing}): make one with `postalign fit`."
            ) from error
        except Exception as error:  # json, safetensors and the file system each raise their own
            raise PostalignError(
                f"the alignment in {folder} cannot be read ({type(error).__name__}): fit it again."
            ) from error
        schema = description.get("schema")
        if schema != SCHEMA:
            raise PostalignError(
                f"{folder} has alignment schema {schema}, this version reads {SCHEMA}: update postalign."
            )
        try:
            return cls._from_parts(folder, description, tensors)
        except (KeyError, TypeError, AttributeError) as error:
            raise PostalignError(f"the alignment in {folder} is damaged ({error!r}): fit it again.") from error

    @classmethod
    def _from_parts(cls, folder: Path, description: dict[str, Any], tensors: dict[str, Tensor]) -> Alignment:
        edits, gate = [], None
        for i, settings in enumerate(description["parts"]):
            own = under_prefix(f"part{i}", tensors)
            if settings["kind"] == "guidance" and settings["guide"].get("folder"):
                patch = LowRankPatch.from_peft(folder / settings["guide"]["folder"])
                part: Any = Guidance(AdapterGuide(patch), settings["lambda"], settings["unsafe"])
            else:
                part = edit_from_state(settings, own)
            if isinstance(part, ProbeGate):
                gate = part
            else:
                edits.append(part)
        return cls(
            description["method"],
            edits,
            gate,
            description["config"],
            description["base"],
            description["provenance"],
            description["info"],
            under_prefix("arrays", tensors),
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        allow_unsafe_guide: bool = False,
        confirm_unsafe_guide: bool = False,
        **kwargs: Any,
    ) -> None:
        """Upload the folder to a hub repository; an unsafe guide goes along only when told twice."""
        if self.unsafe and not (allow_unsafe_guide and confirm_unsafe_guide):
            raise UsageError(
                "this alignment holds an unsafe guide: push alignment.only('amplification', 'gate'), or pass both "
                "allow_unsafe_guide=True and confirm_unsafe_guide=True if you must publish it."
            )
        import tempfile

        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as temporary:
            self.save_pretrained(Path(temporary) / "alignment")
            HfApi().create_repo(repo_id, exist_ok=True)
            HfApi().upload_folder(repo_id=repo_id, folder_path=Path(temporary) / "alignment", **kwargs)
