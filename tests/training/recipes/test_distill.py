"""Distillation: what a student learns from, and that a teacher is asked once for each view."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import save_file
from tests.peers import perturb

import vitreg
from vitreg.model import VisionTransformer, ViTConfig
from vitreg.training.recipes.configs import DistillConfig
from vitreg.training.recipes.distill import Distill, distill
from vitreg.training.recipes.sizes import sized

SHAPE = {"patch_size": 8, "image_size": 32, "head_bias": False}


def model_config(dim: int = 128, depth: int = 6, **fields) -> ViTConfig:
    config = sized("micro", **{"num_registers": 0, "num_classes": 10, **SHAPE, **fields})
    return dataclasses.replace(config, embed_dim=dim, depth=depth, num_heads=dim // 32, mlp_dim=2 * dim)


def a_teacher(folder, **fields) -> str:
    path = folder / "teacher.safetensors"
    vitreg.save(perturb(VisionTransformer(model_config(**fields)), seed=3), path)
    return str(path)


def a_batch(size: int = 4, first: int = 0) -> dict[str, torch.Tensor]:
    images = torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(first))
    return {"image": images, "view": torch.arange(first, first + size)}


@pytest.mark.parametrize("registers", [0, 4])
def test_a_student_that_is_its_teacher_has_no_loss(tmp_path, registers):
    teacher = a_teacher(tmp_path, num_registers=registers)
    method = Distill(model_config(num_registers=registers), DistillConfig(teacher))
    method.vit.load_state_dict(vitreg.load(teacher).state_dict())
    losses = method(a_batch(), 0.0)
    assert set(losses) == {"loss", "direction", "norm", "register", "attention", "output"}
    assert all(abs(float(value.detach())) < 1e-4 for value in losses.values())


def test_each_term_sees_what_it_is_named_after(tmp_path):
    teacher = a_teacher(tmp_path, num_registers=4)
    method = Distill(model_config(num_registers=4), DistillConfig(teacher))
    original = vitreg.load(teacher).state_dict()
    method.vit.load_state_dict(original)
    with torch.no_grad():
        method.vit.blocks[-1].mlp.fc2.bias.zero_()  # after all attention but before the last norms
    assert method(a_batch(), 0.0)["attention"] < 1e-6 < method(a_batch(), 0.0)["norm"]
    method.vit.load_state_dict(original)
    with torch.no_grad():
        method.vit.head.weight[0] += 1
    losses = method(a_batch(), 0.0)
    assert losses["output"] > 1e-3
    assert losses["direction"] < 1e-4
    method.vit.load_state_dict(original)
    with torch.no_grad():
        method.vit.registers.add_(1)
    assert method(a_batch(), 0.0)["register"] > 1e-3


def test_artifacts_keep_their_norm_in_a_narrower_student(tmp_path):
    teacher = VisionTransformer(model_config(dim=128)).eval()
    with torch.no_grad():  # patches that see red get a massive channel
        teacher.blocks[0].mlp.fc2.bias[7] = 100
    path = tmp_path / "teacher.safetensors"
    vitreg.save(teacher, path)
    method = Distill(model_config(dim=64), DistillConfig(str(path)))
    batch = a_batch()
    method(batch, 0.0)
    projection = method.projection
    assert torch.allclose(projection @ projection.T, torch.eye(64), atol=1e-5)
    tokens = method.teacher(batch["image"], None, projection).tokens
    norms = vitreg.load(path).trace(batch["image"]).patch_norms
    assert torch.allclose(tokens[:, -1, 1:].norm(dim=-1), norms[-1].flatten(1), rtol=0.01)


def test_a_student_learns(tmp_path):
    torch.manual_seed(0)
    method = Distill(model_config(dim=64, depth=4), DistillConfig(a_teacher(tmp_path)))
    optimizer = torch.optim.AdamW(method.parameters(), lr=2e-3)
    batch, losses = a_batch(8), []
    for _ in range(40):
        loss = method(batch, 0.0)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


def test_no_gradient_reaches_the_teacher_and_no_checkpoint_holds_it(tmp_path):
    method = Distill(model_config(), DistillConfig(a_teacher(tmp_path)))
    method(a_batch(), 0.0)["loss"].backward()
    assert all(parameter.grad is None for parameter in method.teacher.vit.parameters())
    assert {name.partition(".")[0] for name in method.state_dict()} == {"vit", "projection"}


def test_a_teacher_is_asked_once_for_each_view(tmp_path):
    config = DistillConfig(a_teacher(tmp_path, num_registers=2), num_views=4, cache=str(tmp_path / "c"))
    method = Distill(model_config(dim=64, num_registers=4), config)
    first = {name: float(value) for name, value in method(a_batch(), 0.0).items()}
    seen: list[int] = []
    method.teacher.vit.register_forward_pre_hook(lambda *_: seen.append(0))
    method.teacher.vit.patch_embed.register_forward_hook(lambda _module, inputs, _out: seen.append(len(inputs[0])))
    again = {name: float(value) for name, value in method(a_batch(), 0.0).items()}
    assert not seen
    assert again == pytest.approx(first, abs=2e-3)
    some = {name: torch.cat((a_batch()[name][:2], a_batch(first=8)[name][:2])) for name in ("image", "view")}
    method(some, 0.0)
    assert seen == [2]
    # Another process, or run, with the same teacher and projection.
    other = Distill(model_config(dim=64, num_registers=4), config)
    other.projection.copy_(method.projection)
    other.vit.load_state_dict(method.vit.state_dict())
    other.teacher.vit.patch_embed.register_forward_hook(lambda *_: pytest.fail("asked again"))
    assert {name: float(value) for name, value in other(a_batch(), 0.0).items()} == pytest.approx(again)


def test_other_images_under_the_same_numbers_are_not_mistaken(tmp_path):
    config = DistillConfig(a_teacher(tmp_path), num_views=4, cache=str(tmp_path / "c"))
    method = Distill(model_config(), config)
    method(a_batch(), 0.0)
    method.vit.load_state_dict(vitreg.load(config.teacher).state_dict())
    other = {"image": a_batch(first=8)["image"], "view": a_batch()["view"]}
    assert method(other, 0.0)["loss"] < 0.01


def test_a_teacher_without_class_token_and_head(tmp_path):
    fields = {"class_token": False, "pool": "mean", "num_classes": 0}
    method = Distill(model_config(dim=64, **fields), DistillConfig(a_teacher(tmp_path, **fields)))
    losses = method(a_batch(), 0.0)
    assert losses["attention"] == 0
    assert losses["loss"] > 0


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        ({"patch_size": 16}, {}, "patches of 16 pixels, the student of 8"),
        ({"num_classes": 3}, {}, "num_classes=3; the student needs the same"),
        ({"class_token": False, "pool": "mean"}, {}, "class_token=False"),
    ],
)
def test_teachers_of_other_tokens_are_refused(tmp_path, teacher, student, message):
    path = a_teacher(tmp_path, **teacher)
    with pytest.raises(ValueError, match=message):
        Distill(model_config(**student), DistillConfig(path))


def test_a_student_may_be_wider(tmp_path):
    method = Distill(model_config(dim=128), DistillConfig(a_teacher(tmp_path, dim=64)))
    assert method(a_batch(), 0.0)["loss"].isfinite()
    assert torch.equal(method.projection, torch.eye(128, 64))


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match="needs a teacher"):
        DistillConfig()
    with pytest.raises(ValueError, match="give --num-views"):
        DistillConfig("teacher", cache="tokens")
    with pytest.raises(ValueError, match="levels is 0"):
        DistillConfig("teacher", levels=0)


def test_no_teacher_is_not_searched_for():
    with pytest.raises(ValueError, match="give a model with --teacher"):
        distill(teacher="", num_images=100)


def test_the_recipe_takes_what_the_teacher_sees(tmp_path):
    teacher = a_teacher(tmp_path)
    config = distill(teacher=teacher, num_images=100, smoke=True)
    assert (config.model.patch_size, config.model.image_size, config.model.num_classes) == (8, (32, 32), 10)
    assert config.model.num_registers == 4
    assert config.model.preprocess.mean == vitreg.load(teacher).preprocess.mean
    with pytest.raises(ValueError, match="levels is 9, but the student has 6 blocks"):
        dataclasses.replace(config, method=dataclasses.replace(config.method, levels=9))


def test_a_student_that_begins_with_weights_has_them_their_shape_and_their_projection(tmp_path):
    teacher, start = a_teacher(tmp_path, dim=64), tmp_path / "start" / "start.safetensors"
    begun = perturb(VisionTransformer(model_config(dim=32, depth=4)), seed=5)
    vitreg.save(begun, start)
    projection = torch.linalg.qr(torch.randn(64, 32)).Q.T.contiguous()
    save_file({"projection": projection}, start.with_name("projection.safetensors"))
    config = distill(teacher=teacher, start=str(start), num_images=10, num_registers=2)
    assert (config.model.embed_dim, config.model.depth, config.model.num_registers) == (32, 4, 2)
    method = Distill(config.model, DistillConfig(teacher, start=str(start), teacher_blocks=(0, 1, 2, 5)))
    state = method.vit.state_dict()
    assert state.pop("registers").std() > 0
    for name, value in begun.state_dict().items():
        torch.testing.assert_close(state.pop(name), value)
    assert not state
    method(a_batch(), 0.0)
    assert torch.equal(method.projection, projection)
    assert method.teacher.blocks == (0, 1, 2, 5)


def test_a_start_that_does_not_fit(tmp_path):
    teacher, start = a_teacher(tmp_path), tmp_path / "start.safetensors"
    vitreg.save(VisionTransformer(model_config(dim=32)), start)
    with pytest.raises(ValueError, match=r"has the shape of .*start.safetensors; leave out its size"):
        distill(teacher=teacher, start=str(start), num_images=10, size="tiny")
    save_file({"projection": torch.zeros(32, 64)}, tmp_path / "projection.safetensors")
    config = distill(teacher=teacher, start=str(start), num_images=10)
    with pytest.raises(ValueError, match=r"projects \[64, 32\] channels, student and teacher have \[128, 32\]"):
        config.method.build(config.model)
    with pytest.raises(ValueError, match="drop_path leaves images out of blocks"):
        dataclasses.replace(config, drop_path=0.1)
    with pytest.raises(ValueError, match="4 levels of the student are to be matched with 2 blocks of the teacher"):
        DistillConfig(teacher, teacher_blocks=(1, 2))
