"""The fix: registers for a pretrained Vision Transformer, untrained or trainable."""

from vitreg.registers.baked import bake_registers
from vitreg.registers.distilled import distill_registers
from vitreg.registers.export import Exported, export
from vitreg.registers.insertion import is_changed
from vitreg.registers.install import InstalledRegisters, install_registers
from vitreg.registers.neurons import RegisterNeuron, find_register_neurons
from vitreg.registers.prefix import add_prefix
from vitreg.registers.publish import push_to_hub, save_repository
from vitreg.registers.repaired import SingularDefect, repair_singular_defects, singular_defects
from vitreg.registers.trainable import add_registers
from vitreg.registers.training_free import add_test_time_registers

__all__ = [
    "Exported",
    "InstalledRegisters",
    "RegisterNeuron",
    "SingularDefect",
    "add_prefix",
    "add_registers",
    "add_test_time_registers",
    "bake_registers",
    "distill_registers",
    "export",
    "find_register_neurons",
    "install_registers",
    "is_changed",
    "push_to_hub",
    "repair_singular_defects",
    "save_repository",
    "singular_defects",
]
