"""A module of anyone's that is looked at by hooks, with the trace that our model has."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitreg.checkpoints.observed.attention import AttentionCalls
from vitreg.checkpoints.observed.blocks import Blocks, entering, first_tensor, hooked, run
from vitreg.checkpoints.observed.inputs import how_to_call, input_dtype
from vitreg.checkpoints.observed.layout import Layout, measure
from vitreg.checkpoints.state import CheckpointError
from vitreg.common.modes import evaluating
from vitreg.model import ObservedConfig, Preprocess, Query, Tokens, Trace
from vitreg.model.trace import Recorder, Summary


class UnseenAttention(CheckpointError):
    """The blocks attend in a way that is not seen from outside."""


class ObservedViT(nn.Module):
    """A module of anyone's with a residual stream of patch tokens; `observe` makes it.

    It is what `diagnose` and `compare` need of a model: `preprocess`, `config` and `trace`. The module is not changed:
    hooks are there while a trace runs.

    Args:
        module: that takes images.
        blocks: that hand on the tokens.
        grid, prefix: as for `observe`.
        config: what is known of the model before its tokens are counted.

    Attributes:
        module: as given.
        config: what is known of the model, and what was assumed (`config.assumed`).
        layouts: which token is which patch, for every size (height, width) that was looked at.
    """

    head = None

    def __init__(
        self,
        module: nn.Module,
        blocks: Blocks,
        *,
        grid: Sequence[int] | None,
        prefix: int | None,
        config: ObservedConfig,
    ) -> None:
        super().__init__()
        self.module, self.config = module, config
        self._blocks, self._grid, self._prefix = blocks, grid, prefix
        self.layouts: dict[tuple[int, int], Layout] = {}

    def __repr__(self) -> str:
        return f"ObservedViT({self.config.assumed})"

    @property
    def num_registers(self) -> int:
        """Tokens besides the class token that do not depend on the image."""
        return self.config.num_registers

    @property
    def preprocess(self) -> Preprocess:
        """Turns an image into the module's input."""
        return self.config.preprocess

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Tokens:
        """The tokens after the last observed block, before any norm that follows."""
        return self.trace(images).tokens

    def trace(
        self,
        images: Float[Tensor, "B 3 H W"],
        *,
        blocks: Iterable[int] | None = None,
        attention_from: Query | Sequence[Query] | None = None,
        patches: bool = False,
        hidden: bool = False,
        embeddings: bool = False,
        largest: int = 0,
        summaries: Mapping[str, Summary] = MappingProxyType({}),
    ) -> Trace:
        """A forward pass of the module that records what `VisionTransformer.trace` does, by hooks.

        `embeddings` are of the layer that embeds patches, where that was found, else what enters the first block;
        `summaries` are made of the `"stream"` only.

        Raises:
            ValueError: the images do not fit, or something is asked for that the module does not have.
        """
        with looking(self.module):
            images = images.to(input_dtype(self.module))
            layout = self.layout(images)
            recorder = Recorder(
                self.config,
                layout.grid,
                blocks=blocks,
                attention_from=attention_from,
                facets=(),
                also={"patches": patches, "hidden": hidden},
                largest=largest,
                summaries=summaries,
            )
            if recorder.rows and self.config.no_attention:
                raise ValueError(f"no attention can be recorded of {self.config.name}: {self.config.no_attention}")
            last = self._record(images, layout, recorder, embeddings)
        split = Tokens.split(last, class_token=self.config.class_token, grid=layout.grid, normed=False)
        return recorder.finish(split)

    def layout(self, images: Float[Tensor, "B 3 H W"]) -> Layout:
        """Which token is which patch, for images of this size; measured when it is asked for first.

        Raises:
            CheckpointError: that cannot be found out.
        """
        size = (images.shape[-2], images.shape[-1])
        if size not in self.layouts:
            with looking(self.module):
                call, video = how_to_call(self.module)
                given = (self._grid, self._prefix)
                self.layouts[size] = measure(self.module, call, self._blocks, images, *given, video=video)
        return self.layouts[size]

    def _record(self, images: Tensor, layout: Layout, recorder: Recorder, embeddings: bool) -> Tensor:
        """Run the module, hand every block's tokens to the recorder, and return the last ones."""
        batch, modules = len(images), self._blocks.modules
        numbers = {module: i for i, module in enumerate(modules)}
        num_tokens = layout.grid[0] * layout.grid[1] + layout.num_prefix
        rows = torch.tensor([row for row, _ in recorder.rows], dtype=torch.long)
        if layout.order is not None:
            rows = layout.order.cpu()[rows]
        attention: list[AttentionCalls] = []
        stack = contextlib.ExitStack()
        last = images

        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            i = numbers[block]
            if i == 0 and embeddings and layout.embedding is None:
                x = entering(args, kwargs)
                assert x is not None
                stream = layout.arranged(self._blocks.stream(x, batch))
                recorder.embeddings = stream[:, layout.num_prefix :]
            if recorder.rows and i in recorder.blocks:
                attention.append(AttentionCalls(batch, num_tokens, rows, layout.order))
                stack.enter_context(attention[-1])

        def after(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            nonlocal last
            stack.close()
            x = first_tensor(output)
            assert x is not None
            last = layout.arranged(self._blocks.stream(x, batch)).to(images.device)
            recorder.after_block(numbers[block], last)

        def embed(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            recorder.embeddings = layout.embedded(output, batch).to(images.device)

        handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in modules]
        handles += [block.register_forward_hook(after) for block in modules]
        if embeddings and layout.embedding is not None:
            handles.append(layout.embedding.register_forward_hook(embed))
        with stack, hooked(*handles):
            run(how_to_call(self.module)[0], images, self.config.architecture)
        if once := [calls for calls in attention if len(calls.kept) == 1]:
            recorder.attention = [calls.kept[0] for calls in once]
        if len(once) < len(attention):
            raise UnseenAttention(
                f"of its {len(attention)} blocks, {len(once)} attend once from all tokens to all by PyTorch's fused "
                f"kernel, a softmax or multi-head attention, which is what hooks can see"
            )
        return last


@contextlib.contextmanager
def looking(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, uncompiled; afterwards every part is as it was.

    Not inference mode: a module may keep what it computes (positions, rotations), and train with it later.
    """
    compiled = "torch._dynamo" in sys.modules
    eager = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    with evaluating(module), torch.inference_mode(False), torch.no_grad(), eager:
        yield
