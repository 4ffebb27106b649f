"""What is known of a model that is watched by hooks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from vitreg.model.preprocess import Preprocess


@dataclass(frozen=True)
class ObservedConfig:
    """The part of `ViTConfig` that can be seen from outside, and what was assumed to see it.

    Attributes:
        depth: blocks that are watched.
        embed_dim: width of their tokens.
        num_heads: attention heads per block, None where no module of a block says it.
        patch_size: pixels to a side of a patch where the blocks are, that is after any pooling before them.
        class_token: whether the first token that does not depend on the image is taken for one.
        num_registers: the other tokens that do not depend on the image.
        time_steps: patch grids of a video model, one below the other in the grid of a trace.
        preprocess: how images become the module's input.
        name: where the weights come from.
        architecture: the module's class.
        changes: always empty.
        assumed: what was found, and what was taken for granted, in a sentence.
        no_attention: why no attention is recorded; empty where it is.
    """

    depth: int
    embed_dim: int
    num_heads: int | None
    patch_size: int
    class_token: bool
    num_registers: int
    preprocess: Preprocess
    name: str
    architecture: str
    time_steps: int = 1
    changes: tuple[str, ...] = ()
    assumed: str = field(default="", compare=False)
    no_attention: str = ""

    num_attention_copies: ClassVar[int] = 0
    num_summary_tokens: ClassVar[int] = 0
    num_test_time_registers: ClassVar[int] = 0
    test_time_registers: ClassVar[slice] = slice(0)

    def num_waiting(self, block: int) -> int:
        """As `ViTConfig.num_waiting`: an observed module has no test-time registers."""
        return 0

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the first patch, in the order of a trace."""
        return int(self.class_token) + self.num_registers
