"""A plain folder of a pruned LLaMA or Mistral as one GGUF file for llama.cpp, without a tokenizer.

`convert_hf_to_gguf.py` of llama.cpp reads a plain folder as any other, and takes the tokenizer along; this does the
same for the weights with the package gguf alone: `pip install gguf`, then `python examples/gguf_file.py FOLDER FILE`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file


def paired(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of queries or keys in the order of llama.cpp, which rotates neighbours, not the halves of a head."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write(folder: Path, file: Path) -> None:
    """Write the weights and widths of a folder that `save_pretrained` of a plain model wrote, in float32."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    writer = gguf.GGUFWriter(file, "llama")
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(keys)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in tensors.items():
        turned = {"q_proj": heads, "k_proj": keys}.get(name.split(".")[-2])
        numbers = tensor.astype(np.float32) if turned is None else paired(tensor.astype(np.float32), turned)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
