"""The registry: discovery through entry points, refusals, import orders, and a toy plugin of a third party."""

import importlib
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hf_archs
from hf_archs import registry
from hf_archs.parts import PartConfig


def python(code: str, *paths: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a new interpreter, with these folders first on the path."""
    where = os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": where} | environment,
        timeout=300,
    )


def passes(code: str, *paths: Path, **environment: str) -> str:
    done = python(code, *paths, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def distribution(folder: Path, name: str, entry_points: dict[str, str]) -> None:
    """Install a distribution of that name into a folder: its metadata and entry points."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{key} = {value}" for key, value in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[hf_archs.plugins]", *lines, ""]))


TOY_CONTRACT = """
from dataclasses import replace

import pytest
import hf_archs
from hf_archs.testing.contract import ArchitectureContract

class TestToy(ArchitectureContract):
    @pytest.fixture(scope="class")
    @classmethod
    def architecture(cls):
        return hf_archs.get_architecture("toy")

class TestHybrid(ArchitectureContract):
    @pytest.fixture(scope="class")
    @classmethod
    def architecture(cls):
        tiny = {name: {"type": name, **hf_archs.get_mixer(name).tiny} for name in ("toy_average", "mamba")}
        fields = {"mixers": tiny, "layer_pattern": "toy_average+mamba toy_average", "feed_forward": {}}
        return replace(hf_archs.get_architecture("hybrid"), tiny={**fields, "feed_forward_pattern": None})
"""

# without tests that take minutes (the Trainer, compilers, length 2,048), which built-in architectures run
TOY_TESTS = (
    "pads or split or token_by_token or saved_and or test_greedy or assisted or forward_gradients or last_document"
    " or tiny or lora or merged or state_parameters or prompt_tuning or CausalLM or dtypes or missing or slopes"
    " or every_module or validated"
)


@pytest.fixture
def toy(tmp_path):
    """A folder with the toy plugin as an installed distribution."""
    shutil.copytree(Path(__file__).parent.parent / "data" / "toy_plugin", tmp_path / "site" / "toy_plugin")
    distribution(tmp_path / "site", "toy-plugin", {"toy": "toy_plugin"})
    return tmp_path / "site"


def test_a_third_party_plugin_passes_the_contract(toy, tmp_path):
    """It is found through its entry point and needs only its own folder, as do hybrids with its mixer."""
    (tmp_path / "test_toy.py").write_text(TOY_CONTRACT)
    conftest = Path(__file__).parent.parent / "conftest.py"
    (tmp_path / "conftest.py").write_text(conftest.read_text())
    settings = Path(hf_archs.__file__).parent.parent / "pyproject.toml"
    code = f"""
        import sys, pytest
        sys.exit(pytest.main(["-q", "-c", {str(settings)!r}, "--rootdir", {str(tmp_path)!r}, "-p", "no:cacheprovider",
            "-k", {TOY_TESTS!r}, {str(tmp_path / "test_toy.py")!r}]))
    """
    done = python(code, toy)
    assert done.returncode == 0, done.stdout[-6000:]
    assert int(done.stdout.split(" passed")[0].split()[-1]) > 100


def test_hybrids_take_what_a_plugin_says_of_its_mixer(toy):
    """LoRA targets and tensor-parallel plan come from the plugin; no file outside its folder names it."""
    passes(
        """
        import hf_archs
        from peft.utils import constants
        hybrid = hf_archs.get_architecture("hybrid")
        config = hybrid.tiny_config(mixers={"ema": {"type": "toy_average"}}, layer_pattern="ema", feed_forward=None,
                                    feed_forward_pattern=None)
        assert "toy_average" in hf_archs.registry.mixers()
        plan = {f"layers.*.mixer.{name}": "colwise_gather_output" for name in ("in_proj", "out_proj")}
        assert config.base_model_tp_plan == plan, config.base_model_tp_plan
        assert plan.items() < hf_archs.get_architecture("toy").tiny_config().base_model_tp_plan.items()
        assert hf_archs.get_architecture("toy").lora_targets[:2] == ("in_proj", "out_proj")
        targets = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["hf_archs_hybrid"]
        assert set(hf_archs.get_mixer("toy_average").lora_targets) <= set(targets)
        """,
        toy,
    )


def test_a_third_party_plugin_has_its_own_name_in_the_stub(toy, tmp_path):
    passes(
        f"""
        import hf_archs
        model = hf_archs.get_architecture("toy").causal_lm_class(hf_archs.get_architecture("toy").tiny_config())
        model.save_pretrained({str(tmp_path / "model")!r})
        """,
        toy,
    )
    stub = (tmp_path / "model" / "load_with_hf_archs.py").read_text()
    assert "pip install toy-plugin" in stub


def test_a_broken_plugin_is_one_warning(tmp_path):
    """The warning names plugin, distribution and cause; other plugins work, and an unknown name mentions it."""
    site = tmp_path / "site"
    distribution(site, "broken-plugin", {"broken": "broken_plugin"})
    (site / "broken_plugin.py").write_text("raise RuntimeError('a shelf fell down')\n")
    passes(
        """
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import hf_archs
            hf_archs.load_plugins()  # again: nothing is said twice
        said = [str(w.message) for w in caught if "hf-archs" in str(w.message)]
        assert len(said) == 1, said
        for part in ("'broken'", "broken-plugin", "RuntimeError: a shelf fell down"):
            assert part in said[0], said[0]
        assert hf_archs.failed_plugins() == {"broken": "RuntimeError: a shelf fell down"}
        assert {"mamba", "mamba2"} <= set(hf_archs.architectures())
        try:
            hf_archs.get_architecture("broken")
        except ValueError as error:
            assert "a shelf fell down" in str(error), error
        else:
            raise AssertionError
        """,
        site,
    )


def test_import_orders():
    """After any first import all plugins are loaded, without a warning.

    Each order runs in a fork of a process that has imported the host libraries, which takes the time.
    """
    orders = [
        "import hf_archs",
        "import hf_archs_mamba2, hf_archs",
        "import hf_archs_mamba, hf_archs_mamba2",
        "from hf_archs.registry import architectures",
        "import hf_archs.model.backbone",
        "import hf_archs.cache",
        "import hf_archs.kernels",
        "import hf_archs.layers.mlp",
        "import hf_archs.layers.norm",
        "import hf_archs.config.model",
        "import hf_archs.native.reading",
        "import hf_archs.native.stub",
        "import hf_archs_mamba.mixer",
        "from hf_archs_mamba.ops.selective_scan import selective_scan",
        "from hf_archs_mamba2 import ssd_scan",
    ]
    passes(
        f"""
        import os, sys, warnings
        import torch, peft, transformers
        import transformers.modeling_layers, transformers.generation, transformers.initialization, huggingface_hub
        assert not any(name.startswith("hf_archs") for name in sys.modules)
        warnings.filterwarnings("error", message="hf-archs")
        for order in {orders!r}:
            child = os.fork()
            if not child:
                code = 1
                try:
                    exec(order)
                    import hf_archs
                    assert {{"mamba", "mamba2"}} <= set(hf_archs.architectures()), hf_archs.architectures()
                    assert not hf_archs.failed_plugins(), hf_archs.failed_plugins()
                    code = 0
                finally:
                    if code:
                        import traceback
                        traceback.print_exc()
                    sys.stderr.flush()
                    os._exit(code)
            assert os.waitpid(child, 0)[1] == 0, order
        """
    )


def test_native_classes_are_untouched():
    passes(
        """
        import transformers
        from transformers.models.auto import configuration_auto, modeling_auto
        from transformers import MambaConfig, MambaForCausalLM, Mamba2ForCausalLM, AutoConfig, AutoModelForCausalLM
        from peft.utils import constants

        def picture():
            natives = (MambaConfig, MambaForCausalLM, Mamba2ForCausalLM, transformers.PreTrainedModel,
                       transformers.PreTrainedConfig, transformers.DynamicCache, transformers.StaticCache,
                       transformers.GenerationMixin)
            found = {c.__name__: {k: repr(v) for k, v in vars(c).items()} for c in natives}
            found["mappings"] = dict(configuration_auto.CONFIG_MAPPING_NAMES)
            found["causal"] = {k: v for k, v in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
                               if not k.startswith("hf_archs")}
            found["lora"] = {k: v for k, v in constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.items()
                             if not k.startswith("hf_archs")}
            return found

        before = picture()
        import hf_archs
        for name, attributes in picture().items():
            assert attributes == before[name], name
        model = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1))
        assert type(model) is MambaForCausalLM
        assert type(AutoConfig.for_model("mamba")) is MambaConfig
        """
    )


def test_names_that_are_taken():
    mamba = registry.get_architecture("mamba")
    before = registry.architectures()
    with pytest.raises(ValueError, match="architecture 'mamba' is registered already, by hf_archs_mamba"):
        registry.register(mamba)
    with pytest.raises(ValueError, match=r"model type 'hf_archs_mamba' is registered already, by hf_archs_mamba"):
        registry.register(replace(mamba, name="other"))

    class NativeType(mamba.config_class):
        model_type = "mamba"

    with pytest.raises(ValueError, match="architecture 'other': 'mamba' is already used by a Transformers config"):
        registry.register(replace(mamba, name="other", config_class=NativeType))

    class MambaConfig(mamba.config_class):
        model_type = "another_mamba"

    with pytest.raises(ValueError, match="transformers has a MambaConfig of its own"):
        registry.register(replace(mamba, name="other", config_class=MambaConfig))
    assert registry.architectures() == before
    mixer = registry.get_mixer("mamba")
    with pytest.raises(ValueError, match="mixer 'mamba' is registered already, by hf_archs_mamba"):
        registry.register_mixer("mamba", mixer.module_class, mixer.config_class, state=mixer.state)
    with pytest.raises(ValueError, match=r"feed-forward 'mlp' is registered already, by hf_archs\.layers\.mlp"):
        registry.register_feed_forward("mlp", torch.nn.Linear, PartConfig)


def test_classes_that_are_no_config():
    mamba = registry.get_architecture("mamba")
    with pytest.raises(TypeError, match=r"architecture 'other'.*Linear.*no config class"):
        registry.register(replace(mamba, name="other", config_class=torch.nn.Linear))
    with pytest.raises(TypeError, match="architecture 'other'"):
        registry.register(replace(mamba, name="other", config_class="ArchMambaConfig"))

    class NoType(mamba.config_class):
        model_type = ""

    with pytest.raises(TypeError, match="NoType has no model_type"):
        registry.register(replace(mamba, name="other", config_class=NoType))
    with pytest.raises(TypeError, match=r"mixer 'other'.*dict.*no subclass of PartConfig"):
        registry.register_mixer("other", torch.nn.Linear, dict, state=lambda config: {})
    assert "other" not in registry.architectures()


def test_near_names():
    said = r"no architecture 'mamba3'; did you mean mamba.*registered are .*mamba, mamba2"
    with pytest.raises(ValueError, match=said):
        hf_archs.get_architecture("mamba3")
    with pytest.raises(ValueError, match="no mixer 'mamab'; did you mean mamba"):
        hf_archs.get_mixer("mamab")
    with pytest.raises(ValueError, match="no feed-forward 'mpl'; did you mean mlp"):
        hf_archs.get_feed_forward("mpl")
    with pytest.raises(ValueError) as error:
        hf_archs.get_architecture("qqqqq")
    assert "did you mean" not in str(error.value)


def test_public_names():
    for name in hf_archs.__all__:
        assert getattr(hf_archs, name) is not None
    assert importlib.metadata.version("hf-archs") == hf_archs.__version__


def test_lora_targets_are_registered():
    from peft.utils import constants

    for name in hf_archs.architectures():
        architecture = hf_archs.get_architecture(name)
        targets = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[architecture.model_type]
        assert tuple(targets) == architecture.lora_targets


def test_find_architecture():
    for name in hf_archs.architectures():
        architecture = hf_archs.get_architecture(name)
        assert registry.find_architecture(architecture.config_class) is architecture
        assert registry.distribution_of(architecture) == "hf-archs"
        assert architecture.model_type == f"hf_archs_{name}"
        assert architecture.config_class.__name__.startswith("Arch")
    assert registry.find_architecture(PartConfig) is None
