"""Packaging of llava-hd: every root folder is one sub-package, `llava_hd.<folder>`.

The folders have no `__init__.py` (a regular package called `kernels` on the path breaks the
import of transformers; docs/decisions.md, "Six folders at the root").
"""

from pathlib import Path

from setuptools import setup

# PyTorch's CUDA builds bring it, its CPU builds do not; kernels/ imports it where it is used.
TRITON = 'triton>=3.6; platform_system == "Linux"'
NUMBA = "numba>=0.60"  # hd/resample.py: Pillow's resize several times as fast
BITSANDBYTES = "bitsandbytes>=0.49"  # linears in 4 or 8 bits (QLoRA)
PYARROW = "pyarrow>=19"  # Parquet files of records
OPENAI = "openai>=3"  # `llava-hd data generate` alone
SERVE = ["starlette>=0.46", "uvicorn>=0.40"]  # `llava-hd eval serve`
WEB = ["gradio>=6.31,<7", *SERVE]  # `llava-hd web`; its page was fitted to this major version
# What lmms-eval's evaluator imports. It asks for fifty packages more (video, torchvision, wandb),
# so the suite installs it alone, with these (Makefile).
HARNESS = ["datasets", "evaluate", "loguru", "pytz", "requests", "sacrebleu", "tenacity"]
FOLDERS = ["hd", "kernels", "model", "train", "bench", "cli"]

setup(
    name="llava-hd",
    version="0.1.0",
    description="LLaVA-1.5-HD: tile images, train in two stages, compare hallucination on POPE",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[f"llava_hd.{folder}" for folder in FOLDERS],
    package_dir={f"llava_hd.{folder}": folder for folder in FOLDERS},
    package_data={
        "llava_hd.kernels": ["blocks/*.json"],
        "llava_hd.train": ["recipes/*.yaml", "mixtures/*.yaml", "examples/*.yaml"],
        "llava_hd.model": ["shipped/*", "shipped/*/*"],
        "llava_hd.bench": ["templates/*", "plans/*.yaml"],
    },
    install_requires=[
        "torch>=2.11",
        "transformers>=5.16,<5.21",
        "deepspeed>=0.19.8",
        "einops",
        "huggingface_hub",
        "jinja2",
        "jsonargparse>=4.53",
        "matplotlib",
        "numpy",
        "peft>=0.19",
        "pillow>=12",
        "protobuf",
        "pyyaml",
        "rich",
        "safetensors",
        "scipy",
        "sentencepiece",
        "tensorboard",
    ],
    extras_require={
        "gpu": [TRITON, "liger-kernel", "xformers", "flash-attn"],
        "data": [OPENAI, PYARROW],
        "qlora": [BITSANDBYTES],
        "web": WEB,
        "fast": [NUMBA],
        "eval": ["lmms-eval>=0.7"],
        "serve": SERVE,
        "dev": [
            *HARNESS,
            *WEB,
            BITSANDBYTES,
            "hypothesis",
            "mypy",
            NUMBA,
            OPENAI,
            PYARROW,
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "selenium",
            TRITON,
            "types-PyYAML",
            "webdataset",
        ],
    },
    entry_points={
        "console_scripts": ["llava-hd = llava_hd.cli.main:console"],
        "lmms_eval.models": ["llava_hd = llava_hd.bench.lmms_manifest:manifest"],
    },
)
