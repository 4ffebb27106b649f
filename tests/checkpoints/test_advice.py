"""Whatever an error of the checkpoints advises is done here, and works."""

from __future__ import annotations

import argparse
import re
import shutil
import tomllib
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import vitreg
from peers import perturb, random_images
from vitreg import CheckpointError, load
from vitreg.checkpoints import registry

ROOT = Path(__file__).parents[2]
TIMM_NAME = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The empty folder of checkpoints of a machine without a network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VITREG_CHECKPOINTS", str(tmp_path / "checkpoints"))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def refusal(source, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(source, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def place(sentence: str) -> str:
    """The name that a file or folder must have in the folder of checkpoints."""
    found = re.search(r"put (?:.* as )?(\S+) into the folder that VITREG_CHECKPOINTS names$", sentence)
    assert found, sentence
    return found[1]


def weights(architecture: str, **options) -> dict[str, torch.Tensor]:
    model = perturb(timm.create_model(architecture, **options))
    return {key: tensor.contiguous() for key, tensor in model.state_dict().items()}


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("source", [TIMM_NAME, "augreg_vit_ti16", f"timm/{TIMM_NAME}", "dinov2_vits14"])
def test_timm_weights_go_where_the_error_says(folder, source):
    name = place(refusal(source))
    save_file(weights(name.removesuffix(".safetensors")), folder / name)
    assert load(source).config.name == source.removeprefix("timm/")


def test_facebook_dinov2_small_goes_where_the_error_says(folder):
    """It named `dinov2-small.safetensors`, which nobody looked for and which would not have sufficed."""
    transformers = pytest.importorskip("transformers")
    sentence = refusal("facebook/dinov2-small")
    assert "the repository's folder (config.json, model.safetensors) as facebook--dinov2-small" in sentence
    config = transformers.Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56)
    transformers.Dinov2Model(config).save_pretrained(folder / place(sentence))
    vit = load("facebook/dinov2-small")
    assert (vit.config.name, vit.config.embed_dim) == ("facebook/dinov2-small", 32)


def test_open_clip_weights_go_where_the_error_says(folder, monkeypatch):
    open_clip = pytest.importorskip("open_clip")
    vision, text = dict(image_size=32, layers=1, width=64, patch_size=8), dict(width=8, heads=1, layers=1)
    small = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-16", small)
    sentence = refusal("open_clip:ViT-B-16/laion2b_s34b_b88k")
    model = perturb(open_clip.CLIP(**small))
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    save_file(state, folder / place(sentence))
    vit = load("open_clip:ViT-B-16/laion2b_s34b_b88k")
    assert vit.config.name == "open_clip:ViT-B-16/laion2b_s34b_b88k"
    images = random_images(32)
    with torch.no_grad():
        torch.testing.assert_close(vit.classify(images), model.encode_image(images))


def test_open_clip_without_a_tag_names_tags_that_exist():
    """It loaded random weights."""
    open_clip = pytest.importorskip("open_clip")
    for source in ("open_clip:ViT-B-16", "open_clip:ViT-B-16/nope"):
        sentence = refusal(source)
        tags = sentence.partition("give open_clip:ViT-B-16/ and one of ")[2].split(", ")
        assert tags == open_clip.list_pretrained_tags_by_model("ViT-B-16")
    near = refusal("open_clip:ViT-B-17/openai").partition("did you mean ")[2].rstrip("?").split(", ")
    assert near
    assert set(near) <= set(open_clip.list_models())


def test_open_clip_without_weights_is_built_and_converted():
    open_clip = pytest.importorskip("open_clip")
    assert "build it with open_clip and use from_open_clip" in refusal("open_clip:ViT-S-32")
    with torch.device("meta"):
        assert vitreg.from_open_clip(open_clip.create_model("ViT-S-32", device="meta")).config.depth == 12


@pytest.mark.usefixtures("narrow")
def test_timm_without_weights_is_built_and_converted():
    assert "build it with timm and use from_timm" in refusal("vit_small_patch16_36x1_224")
    assert vitreg.from_timm(timm.create_model("vit_small_patch16_36x1_224")).config.depth == 2


@pytest.mark.parametrize("name", ["dinov2_vitl14_regs", "vit_base_patch16_225", "swin_tiny_patch4_window7_224"])
def test_names_that_are_suggested_can_be_read(name):
    near = refusal(name).partition("did you mean ")[2].rstrip("?").split(", ")
    assert near
    for other in near:
        row = registry.find(other)
        with torch.device("meta"):
            model = timm.create_model(row.timm if row else other, depth=1)
        vitreg.from_timm(model)


@pytest.mark.usefixtures("narrow")
def test_a_file_that_does_not_say_what_it_is_takes_an_architecture(folder):
    torch.save(weights("vit_base_patch16_224"), folder / "mine.pth")
    sentence = refusal(folder / "mine.pth")
    architecture = re.search(r"architecture='(\w+)'", sentence)
    assert architecture
    assert load(folder / "mine.pth", architecture=architecture[1]).config.name == "mine"


@pytest.mark.usefixtures("narrow")
def test_a_file_with_objects_is_saved_again_as_safetensors(folder):
    file = folder / "vit_tiny_patch16_224.pth"
    torch.save({"model": weights("vit_tiny_patch16_224"), "path": Path("x")}, file)
    assert "Save its state_dict as .safetensors where it was made, and load that" in refusal(file)
    content = torch.load(file, weights_only=False)
    save_file(content["model"], file.with_suffix(".safetensors"))
    assert load(file.with_suffix(".safetensors")).config.embed_dim == 96


@pytest.mark.usefixtures("narrow")
def test_a_torchscript_archive_is_no_truncated_file(folder):
    """OpenAI's ViT-B-16.pt was said to be damaged."""

    class Tower(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = timm.create_model("vit_tiny_patch16_224", num_classes=0)

        def forward(self, images):
            return self.visual(images)

    model = perturb(Tower())
    file = folder / "ViT-B-16.pt"
    torch.jit.trace(model, random_images(224, batch=1)).save(file)
    sentence = refusal(file)
    assert "is a TorchScript archive" in sentence
    assert "save torch.jit.load(...).state_dict() as .safetensors" in sentence
    state = {key.removeprefix("visual."): value for key, value in torch.jit.load(file).state_dict().items()}
    save_file(state, folder / "vit_tiny_patch16_224.safetensors")
    vit = load("vit_tiny_patch16_224")
    with torch.no_grad():
        torch.testing.assert_close(vit(random_images(224)).cls, model(random_images(224)), rtol=1e-4, atol=1e-4)
    named = sentence.partition("OpenAI's CLIPs are also ")[2].split(", ")
    assert "clip_vit_b16" in named
    assert all(registry.find(name) for name in named)


def test_arrays_of_jax_are_sent_to_timms_conversion(folder):
    stem = "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224"
    (folder / f"{stem}.npz").write_bytes(b"PK\x03\x04")
    name = refusal(folder / f"{stem}.npz").rpartition(" ")[2]
    assert name == "augreg_vit_ti16"
    (folder / "other.npz").write_bytes(b"PK\x03\x04")
    name = refusal(folder / "other.npz").rpartition(" ")[2]
    assert name in timm.list_pretrained("vit_base_patch16_224.*")


def test_names_of_transformers_are_loaded_from_their_folder(folder):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32)
    transformers.ViTModel(config).save_pretrained(folder / "mine")
    sentence = refusal(folder / "mine" / "model.safetensors", architecture="vit_base_patch16_224")
    assert "load its folder with config.json, or use from_transformers(model)" in sentence
    assert load(folder / "mine").config.name == "mine"
    model = transformers.ViTModel.from_pretrained(folder / "mine")
    assert vitreg.from_transformers(model).config.name == "mine"


def test_an_image_processor_that_is_not_implemented_leaves_transformers_own(folder):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32)
    transformers.ViTModel(config).save_pretrained(folder / "mine")
    (folder / "mine" / "preprocessor_config.json").write_text('{"do_resize": false}')
    sentence = refusal(folder / "mine")
    assert "load the model with transformers, use from_transformers(model) and give it what the processor" in sentence
    vit = vitreg.from_transformers(transformers.AutoModel.from_pretrained(folder / "mine"))
    vit(transformers.ViTImageProcessor(do_resize=False)([torch.zeros(3, 32, 32)], return_tensors="pt")["pixel_values"])


def test_a_checkpoint_without_all_weights_is_not_filled_with_random_ones(folder):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32)
    model = transformers.ViTModel(config)
    state = {key: tensor for key, tensor in model.state_dict().items() if "layer.1." not in key and ".1." not in key}
    model.save_pretrained(folder / "mine", state_dict=state)
    assert "give a checkpoint that was saved whole" in refusal(folder / "mine")
    model.save_pretrained(folder / "mine")
    assert load(folder / "mine").config.depth == 2


@pytest.mark.parametrize("format", ["timm", "transformers"])
def test_what_another_format_cannot_express_is_saved_in_vitregs(folder, format):
    vit = vitreg.VisionTransformer(
        vitreg.ViTConfig(embed_dim=32, depth=1, num_heads=2, mlp_dim=64, patch_size=8, image_size=(32, 32), 
                         norm_eps=0.1, pool="token+mean", differential=True)
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="save with format='vitreg'"):
        vitreg.save(vit, folder / "mine.safetensors", format=format)
    vitreg.save(vit, folder / "mine.safetensors", format="vitreg")
    assert load(folder / "mine.safetensors").config.norm_eps == 0.1


def test_extras_that_errors_name_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = set()
    for file in (ROOT / "src").rglob("*.py"):
        named |= set(re.findall(r"vitreg\[(\w+)\]", file.read_text(encoding="utf-8")))
    assert named
    assert named <= set(extras)


# --- files under the names of their authors -------------------------------------------------------

OFFICIAL = {
    "dinov2_vits14_pretrain": "dinov2_vits14",
    "dinov2_vits14_reg4_pretrain": "dinov2_vits14_reg",
    "dino_deitsmall16_pretrain": "dino_vits16",
    "dino_vitbase8_pretrain": "dino_vitb8",
    "mae_pretrain_vit_base": "mae_vitb16",
    "deit_3_small_224_1k": "deit3_small_patch16_224",
    "deit_tiny_patch16_224-a1311bcf": "deit_tiny_patch16_224",
    "dinov3_vits16_pretrain_lvd1689m-08c60483": "dinov3_vits16",
}


def test_official_file_names_are_known():
    for stem, name in OFFICIAL.items():
        assert registry.of_official_file(stem) == name, stem
    sat = registry.of_official_file("dinov3_vitl16_pretrain_sat493m-eadcf0ff")
    assert sat == "vit_large_patch16_dinov3_qkvb.sat493m"
    assert timm.get_pretrained_cfg(sat).mean != timm.get_pretrained_cfg(sat.replace("sat493m", "lvd1689m")).mean
    for stem in ("model", "dinov3_convnext_tiny_pretrain_lvd1689m-21b726bb", "dinov3_vitx16_pretrain_lvd1689m", ""):
        assert registry.of_official_file(stem) is None


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("stem", OFFICIAL)
def test_an_official_file_answers_for_its_model(folder, stem):
    """`dinov2_vits14` was not found in `dinov2_vits14_pretrain.pth`."""
    row = registry.find(OFFICIAL[stem])
    torch.save({"model": weights(row.timm, num_classes=0), "args": argparse.Namespace(lr=1)}, folder / f"{stem}.pth")
    by_name = [load(row.name), load(row.timm), load(f"timm/{row.timm}")]
    by_file = load(folder / f"{stem}.pth")
    assert [vit.config.name for vit in (*by_name, by_file)] == [row.name, row.timm, row.timm, stem]
    for vit in by_name[::2]:
        assert torch.equal(vit.patch_embed.weight, by_file.patch_embed.weight)
    assert by_name[0].config.position_interpolation == by_file.config.position_interpolation
    shutil.rmtree(folder)
    folder.mkdir()
    assert "could not get" in refusal(row.name)
