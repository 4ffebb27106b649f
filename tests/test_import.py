"""`import vitreg` leaves the process as it found it, and needs no library that it does not use."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"
SOURCES = sorted((SOURCE / "vitreg").rglob("*.py"))
MODULES = {".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES}

EVERY_MODULE = """
def import_everything():
    import importlib, pkgutil, vitreg
    for module in pkgutil.walk_packages(vitreg.__path__, "vitreg."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in vitreg.__all__:
        getattr(vitreg, name)
"""

RECIPES = ("clip", "distill", "deit3", "dinov2", "multi_crop")


def run(code: str) -> str:
    """What a process of its own prints."""
    code = EVERY_MODULE + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_leaves_the_process_as_it_was():
    """Importing ignored Pillow's warnings for all users of Pillow."""
    run(
        """
        import gc, locale, logging, multiprocessing, os, random, signal, socket, sys, threading, warnings
        import jinja2, matplotlib, matplotlib.pyplot, numpy, PIL.Image, PIL.ImageFile, safetensors.torch
        import scipy.ndimage, scipy.optimize, scipy.sparse.linalg, scipy.special
        import rich.console, timm, torch, torchvision, tyro
        import torch.distributed.checkpoint.state_dict, torch.distributed.fsdp, torch.utils.tensorboard

        loggers = [one for one in logging.Logger.manager.loggerDict.values() if isinstance(one, logging.Logger)]

        def state():
            return {
                "warnings": list(warnings.filters),
                "pixels": (PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES),
                "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
                "running": [thread.name for thread in threading.enumerate()],
                "dtype": (torch.get_default_dtype(), torch.get_default_device()),
                "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
                "precision": (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32),
                "deterministic": torch.are_deterministic_algorithms_enabled(),
                "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32),
                "sharing": torch.multiprocessing.get_sharing_strategy(),
                "random": (torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())),
                "numpy": (numpy.geterr(), numpy.get_printoptions()),
                "levels": (logging.root.level, logging.root.manager.disable, list(logging.root.handlers)),
                "loggers": [(logger.level, list(logger.handlers), logger.propagate) for logger in loggers],
                "environment": dict(os.environ),
                "place": (os.getcwd(), list(sys.path), locale.setlocale(locale.LC_ALL)),
                "signals": {n: signal.getsignal(n) for n in signal.valid_signals()},
                "hooks": (sys.excepthook, sys.displayhook, threading.excepthook),
                "limits": (sys.getrecursionlimit(), gc.get_threshold(), gc.isenabled(), socket.getdefaulttimeout()),
                "processes": multiprocessing.get_start_method(allow_none=True),
                "figures": (matplotlib.get_backend(), dict(matplotlib.rcParams), matplotlib.pyplot.get_fignums()),
            }

        before = state()
        import_everything()
        after = state()
        changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
        assert not changed, changed
        """
    )


def test_nothing_private_of_torch_is_needed_to_import():
    """A private function that was renamed would have broken the import."""
    run(
        """
        import torch
        for name in [name for name in vars(torch.cpu) if name.startswith("_is_")]:
            delattr(torch.cpu, name)
        import_everything()
        """
    )


def test_no_private_name_of_another_library_is_read():
    private = []
    for file in SOURCES:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(("vitreg", "__future__")):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                private += [f"{file.name}: {name}" for name in names if name.startswith("_")]
            elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                root = node.value
                while isinstance(root, ast.Attribute):
                    root = root.value
                if isinstance(root, ast.Name) and root.id in ("torch", "timm", "dist", "F", "nn", "Image", "np"):
                    private.append(f"{file.name}: {ast.unparse(node)}")
    assert not private, private


BLOCKED = ("tyro", "rich", "lightly", "open_clip", "transformers", "tensorboard", "pyarrow", "sklearn")


def test_importing_and_using_vitreg_needs_no_optional_library():
    """Machines with a GPU often have PyTorch and timm only. What draws is loaded where something is drawn."""
    run(
        f"""
        import importlib.machinery
        import sys

        class Without(importlib.machinery.PathFinder):
            @classmethod
            def find_spec(cls, name, path=None, target=None):
                return None if name.partition(".")[0] in {BLOCKED} else super().find_spec(name, path, target)

        sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Without
        import tempfile
        import torch
        import vitreg

        for name in vitreg.__all__:
            getattr(vitreg, name)
        import vitreg.probes, vitreg.training
        vit = vitreg.load("vitreg_tiny")
        images = torch.randn(2, 3, 64, 64)
        vit(images)
        vit.trace(images, facets=("keys",))
        vitreg.add_registers(vit, 2)
        vitreg.diagnose(vit, images)
        vitreg.compare(vit, vitreg.load("vitreg_tiny_reg4"), images)
        vitreg.discover_objects(vit, images)
        with tempfile.TemporaryDirectory() as folder:
            vitreg.save(vit, folder + "/model.safetensors")
            vitreg.load(folder + "/model.safetensors")
        assert not {{"matplotlib.pyplot", "tyro", "rich"}} & set(sys.modules)
        """
    )


def imported_by(path: Path) -> Iterator[str]:
    """The modules of vitreg that a module imports: at the top, in functions, and for types only."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            yield from submodules or {node.module}


def test_no_module_imports_what_imports_it():
    """`artifacts/comparison.py` and `outcome.py` did, the one for types only."""
    graph = {name: set(imported_by(path)) for name, path in MODULES.items()}
    assert len(graph) > 100
    # The one exception: a recipe's config is read without PyTorch, and imports the method when it builds it.
    graph["vitreg.training.recipes.configs"] -= {f"vitreg.training.recipes.{name}" for name in RECIPES}
    TopologicalSorter(graph).prepare()  # graphlib.CycleError names the circle
