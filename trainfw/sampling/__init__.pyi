from .generation import generate as generate
from .generation import generate_batch as generate_batch
from .generation import sample as sample
