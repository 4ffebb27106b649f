"""The linear probe against torch's own SGD, and against a training that was killed."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing as mp
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import vitreg
from peers import error
from probes.labeled import ALL_BLOCKS, KILLED, images_of, small_stores, train_killed
from probes.small import small_vit
from vitreg.probes import FeaturesConfig, FeatureStore, extract
from vitreg.probes.heads.linear_grid import LinearConfig, LinearGrid
from vitreg.probes.tasks.linear import _Input, _inputs, _table, linear, linear_blocks

SHORT = LinearConfig(learning_rates=(0.01, 0.1), epochs=1, epoch_length=20, head_batch_size=16)
Stores = tuple[FeatureStore, FeatureStore]


@pytest.fixture(scope="module")
def stores(test_data, tmp_path_factory) -> Stores:
    return small_stores(test_data, tmp_path_factory.mktemp("stores"))


def test_heads_train_as_with_torch():
    """All of them, with the losses summed as in DINOv2's `eval/linear.py`, on the batches of a whole pass."""
    torch.manual_seed(0)
    labels = torch.arange(48) % 3
    table, inputs = torch.randn(48, 9), (slice(2, 7), slice(0, 9))
    features = [table[:, columns] for columns in inputs]
    config = LinearConfig(learning_rates=(0.05, 2.0), epochs=2, epoch_length=4, head_batch_size=20)
    heads = LinearGrid(table, inputs, labels, 3, config, "cpu")
    peers: list[list[nn.Linear]] = []
    for number, each in enumerate(features):
        weights = heads.tensors[f"weight.{number}"].clone().split(3)
        peers.append([nn.Linear(each.shape[1], 3) for _ in weights])
        for layer, weight in zip(peers[-1], weights, strict=True):
            layer.weight.data, layer.bias.data = weight, torch.zeros(3)
    groups = [
        {"params": list(layer.parameters()), "lr": rate * 20 / 256}
        for layers in peers
        for layer, rate in zip(layers, config.learning_rates, strict=True)
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8, eta_min=0)
    seen: list[int] = []
    for rows in heads.batches():
        seen += rows.tolist()
        heads.step(rows)
        loss = sum(
            nn.functional.cross_entropy(layer(each[rows]), labels[rows])
            for layers, each in zip(peers, features, strict=True)
            for layer in layers
        )
        assert isinstance(loss, torch.Tensor)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    for first in (0, 48, 96):
        assert sorted(seen[first : first + 48]) == list(range(48))
    assert seen[:48] != seen[48:96]
    for number, layers in enumerate(peers):
        assert error(heads.tensors[f"weight.{number}"], torch.cat([layer.weight for layer in layers])) < 1e-5
        assert error(heads.tensors[f"bias.{number}"][:, 0], torch.cat([layer.bias for layer in layers])) < 1e-5
    right = heads.right(table, labels)
    logits = [layer(each) for layers, each in zip(peers, features, strict=True) for layer in layers]
    assert torch.equal(right, torch.stack([found.argmax(1) == labels for found in logits]))


def test_a_head_that_has_diverged_is_never_right():
    labels = torch.zeros(20, dtype=torch.long)
    heads = LinearGrid(torch.randn(20, 4), [slice(4)], labels, 2, LinearConfig(learning_rates=(0.1, 0.2)), "cpu")
    heads.tensors["weight.0"][2:] = torch.nan
    assert not heads.right(torch.randn(20, 4), labels)[1].any()


def test_weights_start_as_in_the_protocol():
    heads = LinearGrid(torch.randn(10, 400), [slice(400)], torch.arange(10) % 5, 5, LinearConfig(), "cpu")
    assert heads.tensors["weight.0"].shape == (13 * 5, 400)
    assert heads.tensors["weight.0"].std().item() == pytest.approx(0.01, rel=0.03)
    assert not heads.tensors["bias.0"].any()
    assert LinearConfig().num_iterations == 12500


def test_inputs_that_overlap_are_held_once(stores):
    """One by one, those of a ViT-L on ImageNet would be 63 GB."""
    train, _ = stores
    inputs = _inputs(train, LinearConfig())
    table, columns = _table(train, inputs)
    tokens = [train.cls(block) for block in (0, 1, 2)]
    mean = train.mean_patch(-1)
    expected = [tokens[-1:], [*tokens[-1:], mean], tokens, [*tokens, mean]]
    assert len(columns) == 4
    for parts, found in zip(expected, columns, strict=True):
        assert torch.equal(table[:, found], torch.cat(parts, 1))
    assert table.shape == (train.num_images, 4 * mean.shape[1])
    only = _table(train, (_Input(2, False),))
    assert torch.equal(only[0][:, only[1][0]], torch.cat(tokens[1:], 1))


def test_the_best_head_is_reported_and_the_others_are_told(stores):
    train, val = stores
    steps = []
    result = linear(train, val, SHORT, on_progress=lambda *step: steps.append(step))
    assert steps == [(n, 20) for n in range(1, 21)]
    heads = result.details["heads"]
    # The model has three blocks, not four.
    assert [head["input"] for head in heads[::2]] == [
        "class token of the last block",
        "class token of the last block and mean patch",
        "class token of the last 3 blocks",
        "class token of the last 3 blocks and mean patch",
    ]
    assert [head["learning_rate"] for head in heads] == [0.01, 0.1] * 4
    (score,) = result.scores
    assert score.value == pytest.approx(max(head["top-1"] for head in heads))
    assert result.details["best"] in heads
    assert len(score.sums) == val.num_images
    again = linear(train, val, SHORT)
    assert json.dumps(again.details) == json.dumps(result.details)
    other = linear(train, val, dataclasses.replace(SHORT, seed=1))
    assert json.dumps(other.details) != json.dumps(result.details)


def test_blocks_that_a_store_must_have(test_data, tmp_path):
    assert linear_blocks(12) == (-4, -3, -2, -1)
    assert linear_blocks(3) == (-3, -2, -1)
    assert linear_blocks(12, LinearConfig(blocks=(1,))) == (-1,)
    images = images_of(test_data, "val", (3, 7), 4)
    last = extract(small_vit(), images, tmp_path / "last", FeaturesConfig())
    with pytest.raises(ValueError, match="holds no tokens of block -3, only of 2; run another feature pass"):
        linear(last, last, SHORT)
    assert len(linear(last, last, dataclasses.replace(SHORT, blocks=(1,))).details["heads"]) == 4


def test_without_class_token_the_mean_patch_only(test_data, tmp_path):
    vit = vitreg.VisionTransformer(dataclasses.replace(small_vit().config, class_token=False, pool="mean"))
    store = extract(vit, images_of(test_data, "val", (3, 7), 8), tmp_path / "store", ALL_BLOCKS)
    heads = linear(store, store, SHORT).details["heads"]
    assert [head["input"] for head in heads] == ["mean patch"] * 2


def test_a_state_goes_on_and_another_is_refused_with_both(stores, test_data, tmp_path):
    train, val = stores
    state = tmp_path / "folder" / "state"
    whole = linear(train, val, SHORT, state=state)
    steps = []
    again = linear(train, val, SHORT, state=state, on_progress=lambda *step: steps.append(step))
    assert not steps
    assert again.scores[0].sums.tolist() == whole.scores[0].sums.tolist()
    with pytest.raises(ValueError, match=r'other config: .*"head_batch_size": 16.*, not .*"head_batch_size": 8'):
        linear(train, val, dataclasses.replace(SHORT, head_batch_size=8), state=state)
    other = extract(small_vit(), images_of(test_data, "train", (3, 7), 8), tmp_path / "other", ALL_BLOCKS)
    with pytest.raises(ValueError, match=r"other features: .*\(120 images, .*, not .*\(16 images"):
        linear(other, other, SHORT, state=state)
    state.write_bytes(state.read_bytes()[:-4])
    with pytest.raises(ValueError, match="is damaged or no state of a linear probe"):
        linear(train, val, SHORT, state=state)
    # What a kill in the middle of writing leaves is not one.
    state.rename(state.with_name(".state.partial"))
    assert linear(train, val, SHORT, state=state).scores[0].value == whole.scores[0].value


def test_features_that_are_not_finite(stores, monkeypatch):
    train, val = stores
    spoilt = train.mean_patch(-1)
    spoilt[7, 3] = torch.nan
    monkeypatch.setattr(FeatureStore, "mean_patch", lambda _store, _block: spoilt)
    with pytest.raises(ValueError, match="not finite in row 7"):
        linear(train, val, SHORT)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"blocks": ()}, "blocks is empty"),
        ({"blocks": (0,)}, r"blocks is \(0,\); all must be above 0"),
        ({"learning_rates": (0.1, -1.0)}, "all must be above 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"momentum": 1.0}, "momentum is 1.0"),
    ],
)
def test_a_config_that_is_wrong(config, sentence):
    with pytest.raises(ValueError, match=sentence):
        LinearConfig(**config)


def iteration(state: Path) -> int:
    """Of a state file; -1 where there is none yet."""
    if not state.exists():
        return -1
    with safe_open(state, framework="pt") as file:
        return json.loads(file.metadata()["vitreg"])["iteration"]


@pytest.mark.slow
def test_killed_at_random_moments_is_bit_for_bit_as_never_killed(stores, tmp_path):
    train, val = (store.path for store in stores)
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["vitreg.probes.tasks.linear", "timm", "pyarrow.parquet"])

    def started(name: str):
        process = context.Process(target=train_killed, args=(train, val, tmp_path / name, tmp_path / f"{name}.json"))
        process.start()
        return process

    whole = started("whole")
    whole.join(60)
    assert whole.exitcode == 0
    reached = [-1]
    for least in (1, 90, 200):
        process, end = started("killed"), time.monotonic() + 60
        while iteration(tmp_path / "killed") < max(least, reached[-1] + 1):
            assert time.monotonic() < end
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.03))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        reached.append(iteration(tmp_path / "killed"))
    assert reached == sorted(set(reached))
    assert reached[-1] < KILLED.num_iterations
    last = started("killed")
    last.join(60)
    assert last.exitcode == 0
    for name in ("{}", "{}.json"):
        assert (tmp_path / name.format("killed")).read_bytes() == (tmp_path / name.format("whole")).read_bytes()
    assert iteration(tmp_path / "whole") == KILLED.num_iterations
