"""The passes that every executor needs: one step a layer, without copies."""

from __future__ import annotations

from fastrec.runtime.native.passes.fold_scales import fold_scales
from fastrec.runtime.native.passes.fuse_activations import fuse_activations
from fastrec.runtime.native.passes.fuse_maps import fuse_maps
from fastrec.runtime.native.passes.name_functions import name_functions
from fastrec.runtime.native.passes.remove_copies import remove_copies
from fastrec.runtime.native.passes.remove_unused import remove_unused
from fastrec.runtime.native.program import Program


def simplify(program: Program) -> None:
    """Run the passes in order."""
    remove_unused(program)
    remove_copies(program)
    remove_unused(program)
    fold_scales(program)
    fuse_maps(program)
    name_functions(program)
    fuse_activations(program)
