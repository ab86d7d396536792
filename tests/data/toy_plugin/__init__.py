"""An architecture of a third party: an exponential moving average as its mixer, and the core's feed-forward."""

from hf_archs.registry import Architecture, register, register_mixer
from toy_plugin import modeling
from toy_plugin.mixer import Average, AverageConfig, average_state

register_mixer(
    "toy_average",
    Average,
    AverageConfig,
    state=average_state,
    lora_targets=("in_proj", "out_proj"),
    even_targets=("in_proj", "out_proj"),
    tiny={"initial_decay": 0.8},
)
register(Architecture("toy", modeling, tiny={"intermediate_size": 96}))
