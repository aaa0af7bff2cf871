"""Build hook: compile the sparse kernel if there is a C++ compiler; otherwise build the wheel without it."""

import runpy
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNEL = "layerwise/sparse/kernel.so"


class SparseKernelHook(BuildHookInterface):
    """Hook that hatchling calls for every wheel, including those of editable installations."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the kernel to the wheel, and mark the wheel as one for this platform."""
        # Run by its path: the package may not be importable where its wheel is built.
        build = runpy.run_path(str(Path(self.root, "layerwise/sparse/build.py")))
        library = Path(self.root, KERNEL)
        try:
            build["compile_kernel"](library)
        except build["NoKernel"] as reason:
            library.unlink(missing_ok=True)  # of an earlier build, possibly from other sources
            self.app.display_warning(f"layerwise without its sparse kernel: {reason}")
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        build_data["artifacts"].append(KERNEL)  # git ignores it, which would leave it out
