"""The layers that are measured on a GPU; kernel_bench.cc has the same."""

# Name, T, H, D, E, K.
SHAPES = (
    ("Qwen3-30B-A3B", 32768, 2048, 768, 128, 8),
    ("Qwen3-30B-A3B", 4096, 2048, 768, 128, 8),
    ("Qwen3-30B-A3B", 64, 2048, 768, 128, 8),
    ("OLMoE", 16384, 2048, 1024, 64, 8),
    ("Mixtral-8x7B", 4096, 4096, 14336, 8, 2),
    ("SonicMoE-1", 32768, 4096, 1024, 64, 4),
)
