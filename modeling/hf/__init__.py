"""Hugging Face form of the models. `import longspan.modeling.hf` makes transformers' Auto classes know it.

An export holds one configuration and one modeling file: `configuration_longspan.py` as it is, and mixers, stack
and model joined (`source.py`). So those files may import only torch, transformers and one another. Exports then load
without `trust_remote_code`, by the code of the installed package: the same code, bit for bit.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from longspan.modeling.hf.configuration_longspan import LongspanConfig
from longspan.modeling.hf.modeling_longspan import LongspanForCausalLM

AutoConfig.register(LongspanConfig.model_type, LongspanConfig, exist_ok=True)
AutoModelForCausalLM.register(LongspanConfig, LongspanForCausalLM, exist_ok=True)
