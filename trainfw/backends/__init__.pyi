from .base import Backend as Backend
from .select import MAX_SIMULATED as MAX_SIMULATED
from .select import current as current
from .select import prepare as prepare
