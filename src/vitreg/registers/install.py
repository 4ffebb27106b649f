"""A fix in place: registers inside the user's own module of timm, transformers or open_clip."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vitreg.checkpoints import from_module
from vitreg.checkpoints.modules import named_modules
from vitreg.model import VisionTransformer, ViTConfig
from vitreg.model.block import move_activations
from vitreg.registers.origin import check_plain, check_same

MASKS = ("attention_mask", "attn_mask")
"""What the blocks of the libraries call the mask of attention, whose sides are as long as the sequence."""

BIASES = ("shared_rel_pos_bias", "shared_rel_pos")
"""What they call a bias on attention that all blocks share."""

ROTATIONS = "freqs_ci"
"""What Llama 4 calls the complex numbers that turn each of its tokens."""

OWN_BIASES = ("_get_rel_pos_bias", "get_bias")
"""What timm's modules inside a block call the function that gives its own bias."""

CARRIED_AS = "vitreg_registers"
"""Attribute of the tokens between two blocks under which the registers travel."""


def install_registers(model: nn.Module, fixed: VisionTransformer) -> InstalledRegisters:
    """Put the registers of a fixed model into the module it was made from; everything that runs it then has them.

    Each block gets the registers with its tokens and hands its tokens on without them, so that all outputs, hidden
    states and attention maps have the shapes they had, whoever collects them, and `forward`, `forward_features`,
    `forward_intermediates`, `get_image_features`, heads and pipelines are the module's own. Activations of register
    neurons are moved where they enter the last layer of an MLP. A register that counts several times in attention
    (`ViTConfig.register_weight`) is there as often, which is the same. Registers are never rotated by RoPE, have no
    relative position, and tokens that a mask hides (SigLIP 2 NaFlex) have no say in what is moved. The module's weights
    and its state dict stay as they are; the registers are no parameters of it, and follow its device and precision.

    Install before `torch.compile`. Training with gradient checkpointing works, except timm's and open_clip's with
    `use_reentrant=True`.

    Args:
        model: a model of timm, transformers or open_clip, with any head, or one of transformers that holds one Vision
            Transformer (LLaVA). Its weights up to the last block are those that `fixed` was made from, also in
            another precision.
        fixed: of `add_test_time_registers` or `add_registers`.

    Returns:
        A handle whose `remove()` restores the module exactly; as a context manager it does so at the end.

    Raises:
        ValueError: nothing to install, another model, one that has registers installed, is compiled or quantized.
    """
    fixed = getattr(fixed, "_orig_mod", fixed)
    if isinstance(model, VisionTransformer) or not isinstance(fixed, VisionTransformer):
        raise ValueError(
            f"got a {type(model).__name__} and a {type(fixed).__name__}; give a module of timm, transformers or "
            f"open_clip, and the vitreg model that was made from it with registers"
        )
    if any(
        isinstance(getattr(block.__dict__.get("forward"), "__self__", None), _RegisteredBlock)
        for block in model.modules()
    ):
        raise ValueError("registers are installed in this model already; remove() them first")
    check_plain(model)
    original = from_module(model)
    check_same(original, fixed)
    return InstalledRegisters(named_modules(model), original.config, fixed)


@dataclass(frozen=True)
class _Place:
    """Where in a sequence the registers are.

    Attributes:
        start: tokens before them.
        count: how many there are.
        axis: of the tokens; 0 in open_clip's blocks that take the batch second.
    """

    start: int
    count: int
    axis: int

    def insert(self, x: Tensor, registers: Tensor) -> Tensor:
        before, after = x.tensor_split([self.start], dim=self.axis)
        return torch.cat((before, registers.to(x), after), dim=self.axis)

    def take_out(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The sequence without the registers, and these."""
        before, registers, after = x.tensor_split([self.start, self.start + self.count], dim=self.axis)
        return torch.cat((before, after), dim=self.axis), registers

    def pad(self, bias: Tensor) -> Tensor:
        """A bias for the longer sequence, which is zero from and to registers: they are nowhere."""
        for axis in (-1, -2):
            before, after = bias.tensor_split([self.start], dim=axis)
            nothing = torch.zeros_like(bias.narrow(axis, 0, 1))
            bias = torch.cat((before, *[nothing] * self.count, after), dim=axis)
        return bias

    def widen(self, mask: Tensor) -> Tensor:
        """A mask for the longer sequence: all tokens see the registers, and these see what the first token does."""
        columns = mask.new_ones if mask.dtype == torch.bool or mask.ndim == 2 else mask.new_zeros
        before, after = mask.tensor_split([self.start], dim=-1)
        mask = torch.cat((before, columns(*mask.shape[:-1], self.count), after), dim=-1)
        if mask.ndim == 2 or mask.shape[-2] == 1:
            return mask
        before, after = mask.tensor_split([self.start], dim=-2)
        rows = mask[..., :1, :].expand(*mask.shape[:-2], self.count, -1)
        return torch.cat((before, rows, after), dim=-2)


class _RegisteredBlock:
    """A block's own forward on its tokens and the registers, which nothing outside of it sees.

    It stands in for `forward` instead of being a hook, because hooks of others, transformers' own among them, keep the
    input and the output of blocks. From block to block the registers travel on the tensor of the tokens: so calls in
    several threads and recomputed ones (gradient checkpointing) cannot meet those of another image. Only where a mask
    hides tokens a block keeps which ones for the length of a call, so that then one thread may run it at a time.

    Args:
        block: the module.
        index: its number.
        entering: registers that enter before this block, after those that come from the block before; may be none.
        place: where they are in the sequence.
    """

    def __init__(self, block: nn.Module, index: int, entering: Float[Tensor, "1 R D"], place: _Place) -> None:
        self.index, self.entering, self.place = index, entering, place
        self.original: Callable[..., Any] = block.forward
        parameters = list(inspect.signature(self.original).parameters)
        self.mask = next((name for name in parameters if name in (*MASKS, *BIASES)), None)
        self.mask_position = parameters.index(self.mask) if self.mask else -1
        self.valid: Bool[Tensor, "B T"] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given, name = list(args), next(iter(kwargs)) if not args else ""
        x = given[0] if given else kwargs[name]
        x = self.place.insert(x, self._registers(x))
        if given:
            given[0] = x
        else:
            kwargs[name] = x
        self._widen_mask(given, kwargs)
        output = self.original(*given, **kwargs)
        hidden, registers = self.place.take_out(output[0] if isinstance(output, tuple) else output)
        setattr(hidden, CARRIED_AS, registers)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _registers(self, x: Tensor) -> Tensor:
        """Those that come with the tokens, and those that enter here, the same for every image."""
        axis, num_entering = self.place.axis, self.entering.shape[1]
        shape = [-1, -1, -1]
        shape[1 - axis] = x.shape[1 - axis]
        entering = self.entering.transpose(0, 1 - axis).expand(shape)
        if num_entering == self.place.count:
            return entering
        registers = getattr(x, CARRIED_AS, None)
        if registers is None:
            raise ValueError(
                f"block {self.index} got tokens without the registers that were installed: something between the "
                f"blocks made new ones, such as a hook or gradient checkpointing with use_reentrant=True; leave that "
                f"out, or remove() the registers"
            )
        return torch.cat((registers, entering.to(registers)), dim=axis) if num_entering else registers

    def _widen_mask(self, given: list[Any], kwargs: dict[str, Any]) -> None:
        self.valid = None
        if (turns := kwargs.get(ROTATIONS)) is not None:
            kwargs[ROTATIONS] = replace(self.place, axis=0).insert(
                turns, turns.new_ones(self.place.count, *turns.shape[1:])
            )
        if self.mask is None:
            return
        positional = self.mask_position < len(given)
        mask = given[self.mask_position] if positional else kwargs.get(self.mask)
        if mask is None:
            return
        mask = self.place.widen(mask) if self.mask in MASKS else self.place.pad(mask)
        if positional:
            given[self.mask_position] = mask
        else:
            kwargs[self.mask] = mask
        if self.mask in MASKS:
            row = mask if mask.ndim == 2 else mask[:, 0, 0]
            self.valid = row >= 0 if row.is_floating_point() and mask.ndim > 2 else row.bool()


class _PaddedBias:
    """The bias of a block's own relative positions, for the longer sequence."""

    def __init__(self, original: Callable[[], Tensor], place: _Place) -> None:
        self.original, self.place = original, place

    def __call__(self) -> Tensor:
        return self.place.pad(self.original())


class InstalledRegisters:
    """Registers in a module; `remove()` takes them out. Made by `install_registers`."""

    def __init__(self, modules: dict[str, nn.Module], original: ViTConfig, fixed: VisionTransformer) -> None:
        self._undo: list[Callable[[], None]] = []
        config, own = fixed.config, original.num_registers
        with torch.no_grad():
            entering = fixed.norm_pre(fixed.registers)[:, own:].clone()
        added, test_time = entering.split(
            [config.num_registers - own - config.num_test_time_registers, config.num_test_time_registers], dim=1
        )
        test_time = test_time.repeat(1, config.register_weight, 1)
        place = _Place(original.num_prefix_tokens, 0, axis=int(_batch_first(modules)))
        receivers = slice(place.start + added.shape[1], place.start + added.shape[1] + test_time.shape[1])
        for index in range(config.depth):
            enters = [registers for registers, at in ((added, 0), (test_time, config.register_start)) if at == index]
            entering = torch.cat((test_time[:, :0], *enters), dim=1)
            place = replace(place, count=place.count + entering.shape[1])
            if not place.count:
                continue
            block = modules[f"blocks.{index}"]
            registered = _RegisteredBlock(block, index, entering, place)
            self._set(block, "forward", registered.forward)
            for module in block.modules():
                if isinstance(before := getattr(module, "num_prefix_tokens", None), int):  # timm's, not to be rotated
                    self._set(module, "num_prefix_tokens", before + place.count)
                for name in OWN_BIASES:
                    if (bias := getattr(module, name, None)) is not None:
                        self._set(module, name, _PaddedBias(bias, place))
                if "attention" in type(module).__name__.lower():
                    hook = partial(_strip_attention, place)
                    self._undo.append(module.register_forward_hook(hook, prepend=True).remove)
            if units := [unit for b, unit in config.register_neurons if b == index]:
                last = modules.get(f"blocks.{index}.mlp.fc2", modules.get(f"blocks.{index}.out_proj"))
                assert isinstance(last, nn.Linear)
                offset = last.in_features - config.mlp_dim  # timm's parallel blocks put attention's channels before
                neurons = torch.tensor([offset + unit for unit in units], device=last.weight.device)
                move = _MoveActivations(registered, neurons, receivers, config.signed_units)
                self._undo.append(last.register_forward_pre_hook(move).remove)

    def _set(self, module: nn.Module, name: str, value: Any) -> None:
        had, before = name in vars(module), vars(module).get(name)
        setattr(module, name, value)
        self._undo.append(partial(setattr, module, name, before) if had else partial(delattr, module, name))

    def remove(self) -> None:
        """Restore the module exactly; nothing happens the second time."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> InstalledRegisters:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


class _MoveActivations:
    """Before the last layer of an MLP: moves what register neurons say."""

    def __init__(self, block: _RegisteredBlock, neurons: Tensor, receivers: slice, signed: bool) -> None:
        self.block, self.neurons, self.receivers, self.signed = block, neurons, receivers, signed

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, axis = args[0], self.block.place.axis
        units = x if axis == 1 else x.transpose(0, 1)
        neurons = self.neurons.to(x.device)
        move_activations(units, neurons, self.receivers, signed=self.signed, valid=self.block.valid)
        return (x, *args[1:])


def _strip_attention(place: _Place, module: nn.Module, args: Any, output: Any) -> Any:
    """Attention maps that transformers hands out beside the tokens, without rows and columns of registers."""
    if not (isinstance(output, tuple) and len(output) > 1 and isinstance(output[0], Tensor)):
        return output
    maps, length = output[1], output[0].shape[place.axis]
    if not isinstance(maps, Tensor) or maps.ndim != 4 or maps.shape[-2:] != (length, length):
        return output
    for axis in (-1, -2):
        maps, _ = replace(place, axis=axis).take_out(maps)
    return (output[0], maps, *output[2:])


def _batch_first(modules: dict[str, nn.Module]) -> bool:
    """False for older or explicitly configured open_clip towers, whose blocks take `[tokens, batch, channels]`."""
    attention = modules.get("blocks.0.attn")
    return not isinstance(attention, nn.MultiheadAttention) or attention.batch_first
