"""A behaviour-sequence transformer in plain torch, compiled into one native call.

python examples/plain_bst.py
python examples/plain_bst.py --compare [--batch 1] [--threads 2] [--length 20] [--d 32]
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import fastrec


class PlainBst(nn.Module):
    """History and target item through a transformer encoder, pooled, then an MLP; id 0 pads."""

    def __init__(self, n_items: int = 1000, length: int = 20, d: int = 32) -> None:
        super().__init__()
        self.items = nn.Embedding(n_items, d)
        self.positions = nn.Parameter(torch.randn(length + 1, d) * 0.02)
        layer = nn.TransformerEncoderLayer(
            d, 4, 4 * d, dropout=0.0, batch_first=True, norm_first=True, activation="gelu"
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.Linear(2 * d, 128), nn.ReLU(), nn.Linear(128, 1))

    def forward(self, history: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """history [B, L] and target [B] (ids) to scores [B]."""
        sequence = torch.cat([history, target.unsqueeze(1)], dim=1)
        x = self.items(sequence) + self.positions
        x = self.encoder(x, src_key_padding_mask=sequence == 0)
        return self.head(torch.cat([x.mean(1), x[:, -1]], dim=-1)).squeeze(-1)


def example_inputs(batch: int = 8, n_items: int = 1000, length: int = 20) -> list[torch.Tensor]:
    """Random histories of random lengths, padded in front, and targets."""
    history = torch.randint(1, n_items, (batch, length))
    start = torch.randint(0, length, (batch, 1))
    history[torch.arange(length) < start] = 0
    return [history, torch.randint(1, n_items, (batch,))]


def compare(batch: int, threads: int, length: int, d: int) -> None:
    """Times beside torch's, call by call in turn, on the same requests; torch.compile with frozen
    weights and static shapes, its best settings here."""
    from fastrec.measure.timing import interleaved, ratio

    torch.manual_seed(0)
    torch.set_num_threads(threads)
    model = PlainBst(length=length, d=d).eval()
    requests = [tuple(example_inputs(batch, length=length)) for _ in range(16)]
    settings = {"executor": "plan"}
    engine = fastrec.compile(
        model, requests[0], backend="native", threads=threads, settings=settings
    )
    compiled = torch.compile(model, dynamic=False, options={"freezing": True})
    with torch.no_grad():
        for request in requests:
            torch.testing.assert_close(engine(*request), model(*request), rtol=1e-4, atol=1e-5)
        calls = {"fastrec": engine, "torch.compile": compiled, "torch eager": model}
        taken = interleaved(calls, requests, rounds=30, calls=200, warm_s=0.005)
    print(f"B={batch}, L={length}, d={d}, fp32, {threads} threads, median in microseconds:")
    for name, samples in taken.items():
        gain = ratio(samples, taken["fastrec"])
        times = f"{samples.p50_ms * 1e3:8.1f} (p99 {samples.p99_ms * 1e3:.1f})"
        print(f"{name:14}{times}  {gain.value:.2f}x fastrec's ({gain.low:.2f}..{gain.high:.2f})")


def main() -> None:
    """Compile, compare with torch, then the same quantised; or with ``--compare`` the times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compare", action="store_true", help="times beside torch.compile's")
    for name, default in (("batch", 1), ("threads", 2), ("length", 20), ("d", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if args.compare:
        compare(args.batch, args.threads, args.length, args.d)
        return
    model, inputs = PlainBst().eval(), example_inputs()
    for name in ("fp32", "int8"):
        if name == "int8":
            fastrec.quantize_(model, fastrec.Int8(), calibration=[inputs])
        engine = fastrec.compile(model, inputs, backend="native", settings={"executor": "plan"})
        with torch.inference_mode():
            error = float((engine(*inputs) - model(*inputs)).abs().max())
        print(f"{name}: largest difference from torch {error:.2g}")


if __name__ == "__main__":
    main()
