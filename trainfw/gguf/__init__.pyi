from .header import Header as Header
from .header import StoredTensor as StoredTensor
from .header import gguf_library as gguf_library
from .header import read_header as read_header
from .to_metadata import tokenizer_metadata as tokenizer_metadata
from .to_tokenizer import huggingface_tokenizer as huggingface_tokenizer
