"""What runs TensorRT's engines: tested up to the first call of CUDA, and beyond it against a stand-in.

The stand-in for CUDA has the host's memory for the GPU's, that for TensorRT computes what the fake engine does; so
every byte goes the way that it would go, and nothing is said about the libraries themselves.
"""
# ruff: noqa: N802, N815

from __future__ import annotations

import ctypes
import shutil
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from redif_sdk import FastPipeline, runtimes
from redif_sdk.artifact.folder import StudentFolder, write_manifest
from redif_sdk.artifact.records import Decoder, Graph, Postprocess, TensorSpec, TextCondition, TextEncoder, Tokenizer
from redif_sdk.errors import InvalidRequest, RuntimeUnavailable
from redif_sdk.runtimes.fake import FakeRuntime
from redif_sdk.runtimes.protocol import RuntimeInfo, RuntimeOptions, nvidia_driver
from redif_sdk.runtimes.tensorrt import cuda
from redif_sdk.runtimes.tensorrt import runtime as trt
from redif_sdk.runtimes.tensorrt.cache import Built, EngineCache, EngineKey, graph_digest
from redif_sdk.runtimes.tensorrt.cuda import Gpu

L4 = Gpu(0, "NVIDIA L4", 89)

needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
needs_no_gpu = pytest.mark.skipif(nvidia_driver() is not None, reason="there is a GPU here")
needs_no_tensorrt = pytest.mark.skipif(find_spec("tensorrt") is not None, reason="tensorrt is installed")

LABELS = TensorSpec(name="class_labels", dtype="int64", shape=["batch"])
INPUTS = {
    "denoiser": [
        TensorSpec(name="sample", dtype="float32", shape=["batch", 4, 14, 14]),
        TensorSpec(name="timestep", dtype="float32", shape=["batch"]),
        LABELS,
    ],
    "generator": [
        TensorSpec(name="noise", dtype="float32", shape=["slices", "batch", 4, 14, 14]),
        TensorSpec(name="table", dtype="float32", shape=["steps", 6]),
        TensorSpec(name="init_scale", dtype="float32", shape=[]),
        LABELS,
    ],
}
OUTPUTS = {
    "denoiser": [TensorSpec(name="f", dtype="float32", shape=["batch", 4, 14, 14])],
    "generator": [TensorSpec(name="images", dtype="uint8", shape=["batch", 28, 28, 1])],
}
#: Batches of 1 to 5, 1 to 4 slices of noise, 1 to 3 steps.
PROFILES = {
    "denoiser": {
        "sample": ((1, 4, 14, 14), (4, 4, 14, 14), (5, 4, 14, 14)),
        "timestep": ((1,), (4,), (5,)),
        "class_labels": ((1,), (4,), (5,)),
    },
    "generator": {
        "noise": ((1, 1, 4, 14, 14), (1, 4, 4, 14, 14), (4, 5, 4, 14, 14)),
        "table": ((1, 6), (2, 6), (3, 6)),
        "class_labels": ((1,), (4,), (5,)),
    },
    "text_encoder": {
        "input_ids": ((1, 5), (4, 5), (5, 5)),
        "attention_mask": ((1, 5), (4, 5), (5, 5)),
    },
    "decoder": {"latents": ((1, 4, 14, 14), (4, 4, 14, 14), (5, 4, 14, 14))},
}


@pytest.fixture(scope="session")
def described_student(bare_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with graphs that are described and hold nothing: nobody reads them here. Read only."""
    folder = Path(shutil.copytree(bare_student, tmp_path_factory.mktemp("described") / "tiny"))
    (folder / "onnx").mkdir()
    graphs = []
    for component in ("denoiser", "generator"):
        for precision in ("fp32", "fp16"):
            file = f"onnx/{component}.{precision}.onnx"
            (folder / file).write_text(file)
            sides = {"inputs": INPUTS[component], "outputs": OUTPUTS[component]}
            graphs.append(Graph(component=component, precision=precision, file=file, opset=20, **sides))
    write_manifest(folder, StudentFolder(folder).manifest.model_copy(update={"graphs": graphs}))
    return folder


@pytest.fixture(scope="session")
def described_text_student(bare_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of one that is asked by prompts and decodes its latents. Read only."""
    folder = Path(shutil.copytree(bare_student, tmp_path_factory.mktemp("described") / "text"))
    hidden = TensorSpec(name="encoder_hidden_states", dtype="float32", shape=["batch", 5, 8])
    state = TensorSpec(name="latents", dtype="float32", shape=["batch", 4, 14, 14])
    ids = [TensorSpec(name=name, dtype="int64", shape=["batch", 5]) for name in ("input_ids", "attention_mask")]
    sample = TensorSpec(name="sample", dtype="float32", shape=["batch", 3, 28, 28])
    sides = {"text_encoder": (ids, [hidden]), "decoder": ([state], [sample])}
    (folder / "onnx").mkdir()
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/tokenizer.json").write_text("{}")
    graphs = []
    for component, (inputs, outputs) in sides.items():
        file = f"onnx/{component}.fp32.onnx"
        (folder / file).write_text(file)
        described = {"component": component, "precision": "fp32", "file": file, "opset": 20}
        graphs.append(Graph.model_validate(described | {"inputs": inputs, "outputs": outputs}))
    tokenizer = Tokenizer(file="tokenizer/tokenizer.json", mask="attention_mask", max_length=5, pad_token_id=0)
    condition = TextCondition(
        kind="text",
        tokenizers=[tokenizer],
        encoders=[TextEncoder(class_path="transformers.T5EncoderModel", folder="text_encoder")],
        tensors=[hidden],
        examples=["red heart"],
    )
    decoder = Decoder(class_path="diffusers.AutoencoderKL", folder="vae", scale=2, scaling_factor=0.5)
    changes = {"graphs": graphs, "task": "text-to-image", "condition": condition}
    changes["postprocess"] = Postprocess(decoder=decoder)
    write_manifest(folder, StudentFolder(folder).manifest.model_copy(update=changes))
    return folder


@needs_no_gpu
@pytest.mark.parametrize("runtime", [pytest.param("tensorrt-rtx", marks=needs_rtx)])
def test_a_machine_without_a_gpu_says_so_in_one_line(described_student: Path, runtime: str) -> None:
    with pytest.raises(RuntimeUnavailable) as caught:
        FastPipeline.from_pretrained(described_student, runtime=runtime)
    text = str(caught.value)
    assert text.startswith(f"runtime {runtime} needs an NVIDIA GPU and its driver, and none was found (no libcuda.so.1")
    assert 'use runtime="onnxruntime"' in text
    assert "\n" not in text


@needs_no_tensorrt
def test_a_runtime_that_is_not_installed(described_student: Path) -> None:
    with pytest.raises(RuntimeUnavailable, match=r'tensorrt is not installed; pip install "redif-sdk\[tensorrt\]"'):
        FastPipeline.from_pretrained(described_student, runtime="tensorrt")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "cpu"}, RuntimeUnavailable, 'runtime tensorrt-rtx has no device cpu; use "cuda" or "cuda:N"'),
        ({"device": "npu"}, RuntimeUnavailable, "has no device npu"),
        ({"num_threads": 2}, InvalidRequest, "num_threads is not supported by runtime tensorrt-rtx"),
        ({"provider": "CUDAExecutionProvider"}, InvalidRequest, "provider is not supported"),
    ],
)
def test_options_that_are_not_tensorrts(
    described_student: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    student = StudentFolder(described_student)
    with pytest.raises(error, match=message):
        trt.TensorRTRtx.load(student, student.manifest.graphs[0], RuntimeOptions(**options))


class FakeDriver:
    """NVIDIA's driver with `count` GPUs, of which number 1 is an Ada."""

    def __init__(self, count: int = 2, status: int = 0) -> None:
        self.cuInit = lambda flags: status
        self.count = count

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.count
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
        name.value = [b"Turing", b"Ada"][device.value]
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        value._obj.value = [{75: 7, 76: 5}, {75: 8, 76: 9}][device.value][attribute]
        return 0


@pytest.mark.parametrize(
    ("driver", "index", "found"),
    [
        (FakeDriver(), 0, Gpu(0, "Turing", 75)),
        (FakeDriver(), 1, Gpu(1, "Ada", 89)),
        (FakeDriver(), 2, "cuda:2 was asked for and there are 2"),
        (FakeDriver(count=0), 0, "cuda:0 was asked for and there are 0"),
        (FakeDriver(status=100), 0, "cuInit gave CUDA error 100"),
        (object(), 0, "'object' object has no attribute 'cuInit'"),
    ],
)
def test_the_driver_is_asked_for_the_gpu(
    monkeypatch: pytest.MonkeyPatch, driver: Any, index: int, found: Gpu | str
) -> None:
    monkeypatch.setattr(cuda, "nvidia_driver", lambda: "libcuda.so.1")
    monkeypatch.setattr(cuda, "_open", lambda library: driver)
    assert cuda.find_gpu(index) == found


@pytest.mark.parametrize(
    ("batch", "most", "sizes"),
    [(1, 8, [1]), (8, 8, [8]), (9, 8, [5, 4]), (17, 8, [6, 6, 5]), (24, 8, [8, 8, 8]), (3, 1, [1, 1, 1])],
)
def test_a_batch_is_cut_into_even_pieces(batch: int, most: int, sizes: list[int]) -> None:
    assert trt.even(batch, most) == sizes


# A stand-in for CUDA's runtime: device memory is host memory, and streams are done at once.


class Status(int):
    name = "cudaErrorMemoryAllocation"


class FakeCudaRuntime:
    cudaStreamNonBlocking = 1
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.fails: str | None = None
        self.free = 1 << 30

    def _done(self, name: str, *values: Any) -> tuple[Any, ...]:
        return (Status(2),) if self.fails == name else (Status(0), *values)

    def _allocate(self, size: int) -> int:
        block = (ctypes.c_uint8 * size)()
        self.memory[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def cudaSetDevice(self, index: int) -> tuple[Any, ...]:
        return self._done("cudaSetDevice")

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        return self._done("cudaMemGetInfo", self.free, 1 << 31)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        return self._done("cudaStreamCreateWithFlags", 7)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        return self._done("cudaStreamSynchronize")

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        return self._done("cudaMalloc", self._allocate(size))

    def cudaMallocHost(self, size: int) -> tuple[Any, ...]:
        return self._done("cudaMallocHost", self._allocate(size))

    def cudaFree(self, address: int) -> tuple[Any, ...]:
        del self.memory[address]
        return self._done("cudaFree")

    cudaFreeHost = cudaFree

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> tuple[Any, ...]:
        ctypes.memmove(target, source, size)
        return self._done("cudaMemcpyAsync")

    def cudaGetErrorString(self, status: int) -> tuple[Any, ...]:
        return Status(0), b"out of memory"


class FakeContext:
    """Computes with the fake engine what lies at the addresses that it was given."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {"init_scale": ()}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        return index == 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self.engine.profile[name]
        self.shapes[name] = shape
        return all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self.shapes:
            return self.shapes[name]
        spec = next(spec for spec in self.engine.graph.outputs if spec.name == name)
        return tuple(self._batch() if size == "batch" else int(size) for size in spec.shape)

    def _batch(self) -> int:
        spec = next(spec for spec in self.engine.graph.inputs if "batch" in spec.shape)
        return self.shapes[spec.name][spec.shape.index("batch")]

    def execute_async_v3(self, stream: int) -> bool:
        dtypes = {spec.name: np.dtype(spec.dtype) for spec in self.engine.graph.inputs}
        inputs = {name: self._array(name, dtype) for name, dtype in dtypes.items()}
        computed = self.engine.network.run(inputs)
        for name in (spec.name for spec in self.engine.graph.outputs):  # an engine gives what it was built to give
            value = computed[name]
            ctypes.memmove(self.addresses[name], np.ascontiguousarray(value).ctypes.data, value.nbytes)
        self.engine.batches.append(self._batch())
        return True

    def _array(self, name: str, dtype: Any) -> Any:
        shape = self.shapes[name]
        size = int(np.prod(shape, dtype=int)) * dtype.itemsize
        return np.frombuffer(ctypes.string_at(self.addresses[name], size), dtype).reshape(shape)


class FakeEngine:
    device_memory_size_v2 = 1 << 20

    def __init__(self, student: StudentFolder, graph: Graph, profile: Any) -> None:
        info = RuntimeInfo("fake", "1", "numpy", "cpu", graph.precision, graph.component, graph.file, None)
        self.network = FakeRuntime(student.manifest, info)
        self.graph, self.profile = graph, profile
        self.batches: list[int] = []
        self.contexts: list[FakeContext] = []
        self.kernels = b""

    def create_execution_context(self, config: Any = None) -> FakeContext:
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]

    def create_runtime_config(self) -> Any:
        kernels = SimpleNamespace(
            deserialize=lambda data: setattr(self, "kernels", data) or True, serialize=lambda: b"kernels"
        )
        return SimpleNamespace(create_runtime_cache=lambda: kernels, set_runtime_cache=lambda cache: cache is kernels)


class Bench:
    """A student with an engine of each fp32 graph, a GPU, and libraries, none of them real."""

    def __init__(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flavour: Any) -> None:
        self.student = StudentFolder(folder)
        self.options = RuntimeOptions(engine_dir=tmp_path / "engines", cache_dir=tmp_path / "cache")
        self.kind = {"tensorrt": trt.TensorRT, "tensorrt-rtx": trt.TensorRTRtx}[flavour]
        self.cuda = FakeCudaRuntime()
        self.engines: dict[bytes, FakeEngine] = {}
        self.flavour = flavour
        for graph in self.student.manifest.graphs:
            if graph.precision == "fp32":
                self.add(graph)
        library = SimpleNamespace(__version__="9.9", Runtime=None)
        loader = SimpleNamespace(deserialize_cuda_engine=lambda data: self.engines.get(data))
        monkeypatch.setattr(trt, "library", lambda flavour: library)
        monkeypatch.setattr(trt, "_runtime", lambda flavour: loader)
        monkeypatch.setattr(trt, "logger", lambda flavour: SimpleNamespace(take_errors=lambda: "it is no engine"))
        monkeypatch.setattr(trt, "find_gpu", lambda index: L4)
        monkeypatch.setattr(cuda, "import_module", lambda name: self.cuda)

    def add(self, graph: Graph) -> None:
        key = EngineKey(
            graph=graph_digest(self.student, graph),
            component=graph.component,
            precision=graph.precision,
            flavour=self.flavour,
            version="9.9",
            targets=[89],
            device="NVIDIA L4",
            profile=PROFILES[graph.component],
        )
        data = f"engine {graph.component}".encode()
        EngineCache(self.options).build_once(key, lambda: Built(data, 1.0, graph.inputs, graph.outputs))
        self.engines[data] = FakeEngine(self.student, graph, key.profile)

    def graph(self, component: str = "generator") -> Graph:
        graph = self.student.manifest.graph(component, "fp32")
        assert graph is not None
        return graph

    def load(self, component: str = "generator") -> trt.TensorRT:
        return self.kind.load(self.student, self.graph(component), self.options)

    def inputs(self, batch: int) -> dict[str, Any]:
        table = self.student.manifest.step_table(3)  # adds noise: four slices
        noise = np.random.default_rng(0).standard_normal((4, batch, 4, 14, 14)).astype(np.float32)
        scale = np.asarray(table.init_scale, dtype=np.float32)
        return {"noise": noise, "table": table.rows, "init_scale": scale, "class_labels": np.arange(batch) % 4}


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def bench(
    described_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Bench:
    return Bench(described_student, tmp_path, monkeypatch, request.param)


@pytest.mark.parametrize("batch", [1, 5, 11])
def test_a_call_goes_through_the_gpus_memory_and_back(bench: Bench, batch: int) -> None:
    runtime = bench.load()
    engine = bench.engines[b"engine generator"]
    inputs = bench.inputs(batch)
    for _ in range(2):
        images = runtime.run(inputs)["images"]
        assert images.dtype == np.uint8
        assert np.array_equal(images, engine.network.run(inputs)["images"])
    assert engine.batches == 2 * trt.even(batch, 5)
    assert len(engine.contexts) == 1
    assert runtime.info.device == "cuda:0"
    assert runtime.info.provider == "NVIDIA L4"
    assert runtime.info.file.endswith(".engine")


def test_the_network_alone(bench: Bench) -> None:
    generator = np.random.default_rng(0)
    inputs = {
        "sample": generator.standard_normal((7, 4, 14, 14)).astype(np.float32),
        "timestep": np.full(7, 500, np.float32),
        "class_labels": np.arange(7) % 4,
    }
    expected = bench.engines[b"engine denoiser"].network.run(inputs)["f"]
    assert np.array_equal(bench.load("denoiser").run(inputs)["f"], expected)


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
def test_text_encoders_and_decoders_are_cut_and_joined_like_networks(
    described_text_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flavour: str
) -> None:
    bench = Bench(described_text_student, tmp_path, monkeypatch, flavour)
    generator = np.random.default_rng(0)
    ids = {name: generator.integers(0, 9, (7, 5)) for name in ("input_ids", "attention_mask")}
    latents = {"latents": generator.standard_normal((7, 4, 14, 14)).astype(np.float32)}
    for component, inputs, output in (
        ("text_encoder", ids, "encoder_hidden_states"),
        ("decoder", latents, "sample"),
    ):
        engine = bench.engines[f"engine {component}".encode()]
        found = bench.load(component).run(inputs)[output]
        assert np.array_equal(found, engine.network.run(inputs)[output])
        assert engine.batches == [4, 3]


def test_many_threads_share_a_few_contexts(bench: Bench) -> None:
    runtime, engine = bench.load(), bench.engines[b"engine generator"]
    batches = [bench.inputs(size) for size in (1, 2, 3, 4, 5, 6, 7, 8)]
    with ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(lambda inputs: runtime.run(inputs)["images"], batches))
    for inputs, images in zip(batches, outputs, strict=True):
        assert np.array_equal(images, engine.network.run(inputs)["images"])
    assert 1 <= len(engine.contexts) <= trt.MOST_CONTEXTS


def test_kernels_that_were_compiled_are_kept(bench: Bench) -> None:
    if bench.flavour == "tensorrt":
        pytest.skip("Enterprise compiles none")
    bench.load().run(bench.inputs(1))
    [kept] = (bench.options.cache_dir / "kernels").iterdir()  # type: ignore[operator]
    assert kept.read_bytes() == b"kernels"
    bench.load()
    assert bench.engines[b"engine generator"].kernels == b"kernels"


def test_inputs_that_the_engine_was_not_built_for(bench: Bench) -> None:
    runtime, good = bench.load(), bench.inputs(2)
    longer = np.zeros((4, 6), np.float32)
    for wrong, message in (
        ({"table": longer}, "table has 4 steps; generator.* was built for 1 to 3"),
        ({"noise": good["noise"].astype(np.float64)}, "noise is float64 with 5 axes; .* takes float32 with 5"),
        ({"noise": good["noise"][0]}, "noise is float32 with 4 axes"),
        ({"noise": good["noise"][:, :, :3]}, "noise has 3 on axis 2; .* was built for 4 to 4"),
        ({"class_labels": np.arange(3)}, r"the inputs have batches of \[2, 3\]; give all the same"),
        ({"more": longer}, "takes noise, table, init_scale, class_labels, not noise,"),
    ):
        with pytest.raises(RuntimeUnavailable, match=message):
            runtime.run(good | wrong)
    with pytest.raises(RuntimeUnavailable, match="takes batches of 1 to 5, and 0 cannot be cut"):
        runtime.run(bench.inputs(0))


@pytest.mark.parametrize("call", ["cudaMalloc", "cudaStreamSynchronize", "cudaMemcpyAsync", "cudaSetDevice"])
def test_a_call_of_cuda_that_fails_is_named(bench: Bench, call: str) -> None:
    runtime = bench.load()
    bench.cuda.fails = call
    with pytest.raises(RuntimeUnavailable, match=f"{call} failed on cuda:0: cudaErrorMemoryAllocation, out of memory"):
        bench.load() if call == "cudaMalloc" else runtime.run(bench.inputs(1))
    bench.cuda.fails = None
    assert runtime.run(bench.inputs(1))["images"].shape == (1, 28, 28, 1)


def test_memory_goes_with_what_used_it(bench: Bench) -> None:
    bench.load()
    assert bench.cuda.memory == {}


def test_a_gpu_without_enough_memory(bench: Bench) -> None:
    bench.cuda.free = 1 << 19
    with pytest.raises(RuntimeUnavailable, match="needs 1 MiB of cuda:0 for one call, and 0 MiB are free"):
        bench.load()


def test_no_engine_names_the_command(bench: Bench) -> None:
    graph = bench.student.manifest.graph("generator", "fp16")
    assert graph is not None
    with pytest.raises(RuntimeUnavailable) as caught:
        bench.kind.load(bench.student, graph, bench.options)
    text = str(caught.value)
    assert "has no engine of onnx/generator.fp16.onnx for NVIDIA L4 (miss: no engine for this student)" in text
    sm = " --sm 89" if bench.flavour == "tensorrt-rtx" else ""
    command = f"redif export {bench.student.path} --target {bench.flavour} --precision fp16"
    assert text.endswith(f"run: {command} --engine-dir {bench.options.engine_dir}{sm}")


def test_an_engine_of_another_version_or_gpu(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt, "find_gpu", lambda index: Gpu(0, "RTX 3090", 86))
    with pytest.raises(RuntimeUnavailable, match=r"miss: built for NVIDIA L4 \(sm 89\), this GPU is RTX 3090, sm 86"):
        bench.load()
    monkeypatch.setattr(trt, "find_gpu", lambda index: L4)
    monkeypatch.setattr(trt, "library", lambda flavour: SimpleNamespace(__version__="9.10"))
    with pytest.raises(RuntimeUnavailable, match=f"miss: built with {bench.flavour} 9.9, this is 9.10"):
        bench.load()


def test_an_altered_engine_is_not_loaded(bench: Bench) -> None:
    [path] = Path(bench.options.engine_dir or "").glob("generator*.engine")
    path.write_bytes(b"engine denoiser ")
    bench.engines[b"engine denoiser "] = bench.engines[b"engine denoiser"]
    with pytest.raises(RuntimeUnavailable, match=r"miss: the file was altered \(generator"):
        bench.load()


def test_an_engine_that_the_library_does_not_load(bench: Bench) -> None:
    bench.engines.clear()
    with pytest.raises(RuntimeUnavailable, match=r"cannot load generator.* on NVIDIA L4: it is no engine"):
        bench.load()


def test_a_package_that_is_missing_is_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(cuda, "import_module", missing)
    with pytest.raises(RuntimeUnavailable, match=r"cuda-bindings, .*; pip install cuda-bindings"):
        bench.load()


@needs_rtx
def test_a_pipeline_runs_on_it(described_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(described_student, tmp_path, monkeypatch, "tensorrt-rtx")
    pipe = FastPipeline.from_pretrained(
        described_student, runtime="tensorrt-rtx", precision="fp32", engine_dir=bench.options.engine_dir
    )
    fake = FastPipeline.from_pretrained(described_student, runtime="fake", precision="fp32")
    asked: dict[str, Any] = {"class_labels": [0, 1, 2], "num_images_per_prompt": 3, "seed": 0, "output_type": "uint8"}
    for steps in (2, 3):
        ours = pipe(num_inference_steps=steps, **asked)
        assert np.array_equal(ours.images, fake(num_inference_steps=steps, **asked).images)
    assert ours.runtime_info["runtime"] == "tensorrt-rtx"
    stepped = pipe(callback_on_step_end=lambda *_: None, **asked)
    assert np.array_equal(stepped.images, pipe(**asked).images)


def test_the_runtimes_are_registered() -> None:
    assert runtimes.RUNTIMES["tensorrt"].target == "redif_sdk.runtimes.tensorrt.runtime:TensorRT"
    assert runtimes.RUNTIMES["tensorrt-rtx"].target == "redif_sdk.runtimes.tensorrt.runtime:TensorRTRtx"


def test_an_engine_without_weights_gets_the_students(described_student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = StudentFolder(described_student)
    seen: dict[str, Any] = {}
    parser = SimpleNamespace(
        load_model_proto=lambda data: seen.update(graph=data) or True,
        load_initializer=lambda name, address, size: seen.update({name: ctypes.string_at(address, size)}) or True,
        refit_model_proto=lambda: True,
    )
    library = SimpleNamespace(
        Refitter=lambda engine, logger: SimpleNamespace(refit_cuda_engine=lambda: seen["engine"] == engine),
        OnnxParserRefitter=lambda refitter, logger: parser,
    )
    external = onnx.TensorProto(name="w")
    for key, value in (("location", "denoiser.fp16.onnx"), ("offset", "5"), ("length", "8")):
        external.external_data.add(key=key, value=value)
    model = onnx.ModelProto(graph=onnx.GraphProto(initializer=[external, onnx.TensorProto(name="inside")]))
    monkeypatch.setattr(onnx, "load_model_from_string", lambda data: model)
    blobs = {"denoiser.fp16.onnx": student.read_bytes("onnx/denoiser.fp16.onnx")}
    monkeypatch.setattr(StudentFolder, "read_graph", lambda self, graph: (self.read_bytes(graph.file), blobs))
    monkeypatch.setattr(trt, "logger", lambda flavour: None)
    seen["engine"] = "the engine"
    graph = student.manifest.graphs[0].model_copy(update={"data": ["onnx/denoiser.fp16.onnx"]})
    trt._refit(library, "tensorrt", "the engine", student, graph)
    assert seen == {"engine": "the engine", "graph": b"onnx/denoiser.fp32.onnx", "w": b"denoiser"}
    parser.load_initializer = lambda *_: False
    with pytest.raises(RuntimeUnavailable, match="does not take the weights w; export the student again"):
        trt._refit(library, "tensorrt", "the engine", student, graph)
    parser.load_initializer = lambda *_: True
    with pytest.raises(RuntimeUnavailable, match=r"could not put the weights of onnx/denoiser\.fp32\.onnx into"):
        trt._refit(library, "tensorrt", "another", student, graph)
