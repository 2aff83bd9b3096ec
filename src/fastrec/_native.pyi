"""Compiled CPU kernels of fastrec (csrc/cpu/module.cpp). Addresses are integers."""

from typing import ClassVar

def isa_names() -> list[str]: ...
def isa_target(name: str) -> str: ...
def active_isa() -> str: ...
def machine_has(name: str) -> bool: ...
def force_isa(name: str) -> bool: ...
def supports(
    *,
    target: str,
    max_leaf: int,
    leaf1_ecx: int,
    leaf7_ebx: int,
    leaf7_ecx: int,
    leaf7_1_eax: int,
    xcr0: int,
) -> bool: ...
def cpu_words() -> dict[str, int]: ...
def num_threads() -> int: ...
def set_num_threads(threads: int) -> None: ...
def exchange_call_threads(threads: int) -> int: ...
def follow_threads(address: int) -> None: ...
def max_threads() -> int: ...
def fma_peak_gflops(seconds: float) -> float: ...
def bf16_peak_gflops(seconds: float) -> float: ...
def vpdpbusd_peak_gops(seconds: float) -> float: ...
def read_bandwidth_gbs(buffer_bytes: int, seconds: float) -> float: ...

class engine:
    MAX_SYMBOLS: int
    MAX_DIMS: int
    MAX_OPERANDS: int
    MAX_REGISTERS: int
    MAP_OPS: list[str]
    EVERYTHING: int
    FILE_VERSION: int
    KINDS: list[dict[str, object]]

    class Engine:
        header: str
        constants: list[object]
        @staticmethod
        def build(header: str, constants: list[object]) -> engine.Engine: ...
        @staticmethod
        def open(path: str, copy: bool) -> engine.Engine: ...
        def __call__(self, inputs: tuple[object, ...], threads: int) -> object: ...
        def plan(self) -> str: ...
        def profile(
            self, inputs: tuple[object, ...], calls: int, threads: int
        ) -> list[dict[str, object]] | None: ...
        def split(self, candidates: list[int], appendable: bool) -> engine.SplitExecutors: ...

    class SplitExecutors:
        history: list[int]
        candidates: list[int]
        events: list[int]
        programs: list[str]
        scores: bool
        appends: bool
        def encode(self, history: tuple[object, ...], threads: int) -> engine.UserState | None: ...
        def append(
            self, state: engine.UserState, events: tuple[object, ...], threads: int
        ) -> engine.UserState | None: ...
        def score(
            self, state: engine.UserState, candidates: tuple[object, ...], threads: int
        ) -> object: ...
        def sizes(self, state: engine.UserState) -> dict[str, int]: ...

    class UserState:
        values: list[object]
        lengths: list[int]
        nbytes: int

class grouped_linear:
    @staticmethod
    def kernel_isa(bf16: bool = False) -> str: ...
    @staticmethod
    def forward(
        x: int,
        x_row: int,
        weight: int,
        bias: int,
        y: int,
        bf16: bool,
        shuffle: bool,
        rows: int,
        groups: int,
        outputs: int,
        inputs: int,
    ) -> None: ...
    @staticmethod
    def backward(
        dy: int,
        dy_row: int,
        x: int,
        x_row: int,
        weight: int,
        dx: int,
        dweight: int,
        dbias: int,
        bf16: bool,
        shuffle: bool,
        rows: int,
        groups: int,
        outputs: int,
        inputs: int,
        wants_x: bool,
        wants_weight: bool,
    ) -> None: ...

class int8_embedding:
    @staticmethod
    def kernel_isa() -> str: ...
    @staticmethod
    def run(
        ids: int, table: int, scale: int, out: int, count: int, rows: int, dims: int
    ) -> int: ...

class activation_quantize:
    @staticmethod
    def kernel_isa() -> str: ...
    @staticmethod
    def run(
        x: int,
        x_type: int,
        x_scale: int,
        bias: int,
        activation: int,
        y: int,
        y_type: int,
        scale: float,
        zero_point: int,
        count: int,
        channels: int,
    ) -> bool: ...

class layer_norm_quantize:
    @staticmethod
    def kernel_isa() -> str: ...
    @staticmethod
    def run(
        x: int,
        residual: int,
        weight: int,
        bias: int,
        sum: int,
        y: int,
        y_u8: bool,
        scale: float,
        zero_point: int,
        eps: float,
        rows: int,
        dims: int,
    ) -> bool: ...

class padded_attention:
    @staticmethod
    def kernel_isa() -> str: ...
    @staticmethod
    def run(
        q: int,
        q_batch: int,
        q_head: int,
        q_row: int,
        k: int,
        k_batch: int,
        k_head: int,
        k_row: int,
        v: int,
        v_batch: int,
        v_head: int,
        v_row: int,
        out: int,
        lengths: int,
        batch: int,
        query_rows: int,
        key_rows: int,
        heads: int,
        head_dim: int,
        scale: float,
    ) -> int: ...

class pointwise_attention:
    MAX_DIMS: ClassVar[int]
    MAX_BUCKETS: ClassVar[int]
    @staticmethod
    def kernel_isa() -> str: ...
    @staticmethod
    def forward(
        shape: tuple[int, ...],
        bias: tuple[int, ...],
        scale: float,
        inverse_norm: float,
        causal: bool,
        q: View,
        k: View,
        v: View,
        out: View,
    ) -> tuple[int, int]: ...
    @staticmethod
    def backward(
        shape: tuple[int, ...],
        bias: tuple[int, ...],
        scale: float,
        inverse_norm: float,
        causal: bool,
        q: View,
        k: View,
        v: View,
        d_out: View,
        dq: View,
        dk: View,
        dv: View,
        d_position: int,
        d_time: int,
    ) -> tuple[int, int]: ...

class pointwise_attention_int8:
    @staticmethod
    def kernel_isa() -> str: ...
    @staticmethod
    def forward(
        shape: tuple[int, ...],
        bias: tuple[int, ...],
        score_scale: float,
        out_scale: float,
        causal: bool,
        q: View,
        k: View,
        v: View,
        out: View,
    ) -> tuple[int, int]: ...

class separable_projection:
    MAX_WIDTH: ClassVar[int]
    @staticmethod
    def kernel_isa() -> str: ...
    @staticmethod
    def forward(
        x: int,
        x_batch: int,
        x_row: int,
        depthwise: int,
        pointwise: int,
        bias: int,
        y: int,
        bf16: bool,
        lengths: int,
        batch: int,
        length: int,
        channels: int,
        width: int,
        before: int,
        groups: int,
        outputs: int,
    ) -> int: ...
    @staticmethod
    def backward(
        dy: int,
        x: int,
        x_batch: int,
        x_row: int,
        depthwise: int,
        pointwise: int,
        h: int,
        dh: int,
        dx: int,
        ddepthwise: int,
        dpointwise: int,
        dbias: int,
        bf16: bool,
        lengths: int,
        batch: int,
        length: int,
        channels: int,
        width: int,
        before: int,
        groups: int,
        outputs: int,
    ) -> None: ...

class sparse_int8_linear:
    MAX_INPUTS: ClassVar[int]
    MAX_TILE_ROWS: ClassVar[int]
    @staticmethod
    def kernel_isa() -> str: ...
    class Prepared:
        def __init__(
            self,
            values: int,
            group_index: int,
            panel_start: int,
            scale: int,
            sum: int,
            bias: int,
            outputs: int,
            inputs: int,
            x_scale: float,
            x_zero_point: int,
            activation: int,
            y_dtype: int,
            y_scale: float,
            y_zero_point: int,
        ) -> None: ...
        def run(self, x: int, x_dtype: int, elements: int, y: int) -> bool: ...

View = tuple[int, int, int, int]
"""Address, and strides of batch, head and row in elements."""

class window_sparse_attention:
    MAX_DIMS: ClassVar[int]
    @staticmethod
    def kernel_isa() -> str: ...

    class Pattern:
        def __init__(self, window: int, causal: bool, distances: list[tuple[int, ...]]) -> None: ...
        def forward(
            self,
            scale: float,
            shape: tuple[int, int, int, int, int, int, int],
            q: View,
            k: View,
            v: View,
            out: View,
            lse: View,
        ) -> int: ...
        def backward(
            self,
            scale: float,
            shape: tuple[int, int, int, int, int, int, int],
            q: View,
            k: View,
            v: View,
            out: View,
            lse: View,
            d_out: View,
            d_lse: View,
            dq: View,
            dk: View,
            dv: View,
            delta: View,
        ) -> int: ...

class window_sparse_attention_int8:
    MAX_KEYS: ClassVar[int]
    MAX_DIMS: ClassVar[int]
    NOT_FINITE: ClassVar[int]
    BAD_SCALE: ClassVar[int]
    @staticmethod
    def kernel_isa() -> str: ...
    @staticmethod
    def run(
        q: tuple[int, int, int, int],
        q_u8: bool,
        q_zero_point: int,
        k: tuple[int, int, int, int],
        v: tuple[int, int, int, int],
        v_f32: bool,
        v_scale: int,
        exponent_scale: float,
        out: tuple[int, int, int, int],
        out_u8: bool,
        out_scale: float,
        out_zero_point: int,
        lengths: int,
        cu_seqlens: int,
        window: int,
        causal: bool,
        distances: int,
        starts: int,
        batch: int,
        heads: int,
        length: int,
        dims: int,
    ) -> int: ...

Map = tuple[int, int, int, int, int]
"""Address, strides of batch, head and row in floats, and dims."""

class attention_map_kl:
    @staticmethod
    def kernel_isa() -> str: ...
    @staticmethod
    def run(
        teacher_q: Map,
        teacher_k: Map,
        student_q: Map,
        student_k: Map,
        teacher_scale: float,
        student_scale: float,
        teacher_causal: bool,
        kl: int,
        dq: int,
        dk: int,
        lengths: int,
        window: int,
        causal: bool,
        distances: int,
        starts: int,
        batch: int,
        heads: int,
        length: int,
    ) -> int: ...
