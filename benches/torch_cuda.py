"""Times MLPs by PyTorch on a CUDA GPU, for the columns beside this crate's: rows of docs/data/cuda.csv on standard output.

    python benches/torch_cuda.py --tokens 1,8,64 >> docs/data/cuda.csv
    python benches/torch_cuda.py --tokens 1,64,4096 --shapes swiglu-4096x14336 --compile swiglu-4096x14336 --limit 120

The figure is the time of one layer in microseconds. A stack of layers, each with weights of its own and together more than
four times the second-level cache, is walked through, so that weights come from memory. Weights and inputs are random
normal. The median of five runs of about 5 ms, timed by events on the stream.

Paths: torch_graph is eager code in a CUDA graph, torch_compile compiled code in a CUDA graph (for the shapes that --compile
names: compiling takes half a minute a shape), torch_eager (with --eager) eager code in a host loop, floor the larger of the
weights' bytes over the bandwidth measured in the same run and the operations over the measured rate of a large product.
swiglu has no bias and SiLU; mlp has biases and erf GELU. On a GPU without room for a shape, it is left out and named on the
error stream. When --limit seconds have passed, no further shape is begun.
"""

import argparse
import datetime
import math
import statistics
import sys
import time

import torch
from torch.nn import functional

SHAPES = {
    f"{op}-{hidden}x{intermediate}": (op, hidden, intermediate)
    for op, hidden, intermediate in [
        ("swiglu", 576, 1536),
        ("swiglu", 2048, 5632),
        ("swiglu", 2048, 8192),
        ("swiglu", 4096, 14336),
        ("swiglu", 8192, 28672),
        ("mlp", 768, 3072),
        ("mlp", 1280, 5120),
        ("mlp", 4096, 4096),
    ]
}
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def swiglu(xs, gate, up, down):
    return functional.linear(functional.silu(functional.linear(xs, gate)) * functional.linear(xs, up), down)


def mlp(xs, fc1, fc1_bias, fc2, fc2_bias):
    return functional.linear(functional.gelu(functional.linear(xs, fc1, fc1_bias)), fc2, fc2_bias)


def stack_of(op, hidden, intermediate, dtype, cache_bytes):
    """What computes a layer, the layers' weights, more than four times `cache_bytes`, and the bytes of a layer's."""

    def normal(*shape):
        # Keeps a unit variance; biases are small.
        return torch.randn(*shape, device="cuda", dtype=dtype) * shape[-1] ** -0.5

    def layer():
        if op == "swiglu":
            return [normal(intermediate, hidden), normal(intermediate, hidden), normal(hidden, intermediate)]
        return [normal(intermediate, hidden), normal(intermediate), normal(hidden, intermediate), normal(hidden)]

    layer_bytes = (3 if op == "swiglu" else 2) * hidden * intermediate * dtype.itemsize
    layers = [layer() for _ in range(4 * cache_bytes // layer_bytes + 1)]
    return {"swiglu": swiglu, "mlp": mlp}[op], layers, layer_bytes


def walk(function, layers, xs):
    """Each layer reads what the one before wrote; every fourth the first x again, so that values stay in range."""
    ys = xs
    for number, weights in enumerate(layers):
        ys = function(xs if number % 4 == 0 else ys, *weights)
    return ys


def timed(run):
    """Median seconds of `run` on the GPU."""

    def seconds(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats

    run()
    repeats = max(1, math.ceil(5e-3 / max(seconds(1), 1e-6)))
    return statistics.median(seconds(repeats) for _ in range(5))


def in_graph(run):
    """A replay of what `run` launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def bandwidth():
    """Bytes a second that a sum over 4 GiB reads."""
    values = torch.ones(1 << 30, dtype=torch.float32, device="cuda")
    return values.nbytes / timed(lambda: values.sum())


def product_rate(dtype):
    """Operations a second of a large square product."""
    size = 8192 if dtype.itemsize == 2 else 4096
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * size**3 / timed(lambda: a @ b)


def listed(known):
    """Reads a list of names, each one of `known`."""

    def read(text):
        for name in text.split(","):
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name}: expected one of {', '.join(known)}")
        return text.split(",")

    return read


def numbers(text):
    """Reads a list of positive numbers."""
    found = [int(number) for number in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"expected positive numbers, found {text}")
    return found


def main():
    parser = argparse.ArgumentParser(description="Times MLPs by PyTorch on a CUDA GPU, as rows of docs/data/cuda.csv.")
    parser.add_argument("--tokens", required=True, type=numbers, help="numbers of tokens, as 1,8,64")
    parser.add_argument("--shapes", default=list(SHAPES), type=listed(SHAPES), help="as swiglu-576x1536,mlp-768x3072")
    parser.add_argument("--compile", default=[], type=listed(SHAPES), help="shapes to time with torch.compile as well")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--eager", action="store_true", help="time eager code in a host loop as well")
    parser.add_argument("--limit", type=float, default=300, help="seconds after which no further shape is begun")
    parser.add_argument("--header", action="store_true", help="print the columns' names first")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device")

    begun = time.monotonic()
    # candle multiplies f32 without TF32.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    dtype = DTYPES[options.dtype]
    device = torch.cuda.get_device_properties(0)
    read, rate = bandwidth(), product_rate(dtype)
    torch.cuda.empty_cache()
    print(f"{device.name}, torch {torch.__version__}: {read / 1e12:.3f} TB/s, {rate / 1e12:.1f} TFLOP/s", file=sys.stderr)
    if options.header:
        print("machine,date,op,hidden,intermediate,dtype,tokens,path,us")

    def measure(name):
        op, hidden, intermediate = SHAPES[name]
        function, layers, layer_bytes = stack_of(op, hidden, intermediate, dtype, device.L2_cache_size)

        def row(path, tokens, seconds):
            place = f"{device.name},{datetime.date.today()},{op},{hidden},{intermediate},{options.dtype}"
            print(f"{place},{tokens},{path},{1e6 * seconds:.2f}", flush=True)

        for tokens in options.tokens:
            xs = torch.randn(tokens, hidden, device="cuda", dtype=dtype)
            operations = 2 * tokens * layer_bytes / dtype.itemsize
            row("floor", tokens, max(layer_bytes / read, operations / rate))
            if options.eager:
                row("torch_eager", tokens, timed(lambda: walk(function, layers, xs)) / len(layers))
            row("torch_graph", tokens, timed(in_graph(lambda: walk(function, layers, xs))) / len(layers))
            if name in options.compile:
                # Anew for each number of tokens: else it would be compiled for any number, and slower.
                torch.compiler.reset()
                compiled = torch.compile(function, dynamic=False)
                row("torch_compile", tokens, timed(in_graph(lambda: walk(compiled, layers, xs))) / len(layers))

    for name in options.shapes:
        if time.monotonic() - begun > options.limit:
            print(f"not begun within {options.limit} s: {name}", file=sys.stderr)
            continue
        try:
            with torch.no_grad():
                measure(name)
        except torch.OutOfMemoryError:
            print(f"no room for {name}", file=sys.stderr)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
