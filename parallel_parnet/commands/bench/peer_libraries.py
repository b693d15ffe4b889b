"""Inference libraries as their documentation sets them up for latency. Each takes the network from torch by itself."""

from __future__ import annotations

import importlib
import logging
import subprocess
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from parallel_parnet import ParNetError
from parallel_parnet.executors.graph import capture
from parallel_parnet.program.contract import dtype_name

from .peer_torch import InType
from .subject import Contender, Runner, Subject, on_device

CONVERT_S = 120


def library_peers() -> list[Contender]:
    """OpenVINO and ONNX Runtime on CPUs, ONNX Runtime and TensorRT on GPUs, from the network as trained and fused; on
    CPUs from the file of launch/export.py as well."""
    return [
        Contender("OpenVINO", False, lambda s: _openvino(s, s.network)),
        Contender("OpenVINO, fused", False, lambda s: _openvino(s, s.fused)),
        Contender("OpenVINO, exported", False, lambda s: _openvino(s, None)),
        Contender("ONNX Runtime", False, lambda s: _onnxruntime(s, s.network)),
        Contender("ONNX Runtime, fused", False, lambda s: _onnxruntime(s, s.fused)),
        Contender("ONNX Runtime, exported", False, lambda s: _onnxruntime(s, None)),
        Contender("TensorRT", False, lambda s: _tensorrt(s, s.network)),
        Contender("TensorRT, fused", False, lambda s: _tensorrt(s, s.fused)),
    ]


def need(module: str, package: str) -> ModuleType:
    """An optional package; ParNetError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ParNetError(f"not installed here: pip install {package}") from None


def _openvino(subject: Subject, network: nn.Module | None) -> Runner:
    if subject.device.type != "cpu":
        raise ParNetError("runs on the CPU here")
    hint = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[subject.dtype]
    source = "convert_model(network)" if network else "read_model(file)"
    runner = openvino_runner(openvino_model(subject, network), subject, source, {"INFERENCE_PRECISION_HINT": hint})
    asked = dtype_name(subject.dtype)
    if runner.arithmetic not in (asked, "float32"):  # fp16, on a CPU that has instructions for bf16 alone
        raise ParNetError(f"computes in {runner.arithmetic} here, asked for {asked}")
    return runner


def openvino_model(subject: Subject, network: nn.Module | None) -> Any:
    """The network, or what launch/export.py writes, for pictures of the subject's shape."""
    openvino, shape = need("openvino", "openvino"), [subject.batch, 3, subject.size, subject.size]
    if network is None:
        model = _core().read_model(exported(subject))
        model.reshape(shape)
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's tracer, about shapes that are constant here
        return openvino.convert_model(network, example_input=subject.pictures(1)[0], input=[shape])


def _core() -> Any:
    from parallel_parnet.executors.openvino_model import CORE  # here, since the package is optional

    return CORE


def openvino_runner(model: Any, subject: Subject, source: str, hints: dict[str, str]) -> Runner:
    """Compiled for latency. source: in words, how the model was made."""
    import openvino

    settings = {"PERFORMANCE_HINT": "LATENCY", **hints, "INFERENCE_NUM_THREADS": subject.threads}
    compiled = _core().compile_model(model, "CPU", settings)
    ran = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    request = compiled.create_infer_request()

    def call(picture: Any) -> Any:
        request.set_input_tensor(picture)
        return request.infer(share_outputs=True)[0]

    return Runner(
        call,
        f"{source}, {settings}, inputs and outputs shared",
        {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}.get(ran, ran),
        take=lambda picture: openvino.Tensor(picture.numpy(), shared_memory=True),
        logits=torch.tensor,
    )


def _onnxruntime(subject: Subject, network: nn.Module | None) -> Runner:
    ort = need("onnxruntime", "'parallel_parnet[bench]'")
    if subject.device.type == "cuda":
        if network is None:
            raise ParNetError("raced on CPUs alone")
        return _onnxruntime_cuda(subject, network, ort)
    return onnxruntime_runner(exported(subject) if network is None else onnx(network, subject), subject)


def onnxruntime_runner(model: bytes, subject: Subject) -> Runner:
    """A session on the CPU."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    for name, size in (("batch", subject.batch), ("height", subject.size), ("width", subject.size)):
        options.add_free_dimension_override_by_name(name, size)  # of the exported file; others have none
    options.intra_op_num_threads = subject.threads
    # its threads would go on spinning for tens of milliseconds, on the cores of whoever runs next
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return Runner(
        lambda picture: session.run(None, {name: picture})[0],
        f"intra_op_num_threads={subject.threads}, session.force_spinning_stop=1, all graph optimisations",
        "float32",  # its CPU provider has no convolution in bf16
        take=lambda picture: picture.numpy(),
        logits=torch.from_numpy,
    )


def _onnxruntime_cuda(subject: Subject, network: nn.Module, ort: ModuleType) -> Runner:
    """With bound buffers and a CUDA graph, which it captures in the first run."""
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise ParNetError("its CUDA provider is not installed here: pip install onnxruntime-gpu")
    provider = {
        "device_id": str(subject.device.index or 0),
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "enable_cuda_graph": "1",
        "use_tf32": "0",
    }
    module = InType(network, subject, "NCHW")
    session = ort.InferenceSession(onnx(module, subject), providers=[("CUDAExecutionProvider", provider)])
    (picture,) = subject.pictures(1)
    with torch.inference_mode():
        logits = torch.empty_like(module(picture))
    binding = session.io_binding()
    ends = (("input", session.get_inputs()[0].name, picture), ("output", session.get_outputs()[0].name, logits))
    for kind, name, tensor in ends:
        bind = getattr(binding, f"bind_{kind}")
        bind(name, "cuda", subject.device.index or 0, "float32", tuple(tensor.shape), tensor.data_ptr())

    def call(x_nchw: Tensor) -> Tensor:
        picture.copy_(x_nchw)
        torch.cuda.current_stream().synchronize()  # it runs on a CUDA stream of its own
        session.run_with_iobinding(binding)
        return logits

    return Runner(call, f"{provider}, bound buffers", dtype_name(subject.dtype), wait=on_device(subject), events=False)


def _tensorrt(subject: Subject, network: nn.Module) -> Runner:
    """Through its ONNX parser, with the types of the network, and captured as its trtexec does with --useCudaGraph."""
    if subject.device.type != "cuda":
        raise ParNetError("needs an NVIDIA GPU")
    trt = need("tensorrt", "tensorrt")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    definition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(definition, logger)
    if not parser.parse(onnx(InType(network, subject, "NCHW"), subject)):
        raise ParNetError(f"its parser refuses the network: {parser.get_error(0)}")
    config = builder.create_builder_config()
    config.builder_optimization_level = 5
    config.clear_flag(trt.BuilderFlag.TF32)
    plan = builder.build_serialized_network(definition, config)
    if plan is None:
        raise ParNetError("it builds no engine from the network")
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    (picture,) = subject.pictures(1)
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    (output,) = (name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT)
    logits = torch.empty(tuple(engine.get_tensor_shape(output)), device=subject.device)
    for name in names:
        context.set_tensor_address(name, (logits if name == output else picture).data_ptr())
    stream = torch.cuda.current_stream
    _, replay = capture(lambda: context.execute_async_v3(stream().cuda_stream), subject.device)

    def call(x_nchw: Tensor, owner: object = context) -> Tensor:  # whose memory the graph uses
        picture.copy_(x_nchw)
        replay()
        return logits

    settings = "ONNX parser, strongly typed, builder_optimization_level=5, TF32 off, CUDA graph"
    return Runner(call, settings, dtype_name(subject.dtype), wait=on_device(subject))


def exported(subject: Subject) -> bytes:
    """What launch/export.py writes."""
    return subject.program.to_onnx().SerializeToString()


def converted(subject: Subject, command: Sequence[str | Path], folder: str, *files: str) -> list[Path]:
    """What a library's converter makes in a folder of m.onnx there; ParNetError where it does not."""
    Path(folder, "m.onnx").write_bytes(exported(subject))
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=CONVERT_S, check=False)
    made = [Path(folder, file) for file in files]
    if done.returncode or not all(file.is_file() for file in made):
        raise ParNetError(f"its converter made no network of it: exit status {done.returncode}")
    return made


def onnx(network: nn.Module, subject: Subject) -> bytes:
    """The network as torch exports it; ParNetError without what torch needs for that."""
    for package in ("onnx", "onnxscript"):
        need(package, "'parallel_parnet[bench]'")
    (picture,) = subject.pictures(1)
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)  # it warns that torchvision is missing, which nothing here needs
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the exporter's own use of torch
            exported = torch.onnx.export(network, (picture,), dynamo=True, verbose=False)
    finally:
        exporter.setLevel(level)
    assert exported is not None
    return exported.model_proto.SerializeToString()
