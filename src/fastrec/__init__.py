"""fastrec: custom-kernel acceleration for real-time sequential recommenders.

``import fastrec`` is light: it loads neither torch nor the compiled kernels, and has no side
effect. The names below are resolved on first use (PEP 562).
"""

from fastrec.lazy import attach

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        ".compress": (
            "BlockPruning",
            "Grouped",
            "HiddenStates",
            "Int8",
            "LowRank",
            "NMPruning",
            "QAT",
            "Recipe",
            "WindowSparse",
            "distill",
            "load",
            "prune_",
            "quantize_",
            "replace_",
            "save",
            "sensitivity",
            "student",
        ),
        ".exporters": ("export",),
        ".kernels.window_sparse_attention.pattern": ("AttentionPattern",),
        ".runtime": ("compile",),
        ".search": ("Budget", "accelerate", "autotune"),
    },
    (
        "compress",
        "data",
        "errors",
        "exporters",
        "kernels",
        "measure",
        "models",
        "nn",
        "report",
        "runtime",
        "search",
        "serving",
        "train",
    ),
)
__all__ += ["__version__"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from fastrec import (
        compress,
        data,
        errors,
        exporters,
        kernels,
        measure,
        models,
        nn,
        report,
        runtime,
        search,
        serving,
        train,
    )
    from fastrec.compress import (
        QAT,
        BlockPruning,
        Grouped,
        HiddenStates,
        Int8,
        LowRank,
        NMPruning,
        Recipe,
        WindowSparse,
        distill,
        load,
        prune_,
        quantize_,
        replace_,
        save,
        sensitivity,
        student,
    )
    from fastrec.exporters import export
    from fastrec.kernels.window_sparse_attention.pattern import AttentionPattern
    from fastrec.runtime import compile
    from fastrec.search import Budget, accelerate, autotune
