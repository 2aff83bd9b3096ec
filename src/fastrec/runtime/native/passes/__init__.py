"""Passes make a program fast: each is a function that changes it in place, in a file of its own."""

from __future__ import annotations

from fastrec.runtime.native.passes.fuse_residuals import fuse_residuals
from fastrec.runtime.native.passes.keep_tiles import keep_tiles
from fastrec.runtime.native.passes.merge_linears import merge_linears
from fastrec.runtime.native.passes.order_by_rows import order_by_rows
from fastrec.runtime.native.passes.quantise_norms import quantise_norms
from fastrec.runtime.native.passes.remove_unused import remove_unused
from fastrec.runtime.native.passes.simplify import simplify
from fastrec.runtime.native.passes.write_in_place import write_in_place
from fastrec.runtime.native.program import Program

__all__ = ["optimise", "simplify"]


def optimise(program: Program) -> None:
    """Run all passes; each sees what the ones before have freed."""
    simplify(program)
    fuse_residuals(program)
    merge_linears(program)  # whose results are read in slices
    quantise_norms(program)
    write_in_place(program)
    keep_tiles(program)
    remove_unused(program)
    order_by_rows(program)
