from .base import Backend as Backend
from .select import current as current
from .select import prepare as prepare
