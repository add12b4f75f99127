from .diffusion import SAMPLERS as SAMPLERS
from .diffusion import draw as draw
from .diffusion import guided as guided
from .diffusion import sampler_steps as sampler_steps
from .slots import ALTERNATIVES as ALTERNATIVES
from .slots import DrawnTokens as DrawnTokens
from .slots import Draws as Draws
from .slots import draw_tokens as draw_tokens
