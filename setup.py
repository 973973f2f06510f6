"""Package lrp_compiler; passes/ and kernels/ live at the top level and install as subpackages."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

SUBPACKAGES = ("passes", "kernels")

packages = ["lrp_compiler", "lrp_compiler.interop"]
for folder in SUBPACKAGES:
    packages.append(f"lrp_compiler.{folder}")
    packages += [f"lrp_compiler.{folder}.{name}" for name in find_namespace_packages(where=folder)]

setup(
    name="lrp_compiler",
    version="0.1.0",
    description="A graph compiler that explains neural networks by Layer-wise Relevance Propagation.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=packages,
    package_dir={f"lrp_compiler.{folder}": folder for folder in SUBPACKAGES},
    package_data={"lrp_compiler": ["py.typed"]},
    entry_points={"console_scripts": ["lrp-compiler = lrp_compiler.cli:main"]},
    install_requires=["torch>=2.11", "numpy", "networkx"],
    extras_require={
        "dev": ["pytest", "pytest-xdist", "hypothesis", "expecttest", "mypy", "ruff"],
        "hf": ["transformers>=5"],
        "viz": ["matplotlib", "scikit-learn", "rich"],
        # zennit and lxt also name torchvision, which has no CPU build here: see CONTRIBUTING.md.
        # einops is what DynamicLRP's checkout imports.
        "bench": ["zennit", "lxt", "captum", "einops"],
    },
)
