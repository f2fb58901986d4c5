"""The peers that a whole BERT races against, each a call that returns last_hidden_state as a tensor.

What a peer needs is an extra (`requirements-bench.txt`, ONNX Runtime's `requirements-dev.txt`); one that is missing
or fails is reported, not hidden.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

# Seconds before a contestant's turn, after which no thread of the last one spins any more.
REST = 0.05

Call = Callable[[], torch.Tensor]
Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# Inputs that are like those to come.
Calibration = Sequence[dict[str, torch.Tensor]]


def transformers_sdpa(model: torch.nn.Module, inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> Call:
    """transformers' own model with PyTorch's fused attention."""

    def call() -> torch.Tensor:
        with torch.inference_mode():
            return model(**inputs).last_hidden_state

    return call


def compiled(model: torch.nn.Module, inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> Call:
    """torch.compile with weights frozen into the graph."""
    from torch._inductor import config

    run = torch.compile(model)
    with config.patch(freezing=True), torch.no_grad():
        run(**inputs)

    def call() -> torch.Tensor:
        with torch.no_grad():
            return run(**inputs).last_hidden_state

    return call


class _Plain(torch.nn.Module):
    """The model as a function of tensors that returns one tensor, for exporters."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def onnx_runtime(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], dtype: torch.dtype, quantised: bool = False
) -> Call:
    """`onnx_runtime_any` on fixed inputs."""
    forward = onnx_runtime_any(model, dtype, quantised=quantised)
    return lambda: forward(inputs["input_ids"], inputs["attention_mask"])


def onnx_runtime_any(
    model: torch.nn.Module, dtype: torch.dtype, spinning: bool = False, quantised: bool = False
) -> Forward:
    """ONNX Runtime after its transformer optimiser; float32 only, its CPU kernels have no bfloat16.

    `quantised` is its dynamic quantisation: weights and activations in eight-bit integers, as its tool makes them.

    Without `spinning` its threads sleep between calls; they would hold a core while others have their turn.
    """
    import onnxruntime
    from onnxruntime.transformers import optimizer

    if dtype is not torch.float32:
        raise NotImplementedError("its CPU kernels have no bfloat16")
    config = model.config
    with tempfile.TemporaryDirectory() as folder:
        plain, optimised = Path(folder, "model.onnx"), Path(folder, "optimised.onnx")
        _export(model, plain)
        found = optimizer.optimize_model(
            str(plain), model_type="bert", num_heads=config.num_attention_heads, hidden_size=config.hidden_size
        )
        found.save_model_to_file(str(optimised), use_external_data_format=True)
        if quantised:
            from onnx import TensorProto
            from onnxruntime.quantization import QuantType, quantize_dynamic

            plain, optimised = optimised, Path(folder, "quantised.onnx")
            # Shapes and types of the optimiser's fused nodes are not inferred.
            types = {"DefaultTensorType": TensorProto.FLOAT}
            given, made = str(plain), str(optimised)
            quantize_dynamic(given, made, weight_type=QuantType.QInt8, per_channel=True, extra_options=types)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        if not spinning:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(str(optimised), options, providers=["CPUExecutionProvider"])
    types = {i.name: i.type for i in session.get_inputs()}

    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        feed = {name: given[name].to(torch.int32 if "int32" in types[name] else torch.int64).numpy() for name in types}
        return torch.from_numpy(session.run(None, feed)[0])

    return forward


def openvino(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], dtype: torch.dtype, calibration: Calibration | None = None
) -> Call:
    """OpenVINO with static shapes and its latency setting."""
    forward = openvino_any(model, dtype, {name: list(value.shape) for name, value in inputs.items()}, calibration)
    return lambda: forward(inputs["input_ids"], inputs["attention_mask"])


def openvino_any(
    model: torch.nn.Module,
    dtype: torch.dtype,
    shapes: dict[str, list[int]] | None = None,
    calibration: Calibration | None = None,
) -> Forward:
    """OpenVINO with its latency setting; without `shapes` it takes any batch and length.

    With `calibration` weights and activations are eight-bit integers of fixed ranges, which NNCF finds on these inputs
    by its settings for transformers; `dtype` is that of the rest.
    """
    import openvino

    wanted = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    before = model.dtype
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, "model.onnx")
        _export(model.float(), plain)
        model.to(before)
        converted = openvino.convert_model(str(plain))
        if calibration is not None:
            import nncf

            samples = [{name: value.numpy() for name, value in one.items()} for one in calibration]
            kind, count = nncf.ModelType.TRANSFORMER, len(samples)
            converted = nncf.quantize(converted, nncf.Dataset(samples), model_type=kind, subset_size=count)
        if shapes is not None:
            converted.reshape(shapes)
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": wanted,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        request = openvino.Core().compile_model(converted, "CPU", settings).create_infer_request()

    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        feed = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        return torch.from_numpy(next(iter(request.infer(feed, share_inputs=True, share_outputs=True).values())))

    return forward


def _export(model: torch.nn.Module, path: Path) -> None:
    """ONNX with plain attention, which both optimisers recognise, for any batch and length."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    names = ["input_ids", "attention_mask"]
    ids = torch.ones(2, 8, dtype=torch.int64)
    axes = {name: {0: "batch", 1: "length"} for name in (*names, "last_hidden_state")}
    try:
        torch.onnx.export(
            _Plain(model).eval(),
            (ids, torch.ones_like(ids)),
            str(path),
            input_names=names,
            output_names=["last_hidden_state"],
            dynamic_axes=axes,
            dynamo=False,
        )
    finally:
        model.set_attn_implementation(before)


PEERS = {
    "transformers": transformers_sdpa,
    "torch.compile": compiled,
    "ONNX Runtime": onnx_runtime,
    "OpenVINO": openvino,
}
