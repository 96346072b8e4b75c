"""The files that a program can become, and how each is run: one `Target` per runtime."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from visattn.export.program import MOST

KEY = "visattn"  # under which a file keeps its metadata, as JSON
Metadata = dict[str, Any]
Run = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Exported:
    """A model read from a file: call it with images [B, C, H, W], float32, for the list of its outputs.

    Raises:
        ValueError: Images that the file does not take; some runtimes would read them as something else.
    """

    run: Run
    metadata: Metadata

    def __call__(self, image: Tensor) -> list[Tensor]:
        shape, least = self.metadata["shape"], self.metadata["least"]
        bounds = {"batch": (1, math.inf), "height": (least, MOST), "width": (least, MOST)}
        bounds = [bounds.get(n, (n, n)) for n in shape]
        fits = image.ndim == 4 and all(low <= n <= high for n, (low, high) in zip(image.shape, bounds, strict=True))
        if not fits or image.dtype != torch.float32:
            limits = "" if least is None else f" with sides of {least} to {MOST} px"
            got = f"{image.dtype} {list(image.shape)}"
            raise ValueError(f"expected images of torch.float32 {shape}{limits}, got {got}")
        return self.run(image.detach().cpu().contiguous())


@dataclass(frozen=True)
class Target:
    """One kind of file.

    Attributes:
        suffix: Of its name.
        packages: What must be installed, as `import` and as `pip` name it.
        save: Writes a program with its metadata; returns what of it a report should say.
        load: Reads such a file.
        only_fixed: Why no size may be dynamic; "" if some may.
        beside: Suffix of a second file; "" if there is none.
    """

    suffix: str
    packages: dict[str, str]
    save: Callable[[ExportedProgram, Path, Metadata, dict[str, Any]], str]
    load: Callable[[Path], Exported]
    only_fixed: str = ""
    beside: str = ""


def _save_onnx(program: ExportedProgram, path: Path, metadata: Metadata, options: dict[str, Any]) -> str:
    number = len(program.graph_signature.user_outputs)
    names = ["output"] if number == 1 else [f"output_{i}" for i in range(number)]
    exported = cast(
        "torch.onnx.ONNXProgram",
        torch.onnx.export(program, verbose=False, input_names=["image"], output_names=names, **options),
    )
    opset = exported.model.opset_imports[""]
    if (wanted := options.get("opset_version", opset)) != opset:
        raise ValueError(f"expected an opset that PyTorch's exporter converts to, got {wanted}; try {opset}")
    exported.model.metadata_props[KEY] = json.dumps(metadata)
    large = sum(x.nbytes for x in program.state_dict.values()) > 1.5e9  # Protocol Buffers end at 2 GiB
    exported.save(path, external_data=large)
    return f"opset {opset}"


def _load_onnx(path: Path) -> Exported:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(image: Tensor) -> list[Tensor]:
        return [torch.from_numpy(x) for x in session.run(None, {"image": image.numpy()})]

    return Exported(run, json.loads(session.get_modelmeta().custom_metadata_map[KEY]))


def _save_openvino(program: ExportedProgram, path: Path, metadata: Metadata, options: dict[str, Any]) -> str:
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.onnx"
        said = _save_onnx(program, source, metadata, options)
        model = openvino.convert_model(source)
        model.set_rt_info(json.dumps(metadata), [KEY])
        openvino.save_model(model, path, compress_to_fp16=False)
    return f"from ONNX {said}"


def _load_openvino(path: Path) -> Exported:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    how = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": str(torch.get_num_threads())}
    compiled = core.compile_model(model, "CPU", how)

    def run(image: Tensor) -> list[Tensor]:
        return [torch.from_numpy(x).clone() for x in compiled(image.numpy()).values()]

    return Exported(run, json.loads(model.get_rt_info([KEY]).astype(str)))


def _save_pt2(program: ExportedProgram, path: Path, metadata: Metadata, options: dict[str, Any]) -> str:
    torch.export.save(program, path, extra_files={KEY: json.dumps(metadata)})
    return ""


def _load_pt2(path: Path) -> Exported:
    files = {KEY: ""}
    module = torch.export.load(path, extra_files=files).module()
    return Exported(lambda image: tree_leaves(module(image)), json.loads(files[KEY]))


def _save_aoti(program: ExportedProgram, path: Path, metadata: Metadata, options: dict[str, Any]) -> str:
    kept = {"aot_inductor.metadata": {KEY: json.dumps(metadata)}}
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=kept)
    return f"for this kind of CPU and PyTorch {torch.__version__}"


def _load_aoti(path: Path) -> Exported:
    model = torch._inductor.aoti_load_package(str(path))
    return Exported(lambda image: tree_leaves(model(image)), json.loads(model.get_metadata()[KEY]))


def _of_six_axes(config: type) -> type:
    """Keep what XNNPACK loads from its partitioner's rule for an operation: tensors of at most six axes."""

    def check(self: Any, node: torch.fx.Node, program: ExportedProgram) -> bool:
        values = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
        few = all(x.ndim <= 6 for x in values if isinstance(x, Tensor))
        return few and config.check_common_constraints(self, node, program)

    return type(config.__name__, (config,), {"check_common_constraints": check})


def _save_executorch(program: ExportedProgram, path: Path, metadata: Metadata, options: dict[str, Any]) -> str:
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.exir.passes.constant_prop_pass import constant_prop_pass

    program = constant_prop_pass(program)  # masks and position tables: most of the operations
    xnnpack = XnnpackPartitioner(configs=[_of_six_axes(config) for config in ALL_PARTITIONER_CONFIGS])
    methods = {KEY: json.dumps(metadata)}
    for partitioner in ([xnnpack], []):
        lowered = to_edge_transform_and_lower(program, partitioner=partitioner, constant_methods=methods)
        path.write_bytes(lowered.to_executorch().buffer)
        try:
            _load_executorch(path)
            break
        except RuntimeError:  # XNNPACK refuses some of what its partitioner gives it only when it loads it
            if not partitioner:
                raise
    return "XNNPACK" if partitioner else "portable kernels"


def _load_executorch(path: Path) -> Exported:
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path)
    forward, said = program.load_method("forward"), program.load_method(KEY)
    return Exported(lambda image: list(forward.execute([image])), json.loads(said.execute([])[0]))


_ONNX = {"onnx": "onnx", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime"}
TARGETS = {
    "onnx": Target(".onnx", _ONNX, _save_onnx, _load_onnx),
    "openvino": Target(".xml", _ONNX | {"openvino": "openvino"}, _save_openvino, _load_openvino, beside=".bin"),
    "pt2": Target(".pt2", {}, _save_pt2, _load_pt2),
    "aoti": Target(".aoti.pt2", {}, _save_aoti, _load_aoti),
    "executorch": Target(
        ".pte",
        {"executorch": "executorch"},
        _save_executorch,
        _load_executorch,
        only_fixed="ExecuTorch plans its memory when it exports",
    ),
}
