"""Install minillm. `kernels/` and the scripts stay on top of the tree, imported from within it.

In a wheel `kernels/` becomes `minillm/kernels/`, and `train.py` and `sample.py` become
`minillm/scripts/`; minillm/kernels.py and minillm/scripts.py find them in either place.
"""

from pathlib import Path

from setuptools import setup

TEST = ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff>=0.8"]
PARQUET = ["pyarrow>=15"]
PDF = ["pypdf>=4"]
WINGS = (
    "runtime", "config", "optim", "data", "model", "distributed", "checkpoint", "inference",
    "planning", "flags", "training", "convert", "profiling", "profiling.audit", "profiling.timing",
    "profiling.page", "profiling.catalogue", "commands",
)  # fmt: skip
KERNELS = ("kernels", "kernels.reference", "kernels.eager")

setup(
    name="minillm",
    version="0.1.0",
    description="A small language model kit: one script trains, one samples, kernels in Triton.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=["minillm", *(f"minillm.{folder}" for folder in WINGS + KERNELS)],
    package_data={"minillm": ["py.typed"], "minillm.kernels": ["tiles/*.json"]},
    py_modules=["minillm.scripts.train", "minillm.scripts.sample"],
    package_dir={"minillm.kernels": "kernels", "minillm.scripts": "."},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy>=1.26",
        "sentencepiece>=0.2.1",
        "tqdm>=4.66",
        "safetensors>=0.5",
    ],
    extras_require={"test": TEST, "parquet": PARQUET, "pdf": PDF},
    entry_points={"console_scripts": ["minillm = minillm.__main__:main"]},
)
