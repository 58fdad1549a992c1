import hashlib
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("segment_anything")

from vfmk.sam import load
from vfmk.sam.load import TINY_SHA256, TINY_WEIGHTS, build_tiny_sam, load_sam


@pytest.fixture(scope="module")
def tiny_state():
    torch.manual_seed(0)
    return build_tiny_sam().state_dict()


def test_tiny_is_the_bundled_file_in_float32_and_eval_mode():
    sam = load_sam("tiny")
    state = sam.state_dict()
    for key, value in load_file(TINY_WEIGHTS).items():
        assert value.dtype == torch.float16
        assert torch.equal(state[key], value.float()), key
    assert {p.dtype for p in sam.parameters()} == {torch.float32}
    assert not any(module.training for module in sam.modules())
    assert sum(p.numel() for p in sam.parameters()) == 1_567_688


def test_bundled_file_has_the_pinned_sha256():
    assert hashlib.sha256(TINY_WEIGHTS.read_bytes()).hexdigest() == TINY_SHA256


def test_changed_bundled_file_is_refused(tmp_path, monkeypatch):
    content = bytearray(TINY_WEIGHTS.read_bytes())
    content[-1] ^= 1
    changed = tmp_path / "tiny.safetensors"
    changed.write_bytes(content)
    monkeypatch.setattr(load, "TINY_WEIGHTS", changed)
    with pytest.raises(ValueError, match=r"tiny\.safetensors was changed or cut.*SHA-256"):
        load_sam("tiny")


def test_tiny_normalises_as_sam_does():
    sam = build_tiny_sam()
    assert sam.pixel_mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])
    assert sam.pixel_std.flatten().tolist() == pytest.approx([58.395, 57.12, 57.375])


def test_unknown_name_lists_the_names():
    with pytest.raises(ValueError, match=r"tiny, vit_b, vit_l, vit_h, got 'vit_x'"):
        load_sam("vit_x")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_checkpoint_loads_bit_for_bit(tmp_path, tiny_state, suffix):
    path = tmp_path / f"sam{suffix}"
    if suffix == ".pth":
        torch.save(tiny_state, path)
    else:
        save_file(tiny_state, path)
    loaded = load_sam("tiny", path).state_dict()
    assert loaded.keys() == tiny_state.keys()
    assert all(torch.equal(loaded[key], tiny_state[key]) for key in tiny_state)


def test_published_sizes_are_built_by_segment_anything(tmp_path, tiny_state, monkeypatch):
    import segment_anything

    small = {name: lambda checkpoint: build_tiny_sam() for name in ("vit_b", "vit_l", "vit_h")}
    monkeypatch.setattr(segment_anything, "sam_model_registry", small)
    path = tmp_path / "sam_vit.pth"
    torch.save(tiny_state, path)
    for name in small:
        sam = load_sam(name, path)
        assert torch.equal(
            sam.state_dict()["mask_decoder.iou_token.weight"],
            tiny_state["mask_decoder.iou_token.weight"],
        )
        assert not sam.training
        assert not load_sam(name).training


@pytest.mark.parametrize(
    ("width", "guess"),
    [
        (768, "'vit_b'"),
        (1024, "'vit_l'"),
        (1280, "'vit_h'"),
        (99, "a Segment Anything model of width 99"),
    ],
)
def test_checkpoint_of_another_model_is_named(tmp_path, tiny_state, width, guess):
    key = "image_encoder.patch_embed.proj.weight"
    path = tmp_path / "other.pth"
    torch.save(tiny_state | {key: torch.zeros(width, 3, 16, 16)}, path)
    with pytest.raises(ValueError, match="not a checkpoint of 'tiny'") as caught:
        load_sam("tiny", path)
    assert f"it seems to be {guess}: " in str(caught.value)
    assert f"{key} [{width}, 3, 16, 16], expected [128, 3, 8, 8]" in str(caught.value)


def test_missing_and_unexpected_keys_are_named(tmp_path, tiny_state):
    state = dict(tiny_state)
    del state["image_encoder.pos_embed"]
    state["head.weight"] = torch.zeros(1)
    path = tmp_path / "keys.pth"
    torch.save(state, path)
    with pytest.raises(
        ValueError,
        match=r"it lacks image_encoder\.pos_embed; has a stray head\.weight$",
    ):
        load_sam("tiny", path)


def test_foreign_state_dict_is_no_sam(tmp_path):
    path = tmp_path / "foreign.safetensors"
    save_file({"conv1.weight": torch.zeros(1)}, path)
    with pytest.raises(
        ValueError,
        match=r"no Segment Anything model: it lacks .* and 2\d\d more; has a stray conv1",
    ):
        load_sam("tiny", path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", b"\x80\x02garbage"])
def test_unreadable_file_is_named(tmp_path, suffix, content):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"broken\{suffix} is not a"):
        load_sam("tiny", path)


def test_cut_checkpoint_is_refused(tmp_path, tiny_state):
    path = tmp_path / "cut.pth"
    torch.save(tiny_state, path)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"cut\.pth is not a PyTorch checkpoint"):
        load_sam("tiny", path)


class Foreign:
    pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Foreign(), "is not a PyTorch checkpoint"),  # would run code if it were unpickled
        ({"model": {"weight": torch.zeros(1)}}, "something other than a state dict"),
        ([torch.zeros(1)], "something other than a state dict"),
    ],
)
def test_anything_but_a_state_dict_is_refused(tmp_path, content, message):
    path = tmp_path / "object.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        load_sam("tiny", path)


def test_missing_file_is_not_found(tmp_path):
    for name in ("none.pth", "none.safetensors"):
        with pytest.raises(FileNotFoundError, match="none"):
            load_sam("tiny", tmp_path / name)


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "segment_anything", None)
    with pytest.raises(ImportError, match=r"pip install vfmk\[sam\]"):
        load_sam("tiny")


def test_importing_the_module_imports_no_segment_anything():
    code = "import sys, vfmk.sam.load; sys.exit('segment_anything' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
