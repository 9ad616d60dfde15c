"""What pyproject.toml cannot say: configs/ lies beside the package in the source and in it where it is installed."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[
        *find_namespace_packages(include=["visrl", "visrl.*"]),
        *("visrl.configs", *(f"visrl.configs.{name}" for name in find_namespace_packages("configs"))),
    ],
    package_dir={"visrl.configs": "configs"},
)
