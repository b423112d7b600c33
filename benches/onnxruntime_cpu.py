"""Times onnxruntime's CPU path on the shapes of `benches/cpu.rs`, in f32.

    python -m venv venv && venv/bin/pip install onnx onnxruntime
    venv/bin/python benches/onnxruntime_cpu.py                                  # a markdown table
    venv/bin/python benches/onnxruntime_cpu.py --json                           # one object a line
    venv/bin/python benches/onnxruntime_cpu.py --shapes swiglu:2048x5632 --tokens 1,8

One figure is the time of one MLP in a stack of them, all with weights of their own and together more than four times
the last-level cache, so that every layer's weights come from memory as they do in a model. The stack is one ONNX
model: each layer takes the output of the one before. A figure is the median over `--runs` runs of the stack, divided
by its layers. Weights are initializers, which onnxruntime packs when it loads the model.
"""

import argparse
import json
import os
import pathlib
import statistics
import tempfile
import time

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

SHAPES = "swiglu:576x1536,swiglu:2048x5632,swiglu:4096x14336,mlp:768x3072,mlp:4096x4096"


def last_level_cache():
    """Bytes of the largest cache that Linux lists; 32 MiB where it lists none."""
    sizes = []
    for path in pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]])
    return max(sizes, default=32 << 20)


class Stack:
    """Builds a model of several MLPs, one after the other."""

    def __init__(self, op, hidden, intermediate, layers):
        self.op, self.hidden, self.intermediate = op, hidden, intermediate
        self.random = np.random.default_rng(0)
        self.nodes, self.weights = [], []
        value = "x"
        for layer in range(layers):
            value = (self.swiglu if op == "swiglu" else self.mlp)(f"l{layer}.", value)
        dims = ["tokens", hidden]
        graph = helper.make_graph(
            self.nodes,
            "stack",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)],
            [helper.make_tensor_value_info(value, TensorProto.FLOAT, dims)],
            self.weights,
        )
        self.model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
        self.model.ir_version = min(self.model.ir_version, 10)

    def tensor(self, name, *dims):
        values = self.random.standard_normal(dims, dtype=np.float32) * np.float32(dims[0] ** -0.5)
        self.weights.append(onnx.numpy_helper.from_array(values, name))
        return name

    def node(self, kind, inputs, output, **attributes):
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def swiglu(self, name, x):
        gate = self.node("MatMul", [x, self.tensor(name + "gate", self.hidden, self.intermediate)], name + "g")
        up = self.node("MatMul", [x, self.tensor(name + "up", self.hidden, self.intermediate)], name + "u")
        sigmoid = self.node("Sigmoid", [gate], name + "s")
        silu = self.node("Mul", [gate, sigmoid], name + "a")
        hidden = self.node("Mul", [silu, up], name + "h")
        return self.node("MatMul", [hidden, self.tensor(name + "down", self.intermediate, self.hidden)], name + "y")

    def mlp(self, name, x):
        fc1 = [self.tensor(name + "fc1", self.hidden, self.intermediate), self.tensor(name + "b1", self.intermediate)]
        hidden = self.node("Gelu", [self.node("Gemm", [x, *fc1], name + "f")], name + "h")
        fc2 = [self.tensor(name + "fc2", self.intermediate, self.hidden), self.tensor(name + "b2", self.hidden)]
        return self.node("Gemm", [hidden, *fc2], name + "y")


def measure(op, hidden, intermediate, tokens, threads, runs):
    """One row for each number of tokens."""
    layer_bytes = 4 * hidden * intermediate * (3 if op == "swiglu" else 2)
    layers = 4 * last_level_cache() // layer_bytes + 1
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        # A file, since a serialised message must stay below 2 GiB.
        path = os.path.join(folder, "stack.onnx")
        onnx.save_model(Stack(op, hidden, intermediate, layers).model, path, save_as_external_data=True)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(1)
    for count in tokens:
        feed = {"x": random.standard_normal((count, hidden), dtype=np.float32)}
        for _ in range(2):
            session.run(None, feed)
        times = []
        for _ in range(runs):
            start = time.perf_counter()
            session.run(None, feed)
            times.append((time.perf_counter() - start) / layers)
        yield {
            "op": op,
            "dtype": "f32",
            "hidden": hidden,
            "intermediate": intermediate,
            "tokens": count,
            "layers": layers,
            "threads": threads,
            "onnxruntime": onnxruntime.__version__,
            "onnxruntime_us": round(1e6 * statistics.median(times), 1),
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help="op:hiddenxintermediate, separated by commas")
    parser.add_argument("--tokens", default="1,8,64,512")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="intra-op threads")
    parser.add_argument("--runs", type=int, default=9, help="runs of the stack, of which the median counts")
    parser.add_argument("--json", action="store_true", help="one JSON object a line in place of the table")
    arguments = parser.parse_args()
    if not arguments.json:
        print("| MLP | tokens | onnxruntime f32, us |\n|---|---:|---:|")
    tokens = [int(count) for count in arguments.tokens.split(",")]
    for shape in arguments.shapes.split(","):
        op, sizes = shape.split(":")
        if op not in ("swiglu", "mlp"):
            parser.error(f"--shapes: expected swiglu or mlp before the colon, found {op}")
        hidden, intermediate = map(int, sizes.split("x"))
        for row in measure(op, hidden, intermediate, tokens, arguments.threads, arguments.runs):
            table_row = f"| {op} {hidden}x{intermediate} | {row['tokens']} | {row['onnxruntime_us']:.0f} |"
            print(json.dumps(row) if arguments.json else table_row, flush=True)


if __name__ == "__main__":
    main()
