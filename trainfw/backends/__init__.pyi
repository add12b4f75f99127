from .base import Backend as Backend
from .neuron.sdk import Sdk as Sdk
from .neuron.sdk import load_sdk as load_sdk
from .neuron.sdk import sdk_versions as sdk_versions
from .select import MAX_SIMULATED as MAX_SIMULATED
from .select import current as current
from .select import prepare as prepare
