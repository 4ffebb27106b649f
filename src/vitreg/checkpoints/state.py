"""From a config and a state dict to a model."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from vitreg.model import VisionTransformer, ViTConfig

SHOWN_KEYS = 5


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: what was given, what was expected, what to do.

    Attributes:
        part: what it has that vitreg does not implement, where that is why.
    """

    def __init__(self, sentence: str, *, part: str = "") -> None:
        super().__init__(sentence)
        self.part = part


class UnsupportedByFormat(CheckpointError):
    """A format that has no place for a part of the model."""


class _Unsupported(Exception):
    """A part that vitreg does not implement."""


def check_supported(condition: bool, part: str) -> None:
    """Refuse a part unless the condition holds; only inside `conversion_errors`, which says what it is a part of."""
    if not condition:
        raise _Unsupported(part)


def check_norms(model: nn.Module) -> None:
    """A norm without weights leaves no trace in a state dict."""
    for name, module in model.named_modules():
        has_weight = getattr(module, "weight", None) is not None or any(module.children())
        check_supported(has_weight or "norm" not in type(module).__name__.lower(), f"a norm without weights ({name})")


@contextlib.contextmanager
def conversion_errors(
    subject: str, advice: str, trouble: str = "has a part that vitreg does not know"
) -> Iterator[None]:
    """Turns whatever a foreign module or state dict trips a converter over into a sentence.

    Args:
        subject: what is read, the start of the sentence.
        advice: what to do where `check_supported` did not say what is wrong.
        trouble: what went wrong there.

    Raises:
        CheckpointError: a part is not implemented, or not where it should be.
    """
    try:
        yield
    except CheckpointError:
        raise
    except _Unsupported as part:
        sentence = f"{subject} has {part}, which vitreg does not implement; `vitreg models` lists what it reads"
        raise CheckpointError(sentence, part=str(part)) from None
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{subject} {trouble} ({one_line(error)}); {advice}") from error


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, or its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def build(config: ViTConfig, state: Mapping[str, Tensor], source: str) -> VisionTransformer:
    """The model of a config with copies of these weights, in evaluation mode.

    Args:
        config: the architecture.
        state: tensors under vitreg's own names.
        source: what the weights are from, for the message.

    Raises:
        CheckpointError: a weight is missing, left over, or of another shape.
    """
    with torch.device("meta"):
        vit = VisionTransformer(config)
    expected = vit.state_dict()
    check_keys(state, expected, source)
    wrong = [
        f"{key} has shape {list(state[key].shape)}, expected {list(tensor.shape)}"
        for key, tensor in expected.items()
        if state[key].shape != tensor.shape
    ]
    if wrong:
        raise CheckpointError(f"{source} does not fit the architecture: {_some(wrong)}")
    vit.load_state_dict({key: tensor.detach().clone() for key, tensor in state.items()}, assign=True)
    return vit.eval()


def check_keys(given: Iterable[str], expected: Iterable[str], source: str) -> None:
    """Compare the names of weights.

    Raises:
        CheckpointError: names at most five missing and five unexpected keys.
    """
    given, expected = list(given), list(expected)
    missing = sorted(set(expected) - set(given))
    unexpected = sorted(set(given) - set(expected))
    if missing or unexpected:
        parts = []
        if missing:
            parts.append(f"{len(missing)} missing keys: {_some(missing)}")
        if unexpected:
            parts.append(f"{len(unexpected)} unexpected keys: {_some(unexpected)}")
        raise CheckpointError(f"{source} does not fit the architecture: {'; '.join(parts)}; check `architecture`")


def _some(items: list[str]) -> str:
    return ", ".join(items[:SHOWN_KEYS]) + (", ..." if len(items) > SHOWN_KEYS else "")


def digest(config: ViTConfig, weights: Mapping[str, Tensor]) -> str:
    """32 hexadecimal digits that change with any weight or field of the config."""
    found = hashlib.blake2b(digest_size=16)
    found.update(json.dumps(config.to_dict(), sort_keys=True, default=str).encode())
    for tensor in weights.values():
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
