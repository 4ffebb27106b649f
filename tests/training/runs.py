"""Run folders as training writes them, around real diagnoses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import vitreg


def real_diagnoses(trained: vitreg.VisionTransformer, images: torch.Tensor) -> dict[str, vitreg.Diagnosis]:
    """A trained model that has artifacts, and random ones of its shape that have none."""
    torch.manual_seed(0)
    random = vitreg.VisionTransformer(trained.config)
    registers = vitreg.VisionTransformer(dataclasses.replace(trained.config, num_registers=4))
    small = vitreg.VisionTransformer(dataclasses.replace(trained.config, depth=3, embed_dim=96, mlp_dim=192))
    models = {"artifacts": trained, "clean": random, "registers": registers, "small": small}
    found = {name: vitreg.diagnose(model.eval(), images) for name, model in models.items()}
    inner = vitreg.diagnose(trained, images, block=9)
    assert found["artifacts"].has_artifacts
    assert not found["clean"].has_artifacts
    return {**found, "inner": inner}


def line(step: int, diagnosis: vitreg.Diagnosis) -> str:
    values = diagnosis.to_dict()
    del values["skipped"], values["position_frequency"]
    return json.dumps({"step": step, "images": 8 * step, "metrics": {"top1": 1.5}, **values}) + "\n"


def write_run(folder: Path, diagnoses: Mapping[int, vitreg.Diagnosis], **config: Any) -> Path:
    """A folder with a diagnosis at each of these steps."""
    folder.mkdir(parents=True)
    values = {"format": "vitreg-run/1", "recipe": "deit3", "num_steps": max(diagnoses, default=0), "batch_size": 8}
    (folder / "config.json").write_text(json.dumps(values | config))
    (folder / "diagnosis.jsonl").write_text("".join(line(step, found) for step, found in diagnoses.items()))
    return folder
