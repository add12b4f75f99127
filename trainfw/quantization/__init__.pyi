from .fp8 import fp8_matmul as fp8_matmul
from .quantized import Precision as Precision
from .quantized import Quantized as Quantized
from .quantized import block_problem as block_problem
from .quantized import dequantize as dequantize
from .quantized import quantize as quantize
