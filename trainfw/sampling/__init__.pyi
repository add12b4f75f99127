from .diffusion import SAMPLERS as SAMPLERS
from .diffusion import draw as draw
from .diffusion import guided as guided
from .diffusion import sampler_steps as sampler_steps
from .generation import generate as generate
from .generation import generate_batch as generate_batch
from .generation import sample as sample
