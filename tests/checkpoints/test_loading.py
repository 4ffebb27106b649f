"""`load`: one function for every source of weights; nothing here needs a network."""

from __future__ import annotations

import dataclasses
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import vitreg
from peers import TOLERANCE, error, perturb, random_images
from vitreg import CheckpointError, load
from vitreg.model import PositionInterpolation

TIMM_NAME = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
DINO_RULE = PositionInterpolation("bicubic", antialias=False, offset=0.1)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The folder that is searched first, still empty; the network is cut, so that nothing else can answer."""
    monkeypatch.setenv("VITREG_CHECKPOINTS", str(tmp_path))
    return tmp_path


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path_factory):
    """No name resolves, nothing is cached and no proxy helps."""

    def refuse(*args, **kwargs):
        raise socket.gaierror("Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("VITREG_CHECKPOINTS", raising=False)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))


def model_and_file(path: Path, architecture: str = TIMM_NAME, metadata: dict | None = None, **options):
    """A perturbed timm model and its weights in a file."""
    model = perturb(timm.create_model(architecture, **{"dynamic_img_size": True, **options}))
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state, path, metadata)
    else:
        torch.save({"model": state}, path)
    return model


@torch.no_grad()
def same(vit, model, *size: int) -> None:
    images = random_images(*(size or (224,)), batch=1)
    assert error(vit(images).patches, model.forward_features(images)[:, model.num_prefix_tokens :]) <= TOLERANCE
    if model.num_classes:
        assert error(vit.classify(images), model(images)) <= TOLERANCE


# --- the folder -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("augreg_vit_ti16", "augreg_vit_ti16"),
        ("augreg_vit_ti16", TIMM_NAME),
        (TIMM_NAME, TIMM_NAME),
        (f"timm/{TIMM_NAME}", TIMM_NAME),
        (f"hf-hub:timm/{TIMM_NAME}", TIMM_NAME),
        (f"timm/{TIMM_NAME}", f"timm/{TIMM_NAME}"),
        (f"timm/{TIMM_NAME}", f"timm--{TIMM_NAME}"),
        ("vit_tiny_patch16_224", "vit_tiny_patch16_224"),
    ],
)
def test_the_folder_answers_first(folder, source, file, suffix):
    model = model_and_file(folder / f"{file}{suffix}")
    vit = load(source)
    same(vit, model)
    assert vit.config.name == source.removeprefix("hf-hub:").removeprefix("timm/")
    assert not vit.training


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("file", ["owner/name", "owner--name"])
def test_a_hub_repository_in_the_folder(folder, file):
    model = model_and_file(folder / f"{file}.safetensors", metadata={"architecture": "vit_tiny_patch16_224"})
    same(load("owner/name"), model)
    model = model_and_file(folder / f"{file}.safetensors", metadata=None)
    with pytest.raises(CheckpointError, match=r"name\.safetensors does not say which architecture it is; give one"):
        load("owner/name")
    same(load("owner/name", architecture="vit_tiny_patch16_224"), model)


@pytest.mark.usefixtures("narrow")
def test_the_name_decides_the_position_rule(folder):
    """D7: DINO's weights are timm's under another name, but DINO's code resizes positions in another way."""
    name = "vit_small_patch16_224.dino"
    model_and_file(folder / f"{name}.safetensors", name, {"architecture": "vit_small_patch16_224"})
    assert load("dino_vits16").config.position_interpolation == DINO_RULE
    assert load(name).config.position_interpolation == PositionInterpolation()


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    ("file", "architecture", "rule"),
    [
        ("dino_deitsmall16_pretrain.pth", "vit_small_patch16_224", DINO_RULE),
        ("dino_vitbase8_pretrain.pth", "vit_base_patch8_224", DINO_RULE),
        ("dinov2_vits14_pretrain.pth", "vit_small_patch14_dinov2", DINO_RULE),
        ("dinov2_vits14_reg4_pretrain.pth", "vit_small_patch14_reg4_dinov2", PositionInterpolation()),
        ("vit_tiny_patch16_224.augreg_in21k_ft_in1k.pth", "vit_tiny_patch16_224", PositionInterpolation()),
        ("deit3_small_patch16_224.pth", "deit3_small_patch16_224", PositionInterpolation()),
    ],
)
def test_files_as_the_download_pages_name_them(tmp_path, file, architecture, rule):
    model = model_and_file(tmp_path / file, architecture, num_classes=0)
    vit = load(tmp_path / file)
    assert vit.config.position_interpolation == rule
    same(vit, model, *vit.config.image_size)


@pytest.mark.usefixtures("narrow")
def test_metadata_of_a_file_is_used(tmp_path):
    file = tmp_path / "mine.safetensors"
    for mean, std in (
        ("0.5", "0.25"),
        ("0.5,0.5,0.5", "0.25, 0.25, 0.25"),
        ("[0.5, 0.5, 0.5]", "(0.25 0.25 0.25)"),
    ):
        metadata = {"architecture": "deit_tiny_patch16_224", "mean": mean, "std": std}
        model = model_and_file(file, "deit_tiny_patch16_224", metadata)
        vit = load(str(file))
        same(vit, model)
        assert (vit.preprocess.mean, vit.preprocess.std) == ((0.5,) * 3, (0.25,) * 3)
        assert vit.config.name == "mine"
    given = load(file, architecture="vit_tiny_patch16_224")  # what the caller says counts more
    assert given.config.architecture == "vit_tiny_patch16_224"


def test_a_file_that_does_not_say_what_it_is(tmp_path):
    model_and_file(tmp_path / "mine.pth", depth=1)
    with pytest.raises(CheckpointError, match=r"mine\.pth does not say which architecture .*--architecture"):
        load(tmp_path / "mine.pth")


@pytest.mark.usefixtures("narrow")
def test_a_saved_vitreg_model_needs_nothing_else(tmp_path):
    vit = perturb(vitreg.from_timm(timm.create_model("vit_small_patch14_reg4_dinov2", img_size=98)))
    vitreg.save(vit, tmp_path / "fixed.safetensors")
    again = load(tmp_path / "fixed.safetensors")
    assert again.config == vit.config
    assert torch.equal(again(random_images(98)).patches, vit(random_images(98)).patches)


@pytest.mark.usefixtures("narrow")
def test_device_and_dtype(folder):
    model_and_file(folder / f"{TIMM_NAME}.safetensors")
    vit = load(TIMM_NAME, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in vit.parameters()} == {torch.bfloat16}
    assert vit(random_images(224)).patches.dtype == torch.bfloat16
    vit = load(TIMM_NAME, device="meta")
    assert {parameter.device.type for parameter in vit.parameters()} == {"meta"}
    assert load(TIMM_NAME, device=torch.device("cpu")).patch_embed.weight.dtype == torch.float32


# --- names that do not exist, and no network ------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("dinov2_vitl14_regs", "dinov2_vitl14_reg"),
        ("vit_large_patch14_dino2.lvd142m", r"vit_large_patch14_dinov2\.lvd142m"),
        ("vit_base_patch16_224.no_such_tag", "vit_base_patch16_224"),
        ("timm/vit_tiny_patch16_225", "vit_tiny_patch16_224"),
    ],
)
def test_misspelt_names_get_the_nearest_ones(typed, meant):
    with pytest.raises(CheckpointError, match=f"did you mean .*{meant}"):
        load(typed)


def test_nonsense_is_sent_to_the_list_of_names():
    with pytest.raises(
        CheckpointError, match="no checkpoint or architecture is called 'qqqqqqqqqqqq'; `vitreg models`"
    ):
        load("qqqqqqqqqqqq")


def test_a_missing_file_is_not_taken_for_a_name():
    with pytest.raises(CheckpointError, match=r"nowhere/model\.pth is not a file"):
        load("nowhere/model.pth")


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("source", ["augreg_vit_ti16", TIMM_NAME, "dinov2_vits14", "dinov3_vits16", "clip_vit_b32"])
def test_without_a_network_the_error_comes_at_once_and_names_the_folder(source):
    from huggingface_hub import constants

    offline, began = constants.HF_HUB_OFFLINE, time.monotonic()
    with pytest.raises(CheckpointError, match=r"could not get .*VITREG_CHECKPOINTS") as caught:
        load(source)
    assert time.monotonic() - began < 10
    assert "\n" not in str(caught.value)
    assert offline == constants.HF_HUB_OFFLINE


def test_an_architecture_without_weights_is_refused():
    with pytest.raises(CheckpointError, match="timm has no weights for vit_small_patch16_36x1_224"):
        load("vit_small_patch16_36x1_224")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("resnet50", "ResNet"),
        ("resnet50.a1_in1k", "ResNet"),
        ("convnext_tiny", "ConvNeXt"),
        ("hiera_tiny_224", "Hiera"),
    ],
)
def test_a_name_that_is_no_vit_is_refused_once_and_before_any_download(monkeypatch, name, kind):
    """It was downloaded first; without a network the sentence was about that, and cut off."""
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda *args, **kwargs: pytest.fail("downloads"))
    with pytest.raises(CheckpointError) as caught:
        load(name)
    sentence = str(caught.value)
    assert sentence.startswith(f"{name} is timm's {kind}, not a Vision Transformer that vitreg reads; ")
    assert sentence.count(name) == 1
    assert sentence.endswith(("names", "?"))


def test_a_part_that_is_not_implemented_is_refused_before_any_download(monkeypatch):
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda *args, **kwargs: pytest.fail("downloads"))
    with pytest.raises(CheckpointError, match=r"^timm's vit_base_r50_s16_224\S* has a patch embedding HybridEmbed, "):
        load("vit_base_r50_s16_224")
    for source in ("open_clip:RN50/openai", "open_clip:convnext_base/laion400m_s13b_b51k"):
        with pytest.raises(CheckpointError, match="not a Vision Transformer"):
            load(source)


def test_a_repository_that_is_no_vit_is_refused_by_its_config_alone(folder):
    """There are no weights to be found here."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(architectures=["ResNetForImageClassification"])
    config.save_pretrained(folder / "microsoft--resnet-50")
    with pytest.raises(
        CheckpointError, match=r"^ResNetForImageClassification is not one of transformers' classes that"
    ):
        load("microsoft/resnet-50")
    config = transformers.ViTConfig(num_channels=1, architectures=["ViTModel"])
    config.save_pretrained(folder / "grey--vit")
    with pytest.raises(CheckpointError, match=r"^this ViTModel has 1 input channels, which vitreg does not implement"):
        load("grey/vit")


def test_the_reason_of_a_failed_download_is_not_cut_off(monkeypatch):
    words = " ".join(map(str, range(200)))
    monkeypatch.setattr("timm.create_model", _failing_download(OSError(f"{words} the end\nand more")))
    with pytest.raises(CheckpointError, match=f"{words} the end. Without a network"):
        load(TIMM_NAME)


def _failing_download(error: Exception):
    create_model = timm.create_model

    def create(*args, pretrained=False, **options):
        if pretrained:
            raise error
        return create_model(*args, **options)

    return create


# --- what reports call a model --------------------------------------------------------------------


@pytest.mark.usefixtures("narrow")
def test_a_model_is_not_called_by_an_absolute_path(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    vit = perturb(vitreg.from_timm(timm.create_model("vit_tiny_patch16_224")))
    vit.config = dataclasses.replace(vit.config, name="")
    vitreg.save(vit, tmp_path / "run" / "model.safetensors")
    vitreg.save(vit, tmp_path / "mine.safetensors")
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32)
    transformers.ViTModel(config).save_pretrained(tmp_path / "theirs")
    names = {"run": "run", "run/model.safetensors": "run", "mine.safetensors": "mine", "theirs": "theirs"}
    for source, name in names.items():
        assert load(tmp_path / source).config.name == name
    monkeypatch.chdir(tmp_path / "run")
    assert load(".").config.name == "run"
    theirs = transformers.ViTModel.from_pretrained(tmp_path / "theirs")
    assert vitreg.from_transformers(theirs).config.name == "theirs"


# --- other libraries stay as they were ------------------------------------------------------------

QUIET = """
import logging, sys
import transformers
import vitreg
transformers.utils.logging.set_verbosity_info()
root = logging.getLogger()
before = (list(root.handlers), root.level, transformers.utils.logging.get_verbosity(),
          transformers.utils.logging.is_progress_bar_enabled())
print("start", file=sys.stderr)
vit = vitreg.load(sys.argv[1])
vitreg.save(vit, sys.argv[1] + "/again", format="transformers")
print("end", file=sys.stderr)
assert before == (list(root.handlers), root.level, transformers.utils.logging.get_verbosity(),
                  transformers.utils.logging.is_progress_bar_enabled())
"""


def test_transformers_reports_no_loading_and_keeps_its_logging(tmp_path):
    """Its LOAD REPORT and its bar of weights stood before everything that a command printed."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32)
    model = transformers.ViTModel(config)
    state = {**model.state_dict(), "left.over": torch.zeros(2)}
    model.save_pretrained(tmp_path, state_dict=state)
    done = subprocess.run([sys.executable, "-c", QUIET, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.partition("start\n")[2] == "end\n"
    assert done.stdout == ""


# --- the download path ----------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub, served from a folder: timm asks as it would, and gets a local file."""
    asked = []

    def download(repo_id, filename, **kwargs):
        asked.append(repo_id)
        return str(tmp_path / "hub.safetensors")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    return tmp_path / "hub.safetensors", asked


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    ("source", "timm_name", "rule", "options"),
    [
        (TIMM_NAME, TIMM_NAME, PositionInterpolation(), {}),
        (f"timm/{TIMM_NAME}", TIMM_NAME, PositionInterpolation(), {}),
        ("augreg_vit_ti16", TIMM_NAME, PositionInterpolation(), {}),
        ("dino_vits16", "vit_small_patch16_224.dino", DINO_RULE, {}),
        ("dinov2_vits14", "vit_small_patch14_dinov2.lvd142m", DINO_RULE, {}),
        ("dinov2_vits14_reg", "vit_small_patch14_reg4_dinov2.lvd142m", PositionInterpolation(), {}),
        (
            "dinov3_vits16",
            "vit_small_patch16_dinov3_qkvb.lvd1689m",
            PositionInterpolation(),
            {"global_pool": "token"},
        ),
        ("deit3_small_patch16_224", "deit3_small_patch16_224.fb_in1k", PositionInterpolation(), {}),
    ],
)
def test_a_name_is_downloaded_through_timm(hub, source, timm_name, rule, options):
    file, asked = hub
    model = model_and_file(file, timm_name, **options)
    vit = load(source)
    assert asked == [f"timm/{timm_name}"]
    assert vit.config.position_interpolation == rule
    assert vit.config.name == (timm_name if "/" in source else source)
    assert (vit.config.pool, vit.preprocess.mean) == ("token", model.pretrained_cfg["mean"])
    same(vit, model, *vit.config.image_size)


def test_a_damaged_download_is_one_line(hub, narrow):
    hub[0].write_bytes(b"Entry not found")
    with pytest.raises(CheckpointError, match=f"could not get {TIMM_NAME}: ") as caught:
        load(TIMM_NAME)
    assert "\n" not in str(caught.value)


# --- the real thing -------------------------------------------------------------------------------


def test_the_real_vit_tiny_equals_timm_on_real_photographs(tiny_vit, test_data, photographs):
    file = test_data / "weights" / f"{TIMM_NAME}.safetensors"
    model = timm.create_model(TIMM_NAME, checkpoint_path=str(file)).eval()
    config = {**timm.data.resolve_model_data_config(model), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    transform = timm.data.create_transform(**config)
    images = torch.stack([transform(Image.open(path).convert("RGB")) for path in photographs])
    with torch.no_grad():
        ours, tokens, sequence = tiny_vit.classify(images), tiny_vit(images), model.forward_features(images)
        theirs = model.forward_head(sequence)
    assert error(ours, theirs) <= 1e-4
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    assert error(tokens.cls, sequence[:, 0]) <= 1e-4
    assert error(tokens.patches, sequence[:, 1:]) <= 1e-4
    # The samples are sorted by class, and every 31st was taken: these are the weights that the name promises.
    assert (ours.argmax(-1) == torch.arange(32) * 31).float().mean() >= 0.7


def test_the_real_vit_tiny_is_what_its_name_says(tiny_vit):
    assert tiny_vit.config.name == TIMM_NAME
    assert tiny_vit.config.architecture == "vit_tiny_patch16_224"
    assert (tiny_vit.preprocess.mean, tiny_vit.preprocess.std) == ((0.5,) * 3, (0.5,) * 3)
    with torch.device("meta"):
        model = timm.create_model(TIMM_NAME)
    of_cls = model.pos_embed[:, 0].numel()  # a constant, added to the class token
    assert sum(map(torch.numel, tiny_vit.parameters())) == sum(map(torch.numel, model.parameters())) - of_cls
