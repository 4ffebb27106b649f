import copy
import io

import pyarrow.parquet as parquet
import pytest
import torch
import torch.multiprocessing
from lightly.utils.scheduler import cosine_schedule
from PIL import Image

from peers import error
from training.distillation_steps import CASES, random_batch, run, small_method, step
from vitreg.training.engine.method import Sample
from vitreg.training.engine.randomness import fixed_randomness
from vitreg.training.recipes.dinov2 import DINOv2Config
from vitreg.training.recipes.multi_crop import MultiCrop, MultiCropConfig, locate_hidden
from vitreg.training.recipes.sizes import sized

NUM_PROCESSES = 2


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(run, (NUM_PROCESSES, folder), nprocs=NUM_PROCESSES)
    return torch.load(folder / "results.pt")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_processes_do_what_one_does(processes, case):
    _, centering, progress = case
    expected, expected_gradients, expected_teacher = step(small_method(centering), random_batch(), progress)
    scalars, gradients, teacher = processes[case]
    for name, value in expected.items():
        assert float(scalars[name]) == pytest.approx(float(value), rel=1e-5), name
    assert gradients.keys() == expected_gradients.keys()
    for name, value in expected_gradients.items():
        if progress == 0 and "prototypes" in name:
            assert not gradients[name].any()
        else:
            assert value.any(), name
            assert error(gradients[name], value) < 1e-5, name
    for name, value in expected_teacher.items():
        assert error(teacher[name], value) < 1e-6, name


def test_the_teacher_moves_by_its_momentum_and_learns_no_gradient():
    method, batch = small_method(), random_batch()
    method(batch, 0.5)["loss"].backward()
    frozen = [*method.teacher_vit.parameters(), *method.teacher_heads.parameters()]
    before = [p.clone() for p in frozen]
    student = [*method.vit.parameters(), *method.heads.parameters()]
    method.after_step(0.5)
    assert method.teacher_momentum(0.5) == pytest.approx(0.997)
    for old, learning, new in zip(before, student, frozen, strict=True):
        torch.testing.assert_close(new, 0.997 * old + 0.003 * learning)
        assert new.grad is None
        assert not new.requires_grad
    assert method.export_model is method.teacher_vit
    assert method.train().vit.training
    assert not method.teacher_vit.training


def test_schedules():
    method = small_method(teacher_momentum=0.992, temperature_warmup=0.25)
    for step_ in (0, 3, 60, 100):
        assert method.teacher_momentum(step_ / 100) == pytest.approx(cosine_schedule(step_, 101, 0.992, 1.0))
    assert [method.teacher_temperature(progress) for progress in (0.0, 0.125, 0.25, 1.0)] == pytest.approx(
        [0.04, 0.055, 0.07, 0.07]
    )
    assert small_method(temperature_warmup=0.0).teacher_temperature(0.0) == 0.07


@pytest.mark.parametrize("separate_heads", [True, False])
def test_every_parameter_learns(separate_heads):
    """From its initial value, and also where nothing is hidden: distributed training waits for all gradients."""
    method, batch = small_method(separate_heads=separate_heads), random_batch()
    learning = {name: p for name, p in method.named_parameters() if p.requires_grad}
    assert len(method.heads) == 1 + separate_heads
    method(batch, 0.5)["loss"].backward()
    assert [name for name, p in learning.items() if p.grad is None or not p.grad.any()] == []
    method.zero_grad()
    nothing = torch.zeros_like(batch["mask"])
    method(batch | {"mask": nothing} | locate_hidden(nothing), 0.5)["loss"].backward()
    assert [name for name, p in learning.items() if p.grad is None] == []


def test_registers_are_never_hidden_and_in_no_loss(monkeypatch):
    method, batch = small_method(), random_batch()
    entering, leaving = [], []
    method.vit.blocks[0].register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
    method.vit.register_forward_hook(lambda _, __, tokens: leaving.append(tokens))
    losses = []
    for value in (0.0, 5.0):
        method.mask_token.data.fill_(value)
        losses.append(method(batch, 0.5)["loss"])
    prefix = method.vit.config.num_prefix_tokens
    assert prefix == 4
    hidden = batch["mask"].flatten(0, 1)
    changed = (entering[0] != entering[2]).any(-1)  # entering: large and small crops of the first and second pass
    assert not changed[:, :prefix].any()
    assert torch.equal(changed[:, prefix:], hidden)
    large, small = leaving[:2]
    used = [large.registers, small.registers, small.patches, large.cls, small.cls, large.patches]
    gradients = torch.autograd.grad(losses[0], used, allow_unused=True)
    assert gradients[:3] == (None, None, None)
    assert all(gradient.any() for gradient in gradients[3:5])
    assert torch.equal((gradients[5] != 0).any(-1), hidden)


def test_the_teacher_sees_the_hidden_patches():
    method, batch = small_method(), random_batch()
    seen = []
    method.teacher_vit.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    method(batch, 0.5)
    assert len(seen) == 1
    assert torch.equal(seen[0][0], batch["global"].flatten(0, 1))  # crops of an image next to each other, no mask


def test_a_copy_after_a_step_is_independent():
    """lightly's heads, with a derived weight, cannot be copied after a forward pass."""
    method, batch = small_method(), random_batch()
    expected = method(batch, 0.5)["loss"]
    other = copy.deepcopy(method)
    for p in method.parameters():
        p.data.zero_()
    assert other(batch, 0.5)["loss"] == expected


def test_bfloat16_keeps_losses_in_float32():
    method, batch = small_method(), random_batch()
    expected = method(batch, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        scalars = method(batch, 0.5)
    for name, value in scalars.items():
        assert value.dtype == torch.float32, name
        torch.testing.assert_close(value, expected[name], rtol=0.05, atol=0, msg=name)


@pytest.mark.parametrize("wrong", [dict(num_classes=5), dict(class_token=False, pool="mean")])
def test_models_that_it_cannot_train_are_refused(wrong):
    model = sized("micro", patch_size=8, image_size=32, num_registers=0, **wrong)
    with pytest.raises(ValueError, match="a class token and without a head"):
        DINOv2Config(num_prototypes=8).build(model)


def test_a_temperature_that_float32_cannot_do_is_refused():
    with pytest.raises(ValueError, match="teacher_temperature is"):
        DINOv2Config(teacher_temperature=(0.01, 0.07))


def test_learning_on_real_images(test_data):
    """Losses fall, targets neither become uniform nor the same for all images, and registers stay different."""
    model = sized("micro", patch_size=16, image_size=64, num_registers=4, layer_scale=True, embed_dim=64, depth=2)
    config = DINOv2Config(
        MultiCropConfig(num_local=2, local_size=32),
        num_prototypes=128,
        hidden_dim=128,
        bottleneck_dim=32,
        teacher_temperature=(0.03, 0.03),  # sharper than the default, whose learning thirty steps do not show
        teacher_momentum=0.98,
    )
    rows = parquet.read_table(test_data / "tiny-imagenet-100" / "val.parquet").slice(0, 64).column("image")
    samples = [Sample(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in rows.to_pylist()]
    method = config.build(model).train()
    views = MultiCrop(model, config.crops)
    for block in [*method.vit.blocks, *method.teacher_vit.blocks]:
        # From 1e-5 it takes hundreds of steps until class tokens of different images differ.
        torch.nn.init.constant_(block.ls1, 0.1)
        torch.nn.init.constant_(block.ls2, 0.1)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=5e-4)
    history = []
    for number in range(30):
        with fixed_randomness(number):
            first = number % 2 * 32
            rows = [views(sample) for sample in samples[first : first + 32]]
            batch = views.collate(torch.utils.data.default_collate(rows))
        scalars = method(batch, number / 30)
        optimizer.zero_grad()
        scalars["loss"].backward()
        optimizer.step()
        method.after_step(number / 30)
        history.append({name: float(value.detach()) for name, value in scalars.items()})
    first, last = history[0], history[-1]
    assert last["dino"] < first["dino"] - 0.5
    assert last["koleo"] < first["koleo"] - 1
    assert last["marginal_entropy"] > 0.95
    assert 0.5 < last["teacher_entropy"] < 0.99
    registers = method.export_model.registers[0].detach()
    assert torch.pdist(registers).min() > 0.1 * registers.norm(dim=1).max()
