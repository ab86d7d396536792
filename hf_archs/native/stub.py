"""The stub module and the ``auto_map`` of a saved checkpoint, through which any machine can load it.

A pushed checkpoint loads after ``import hf_archs``. Without that import, ``trust_remote_code=True`` makes transformers
run the stub, which only fetches the classes from the installed library. If the library or the architecture's plugin is
missing, the stub names the package to install; transformers does not look for packages imported inside ``try``.
"""

import os

from hf_archs import registry
from hf_archs.native.hosts import ROLES

STUB_MODULE = "load_with_hf_archs"

_STUB = '''\
"""This model's code is the Python package {distribution}: pip install {distribution}"""

try:
    import hf_archs

    _architecture = hf_archs.get_architecture("{name}")
except (ModuleNotFoundError, ValueError) as error:
    raise ImportError("this model needs the package {distribution}: pip install {distribution}") from error

{config} = _architecture.config_class
'''


def auto_map(config_class: type) -> dict[str, str]:
    """The ``auto_map`` for ``config.json``; empty if no registered architecture has this config class."""
    architecture = registry.find_architecture(config_class)
    if architecture is None:
        return {}
    classes = {auto: model_class.__name__ for auto, (_, model_class) in architecture.auto_classes().items()}
    classes["AutoConfig"] = architecture.config_class.__name__
    return {auto: f"{STUB_MODULE}.{name}" for auto, name in classes.items()}


def write_stub(config_class: type, folder: str | os.PathLike) -> None:
    """Write the stub module into ``folder``, which is created if missing."""
    architecture = registry.find_architecture(config_class)
    if architecture is None:
        return
    lines = [
        _STUB.format(
            distribution=registry.distribution_of(architecture),
            name=architecture.name,
            config=architecture.config_class.__name__,
        ),
        *(f"{getattr(architecture, role).__name__} = _architecture.{role}\n" for role in ROLES),
    ]
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, f"{STUB_MODULE}.py"), "w", encoding="utf-8") as file:
        file.writelines(lines)
