"""What an installation has inside the package: the scripts, tools and recipes, which stand beside it here."""

from setuptools import find_namespace_packages, setup

BESIDE = ("scripts", "tools", "configs")
beside = find_namespace_packages(include=[pattern for name in BESIDE for pattern in (name, f"{name}.*")])
setup(
    packages=[*find_namespace_packages(include=["ldm", "ldm.*"]), *(f"ldm.{name}" for name in beside)],
    package_dir={f"ldm.{name}": name for name in BESIDE},
    package_data={"ldm": ["assets/**/*", "web/page/*"], "ldm.configs": ["**/*.yaml"], "ldm.tools.icons": ["*.mjs"]},
)
