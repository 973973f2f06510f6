"""Print the report of a small random Llama, as the README shows it."""

from __future__ import annotations

import torch
import transformers

from lrp_compiler import compile_for_lrp


def main() -> None:
    """Compile two layers with grouped-query attention and print what came of it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.LlamaConfig(vocab_size=99, num_key_value_heads=2, **sizes)
    explained = compile_for_lrp(transformers.LlamaForCausalLM(config).eval())
    print(explained.report(input_ids=torch.randint(0, 99, (2, 7))))


if __name__ == "__main__":
    main()
